"""ACC, ASR, RA and losses of a model on pairs of clean and triggered images."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the usual name

from lightning_unlearn.data.pairs import Pairs
from lightning_unlearn.memory import is_of_machine
from lightning_unlearn.metrics.functional import predicted_classes, rate, triggered_counts
from lightning_unlearn.processes import ALONE, Processes

__all__ = ["Evaluation", "evaluate", "first_logits", "logits_of", "refuse_probabilities"]


@dataclass(frozen=True)
class Evaluation:
    """What a model does on pairs of clean and triggered images.

    Args:
        acc: accuracy on clean images, in [0, 1].
        asr: attack success rate, in [0, 1]; NaN if every image is of the target class.
        ra: recovery accuracy, in [0, 1]; NaN likewise.
        loss: mean cross-entropy of clean images, in nats.
        unlearning_loss: mean cross-entropy of triggered images against their true labels, L_u, in nats.
    """

    acc: float
    asr: float
    ra: float
    loss: float
    unlearning_loss: float

    def rates(self) -> dict[str, float]:
        """The three rates by name, as reports hold them."""
        return {"acc": self.acc, "asr": self.asr, "ra": self.ra}


def logits_of(forward: Callable[[Tensor], object], images: Tensor) -> Tensor:
    """Call a classifier and check that what it returns are logits, (N, C), returned as float32.

    It gets a copy of the images, since a model may normalise its input in place.

    Raises:
        ValueError: if the output is not a floating-point (N, C) tensor with two classes or more, or if the model cannot
            be called with a batch of images.
    """
    try:
        logits = forward(images.clone())
    except (AttributeError, IndexError, KeyError, NotImplementedError, TypeError) as error:
        raise ValueError(
            f"model: its forward pass fails on a batch of images of shape {tuple(images.shape)} "
            f"({type(error).__name__}: {error}); if it takes something else, override the callback's `logits`, or wrap "
            "the model, so that images go in and one tensor of class logits comes back."
        ) from error
    one_each = {(len(images),), (len(images), 1)}
    if isinstance(logits, Tensor) and logits.is_floating_point() and logits.shape in one_each:
        raise ValueError(
            "model: expected a logit for each class, two at least, but it gives one number an image; if that is the "
            "logit z of a yes or no, let the callback's `logits`, or a wrapper, give both, (0, z)."
        )
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images) or logits.shape[1] < 2:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"model: expected logits of shape ({len(images)}, classes) from its forward pass, but got {got}; "
            "wrap the model, or override the callback's `logits`, so that one tensor of class logits comes back."
        )
    if not logits.is_floating_point():
        raise ValueError(f"model: expected logits, which are floating-point numbers, but got {logits.dtype}.")
    return logits.float()


def first_logits(forward: Callable[[Tensor], object], images: Tensor) -> Tensor:
    """The same of a model that has not been asked yet, whose error, most likely, is that it cannot take such images.

    Raises:
        TypeError: if it takes no images of whole numbers.
        ValueError: if it cannot take the images, or as :func:`logits_of` does.
    """
    try:
        return logits_of(forward, images)
    except RuntimeError as error:
        if is_of_machine(error):
            raise
        if not images.is_floating_point():
            raise TypeError(
                f"model: it takes no images of {images.dtype}; give them as it was trained on them, such as by "
                f"torchvision's v2.ToDtype(torch.float32, scale=True). ({error})"
            ) from error
        raise ValueError(
            f"model: it cannot take images of shape {tuple(images.shape)} and {images.dtype} as they are; check their "
            f"channels, size and type against what it was trained on. ({error})"
        ) from error


def refuse_probabilities(logits: Tensor) -> None:
    """Refuse what came through a softmax: its gradients vanish where a network is sure, and losses mean nothing.

    Args:
        logits: (N, C), what a classifier answered.

    Raises:
        ValueError: if every row is positive and adds up to 1.
    """
    if (logits >= 0).all() and torch.allclose(logits.sum(1), torch.ones(len(logits), device=logits.device), atol=1e-3):
        raise ValueError(
            "model: expected logits, but its outputs are probabilities (each row adds up to 1); leave out the softmax "
            "at its end, or override the callback's `logits` with what stands before it."
        )


@torch.no_grad()  # in inference mode no model could take gradients itself, or keep what it computes
def evaluate(forward: Callable[[Tensor], Tensor], batches: Iterable[Pairs], processes: Processes = ALONE) -> Evaluation:
    """Measure a classifier on pairs, batch by batch, with one synchronisation with the device at the end.

    Sums and counts are kept over batches and processes, so a small last batch weighs as much as its images, and with
    several processes the result is that of all their images together.

    Args:
        forward: images to (N, C) logits, with every layer in eval mode.
        batches: pairs on the model's device; with several processes those of this one, maybe none.
        processes: who measures together.

    Raises:
        ValueError: if the outputs are not logits or there is no batch, on any process.

    Example:
        >>> import torch
        >>> from lightning_unlearn.data.pairs import Pairs
        >>> from lightning_unlearn.evaluation import evaluate
        >>> clean, triggered = torch.tensor([[0.0, 5.0], [5.0, 0.0]]), torch.tensor([[5.0, 0.0], [5.0, 0.0]])
        >>> pairs = Pairs(clean, triggered, labels=torch.tensor([1, 0]), targets=torch.tensor([0, 0]))
        >>> evaluate(lambda images: images, [pairs]).rates()  # the second image is of the target class: no part of ASR
        {'acc': 1.0, 'asr': 1.0, 'ra': 0.0}
    """
    # Plain sums: a repair measures after every round, and building metric objects cost as much as a small net's pass.
    sums: list[Tensor] = []
    images = 0
    for pairs in batches:
        if not len(pairs):  # no model need take an empty batch
            continue
        # One forward pass over both halves: on small batches the launch, not the arithmetic, is what costs.
        logits = logits_of(forward, torch.cat([pairs.clean, pairs.triggered]))
        clean, triggered = logits.chunk(2)
        right = (predicted_classes(clean, pairs.labels) == pairs.labels).sum()
        counts = triggered_counts(triggered, pairs.labels, pairs.targets)
        losses = F.cross_entropy(logits, pairs.labels.repeat(2), reduction="none").view(2, -1).sum(1)
        sums.append(torch.stack([right, *counts, *losses]))
        images += len(pairs)
    # Added up on the host: not every device has float64, in which no sum over batches loses a digit.
    totals = torch.stack(sums).cpu().double().sum(0) if sums else torch.zeros(6, dtype=torch.float64)
    count = torch.tensor(images, dtype=torch.float64)
    processes.sum([totals, count])
    right, successes, recoveries, considered, total = torch.cat([totals[:4], count[None]]).long()
    if not total:
        raise ValueError("batches: there is nothing to evaluate on; pass at least one batch of pairs.")
    loss, unlearning_loss = (totals[4:] / total).tolist()
    return Evaluation(
        acc=rate(right, total, "accuracy").item(),
        asr=rate(successes, considered, "attack success rate").item(),
        ra=rate(recoveries, considered, "recovery accuracy").item(),
        loss=loss,
        unlearning_loss=unlearning_loss,
    )

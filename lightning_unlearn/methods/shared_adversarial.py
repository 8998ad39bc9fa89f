"""Shared adversarial unlearning: train on what fools the model now and fooled the original in the same way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import log

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name

from lightning_unlearn.data.pairs import Pairs
from lightning_unlearn.evaluation import logits_of
from lightning_unlearn.filters.gradients import gradients
from lightning_unlearn.methods.base import RepairMethod, RepairTask, Round, check_range
from lightning_unlearn.methods.implicit_unlearning import PixelRange, slope_of
from lightning_unlearn.methods.training import Norms, train_epochs

__all__ = ["Original", "SharedAdversarialUnlearning", "anything_but", "sign_ascent", "slope_of_both"]


class SharedAdversarialUnlearning(RepairMethod):
    """SAU of Wei et al. (2023), arXiv 2307.10562, on clean images alone.

    A triggered image fools the backdoored original f₀ and, until it is repaired, the model f in the same way. So do
    *shared adversarial examples*, which can be found without the trigger: for every image x with label y

        δ = argmax over ‖δ‖∞ ≤ ε of   λ₃/2 · [CE(f(x+δ), y) + CE(f₀(x+δ), y)] − λ₄ · JSD(f(x+δ), f₀(x+δ))

    by projected sign-gradient ascent from 0, both models in eval mode. CE is the cross-entropy, JSD the
    Jensen-Shannon divergence of the two answers, which makes them wrong alike. Where both then answer the same wrong
    class ỹ ≠ y, the model is to answer *anything else*; p_ỹ is the probability that it gives that class:

        min over θ of   λ₁ · (1/n) Σ CE(f(x), y) − λ₂ · (1/n) Σ 1[f and f₀ both answer ỹ ≠ y] · log(1 − p_ỹ(x+δ))

    Steps are SGD's with momentum 0.9, on a cosine schedule. The last epoch is kept whose validation accuracy is
    within ``accuracy_drop`` of the untouched model's; if none is, the model is left alone. Pruned filters are held at
    zero. With norms in train mode one batch holds the clean and the perturbed images, half and half, and each norm
    sees both.

    What a pixel may be is not known for images that are normalised, so :class:`PixelRange` takes it from the scoring
    images, channel by channel: x + δ stays between their lowest and highest value, and ε is measured in units of the
    difference. For images that reach from black to white these are pixels in [0, 1].

    Args:
        epsilon: ε, the largest change of a pixel, in (0, 1].
        attack_steps: steps of the ascent.
        attack_step_size: by how much a step of the ascent changes each pixel, in the units of ε.
        clean_weight: λ₁ ≥ 0.
        unlearning_weight: λ₂ ≥ 0.
        fooling_weight: λ₃ ≥ 0.
        sharing_weight: λ₄ ≥ 0.
        learning_rate: of SGD with momentum 0.9.
        weight_decay: of SGD.
        batch_size: clean images in one step, with as many perturbed ones.
        max_epochs: epochs of training, each about ten times as long as one of fine-tuning.
        norms: ``"trained"`` to let norms see the batches, ``"frozen"`` to keep them in eval mode.
        accuracy_drop: α, the largest drop of validation accuracy, a fraction in (0, 1].

    Raises:
        ValueError: if a hyper-parameter is out of range.

    Example:
        >>> from lightning_unlearn.methods.shared_adversarial import SharedAdversarialUnlearning
        >>> SharedAdversarialUnlearning(max_epochs=10, norms="frozen").name
        'SharedAdversarialUnlearning'
    """

    def __init__(
        self,
        *,
        epsilon: float = 0.2,
        attack_steps: int = 5,
        attack_step_size: float = 0.2,
        clean_weight: float = 1.0,
        unlearning_weight: float = 1.0,
        fooling_weight: float = 0.01,
        sharing_weight: float = 1.0,
        learning_rate: float = 1e-2,
        weight_decay: float = 5e-4,
        batch_size: int = 256,
        max_epochs: int = 100,
        norms: Norms = "trained",
        accuracy_drop: float = 0.1,
    ) -> None:
        check_range("epsilon", epsilon, 0, 1, open_low=True)
        check_range("attack_steps", attack_steps, 1, float("inf"))
        check_range("attack_step_size", attack_step_size, 0, float("inf"), open_low=True)
        check_range("clean_weight", clean_weight, 0, float("inf"))
        check_range("unlearning_weight", unlearning_weight, 0, float("inf"))
        check_range("fooling_weight", fooling_weight, 0, float("inf"))
        check_range("sharing_weight", sharing_weight, 0, float("inf"))
        check_range("learning_rate", learning_rate, 0, float("inf"), open_low=True)
        check_range("weight_decay", weight_decay, 0, float("inf"))
        check_range("batch_size", batch_size, 1, float("inf"))
        check_range("max_epochs", max_epochs, 0, float("inf"))
        check_range("accuracy_drop", accuracy_drop, 0, 1, open_low=True)
        if norms not in ("frozen", "trained"):
            raise ValueError(f"norms: expected 'frozen' or 'trained', but got {norms!r}.")
        self.epsilon = epsilon
        self.attack_steps = attack_steps
        self.attack_step_size = attack_step_size
        self.clean_weight = clean_weight
        self.unlearning_weight = unlearning_weight
        self.fooling_weight = fooling_weight
        self.sharing_weight = sharing_weight
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.max_epochs = max_epochs
        self.norms: Norms = norms
        self.accuracy_drop = accuracy_drop

    def repair(self, task: RepairTask) -> Iterator[Round]:
        """Train, and leave the model as the kept epoch left it.

        Raises:
            ValueError: if the images are not floating-point, or the loss does not depend on them.
        """
        parameters: list[Tensor] = [p for p in task.model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=self.learning_rate, momentum=0.9, weight_decay=self.weight_decay)
        original = Original(task.model)
        pixels = PixelRange.of(task.scoring.clean)

        def step(chosen: Tensor) -> None:
            pairs = task.scoring[chosen]
            with _in_eval_mode(task.model):
                perturbed = self._attack(task, original, pairs, pixels)
                with original.put_back(), torch.no_grad():
                    answers = task.logits(perturbed).argmax(1)
            optimizer.zero_grad()
            self._loss(task, pairs, perturbed, answers).backward()  # type: ignore[no-untyped-call]  # torch's is untyped
            optimizer.step()

        yield from train_epochs(
            task,
            optimizer,
            step,
            batch_size=self.batch_size,
            max_epochs=self.max_epochs,
            norms=self.norms,
            accuracy_drop=self.accuracy_drop,
        )

    def _attack(self, task: RepairTask, original: Original, pairs: Pairs, pixels: PixelRange) -> Tensor:
        """Each image with its δ, (B, C, H, W)."""

        def gain(now: Tensor, then: Tensor) -> Tensor:
            fooled = F.cross_entropy(now, pairs.labels) + F.cross_entropy(then, pairs.labels)
            return self.fooling_weight / 2 * fooled - self.sharing_weight * _divergence(now, then)

        def slope(images: Tensor) -> Tensor:
            return slope_of_both(gain, task.forward, images, nullcontext, original.put_back)

        return sign_ascent(
            slope, pairs.clean, pixels, epsilon=self.epsilon, steps=self.attack_steps, step_size=self.attack_step_size
        )

    def _loss(self, task: RepairTask, pairs: Pairs, perturbed: Tensor, answers: Tensor) -> Tensor:
        """What a step lowers; ``answers`` are the classes, (B,), that the original gives the perturbed images."""
        clean, logits = task.logits(torch.cat([pairs.clean, perturbed])).chunk(2)
        shared = (logits.argmax(1) == answers) & (answers != pairs.labels)
        risk = anything_but(logits, answers).masked_fill(~shared, 0).mean()
        return self.clean_weight * F.cross_entropy(clean, pairs.labels) + self.unlearning_weight * risk


class Original:
    """A model's tensors as they were, to compute with them while the model changes.

    Copying the model would not do: the forward pass that a repair is given may be a closure over it.

    Args:
        model: any module; its parameters and buffers are copied once.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_unlearn.methods.shared_adversarial import Original
        >>> net = nn.Linear(1, 1, bias=False)
        >>> original = Original(net)
        >>> _ = nn.init.zeros_(net.weight)
        >>> with original.put_back():
        ...     bool(net.weight == 0)
        False
        >>> bool(net.weight == 0)
        True
    """

    def __init__(self, model: nn.Module) -> None:
        copies: dict[int, Tensor] = {}  # by identity, since modules may share a tensor
        self._tensors: list[tuple[dict[str, Tensor | None], str, Tensor]] = []
        for module in model.modules():
            homes: tuple[dict[str, Tensor | None], ...] = (module._parameters, module._buffers)  # type: ignore[assignment]  # a plain tensor stands in for a Parameter
            for home in homes:
                for name, tensor in home.items():
                    if tensor is not None:
                        copy = copies.setdefault(id(tensor), tensor.detach().clone())
                        self._tensors.append((home, name, copy))

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """Let the model compute with the original tensors within the ``with`` block; they need no gradient."""
        displaced = [(home, name, home[name]) for home, name, _ in self._tensors]
        try:
            for home, name, tensor in self._tensors:
                home[name] = tensor
            yield
        finally:
            for home, name, before in displaced:
                home[name] = before


def sign_ascent(
    slope: Callable[[Tensor], Tensor],
    images: Tensor,
    pixels: PixelRange,
    *,
    epsilon: float,
    steps: int,
    step_size: float,
) -> Tensor:
    """Change every image within ‖δ‖∞ ≤ ε and the range of pixels so that a gain rises (PGD).

    Args:
        slope: images to the gain's gradient by them.
        images: (B, C, H, W), where the ascent starts.
        pixels: the range that is not left, and the unit of ε.
        epsilon: ε.
        steps: how many times each pixel goes up or down.
        step_size: by how much, in the units of ε.

    Returns:
        The images x + δ, (B, C, H, W), without a graph.
    """
    limit = epsilon * pixels.unit
    low, high = torch.maximum(images - limit, pixels.low), torch.minimum(images + limit, pixels.high)
    moved = images.detach().clone()
    for _ in range(steps):
        rising = slope(moved.requires_grad_()).sign()
        moved = torch.clamp(moved.detach() + step_size * pixels.unit * rising, low, high)
    return moved


def slope_of_both(
    gain: Callable[[Tensor, Tensor], Tensor],
    forward: Callable[[Tensor], Tensor],
    images: Tensor,
    *states: Callable[[], AbstractContextManager[None]],
) -> Tensor:
    """∂/∂images of a gain that depends on what a model answers in two states.

    The backward pass of each is made in its own state, too, since a model that checkpoints then computes it again.

    Args:
        gain: two times (B, C) logits to a scalar.
        forward: images to logits.
        images: (B, C, H, W), which require gradients.
        states: for each, what to enter for the model to be in it.

    Raises:
        ValueError: if the answers do not depend on the images.
    """
    answers = []
    for state in states:
        with state():
            answers.append(logits_of(forward, images))
    leaves = [logits.detach().requires_grad_() for logits in answers]
    slopes = []
    for state, logits, pull in zip(states, answers, gradients(gain(*leaves), leaves), strict=True):
        with state():
            slopes.append(slope_of(logits, images, pull))
    return torch.stack(slopes).sum(0)


def anything_but(logits: Tensor, classes: Tensor) -> Tensor:
    """−log(1 − p) for the probability p that (B, C) logits give one class each, (B,): the cost of answering it."""
    others = logits.scatter(1, classes[:, None], -torch.inf).logsumexp(1)
    return logits.logsumexp(1) - others


def _divergence(first: Tensor, second: Tensor) -> Tensor:
    """Mean Jensen-Shannon divergence of the answers with two (B, C) logits, in [0, log 2]."""
    first, second = first.log_softmax(1), second.log_softmax(1)
    middle = torch.logaddexp(first, second) - log(2)
    to_first, to_second = (F.kl_div(middle, each, reduction="batchmean", log_target=True) for each in (first, second))
    return (to_first + to_second) / 2


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True

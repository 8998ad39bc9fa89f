"""Reconstructive neuron pruning: prune the channels that a model which forgot clean images gets them back without."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the usual name

from lightning_unlearn.data.pairs import Pairs
from lightning_unlearn.methods.affine import gradient_of, refuse_without_gammas, scaled_affine
from lightning_unlearn.methods.base import RepairMethod, RepairTask, Round, check_range
from lightning_unlearn.methods.snapshot import Snapshot
from lightning_unlearn.methods.subject import Subject
from lightning_unlearn.methods.threshold import prune_below_threshold
from lightning_unlearn.methods.training import batches

__all__ = ["ReconstructiveNeuronPruning"]


class ReconstructiveNeuronPruning(RepairMethod):
    """RNP of Li et al. (2023), arXiv 2305.14876, on clean images alone.

    With θ the weights, L the cross-entropy of clean images and m ∈ [0, 1] masks on γ of the norms that consume a
    convolution, one a channel:

    1. *Unlearn*: gradient ascent, max over θ of L(θ), until the accuracy on the clean images held is at most
       ``forgotten`` or ``unlearn_epochs`` are over. What the model does on clean images is forgotten, the backdoor is
       not.
    2. *Recover*: with these weights θ̂ frozen, min over m of L(m ⊙ θ̂). To get clean images back, the masks turn down
       what now answers wrongly, which the backdoor's channels do.
    3. *Prune*: the original weights come back, bit for bit, and channels are pruned by rising mask: among the
       thresholds 0, 0.05, ..., 0.95 the one that prunes most while the accuracy on all clean images held stays within
       ``accuracy_drop``.

    Both optimisers are SGD with momentum 0.9. Norms stay in eval mode in all three steps: a few images would shift
    running statistics, which no later step needs. Ascent knows no end, so its gradients are clipped to the norm 20.
    The fine-tuning that the paper may add is not part of this: run :class:`FineTuning` afterwards.

    An epoch of few images is few steps: with 10 images a class, all of an epoch is one batch, and 20 steps of ascent
    may not make the model forget. Lower ``batch_size`` or raise ``unlearn_rate`` then.

    Only channels that feed a norm of their own have a mask, and that mask scales γ alone, as published. Pruning zeroes
    the filter and β, too, and in the stem of a pre-activation network also what goes past the norm.

    Args:
        unlearn_rate: learning rate of the ascent.
        unlearn_epochs: most epochs of ascent.
        forgotten: accuracy on clean images, in [0, 1], at or below which the ascent ends.
        recover_rate: learning rate of the masks.
        recover_epochs: epochs in which the masks are learned.
        batch_size: clean images in one step.
        accuracy_drop: α, the largest drop of accuracy that pruning may cost, a fraction in (0, 1].

    Raises:
        ValueError: if a hyper-parameter is out of range.

    Example:
        >>> from lightning_unlearn.methods.reconstructive_pruning import ReconstructiveNeuronPruning
        >>> ReconstructiveNeuronPruning(unlearn_rate=0.02, batch_size=32).name
        'ReconstructiveNeuronPruning'
    """

    def __init__(
        self,
        *,
        unlearn_rate: float = 1e-2,
        unlearn_epochs: int = 20,
        forgotten: float = 0.2,
        recover_rate: float = 0.2,
        recover_epochs: int = 20,
        batch_size: int = 128,
        accuracy_drop: float = 0.1,
    ) -> None:
        check_range("unlearn_rate", unlearn_rate, 0, float("inf"), open_low=True)
        check_range("unlearn_epochs", unlearn_epochs, 1, float("inf"))
        check_range("forgotten", forgotten, 0, 1)
        check_range("recover_rate", recover_rate, 0, float("inf"), open_low=True)
        check_range("recover_epochs", recover_epochs, 1, float("inf"))
        check_range("batch_size", batch_size, 1, float("inf"))
        check_range("accuracy_drop", accuracy_drop, 0, 1, open_low=True)
        self.unlearn_rate = unlearn_rate
        self.unlearn_epochs = unlearn_epochs
        self.forgotten = forgotten
        self.recover_rate = recover_rate
        self.recover_epochs = recover_epochs
        self.batch_size = batch_size
        self.accuracy_drop = accuracy_drop

    def refuse_misfit(self, subject: Subject) -> None:
        """Asks for convolutions that feed affine norms."""
        refuse_without_gammas(subject, self.name)

    def repair(self, task: RepairTask) -> Iterator[Round]:
        """Unlearn, recover, and prune the original weights.

        Raises:
            ValueError: if the model has no such norms, or the loss does not depend on the weights, or on any norm
                behind a convolution.
        """
        self.refuse_misfit(task.subject)
        generator = task.generator()
        parameters: list[Tensor] = [p for p in task.model.parameters() if p.requires_grad]
        with _restored(parameters):
            yield from self._unlearn(task, parameters, generator)
            masks = yield from self._recover(task, generator)
        yield from prune_below_threshold(task, masks, accuracy_drop=self.accuracy_drop)

    def _unlearn(self, task: RepairTask, parameters: list[Tensor], generator: torch.Generator) -> Iterator[Round]:
        optimizer = torch.optim.SGD(parameters, lr=self.unlearn_rate, momentum=0.9)

        def step(pairs: Pairs) -> None:
            optimizer.zero_grad()
            loss = -_cross_entropy(task, pairs)
            if not loss.requires_grad:
                raise ValueError(
                    "model: its logits are detached from its weights, so nothing can be unlearned; check its forward."
                )
            loss.backward()  # type: ignore[no-untyped-call]  # torch's is untyped
            torch.nn.utils.clip_grad_norm_(parameters, max_norm=20.0)
            optimizer.step()

        with task.mask.held(optimizer):
            for _ in range(self.unlearn_epochs):
                self._epoch(task, generator, step)
                now = task.measure()
                yield task.round("learn", task.validate())
                if now.acc <= self.forgotten:
                    break

    def _recover(self, task: RepairTask, generator: torch.Generator) -> Generator[Round, None, Tensor]:
        """The masks, (total,) by flat index; 1 where a convolution feeds no norm."""
        masks = torch.ones(task.mask.total, device=task.scoring.labels.device, requires_grad=True)
        optimizer = torch.optim.SGD([masks], lr=self.recover_rate, momentum=0.9)

        def step(pairs: Pairs) -> None:
            with scaled_affine(task.mask, masks):
                masks.grad = gradient_of(_cross_entropy(task, pairs), masks)
            optimizer.step()
            with torch.no_grad():
                masks.clamp_(0, 1)

        for _ in range(self.recover_epochs):
            self._epoch(task, generator, step)
            with scaled_affine(task.mask, masks.detach()):
                now = task.validate()
            yield task.round("learn", now)
        return masks.detach()

    def _epoch(self, task: RepairTask, generator: torch.Generator, step: Callable[[Pairs], None]) -> None:
        with task.watch.measure("score"):
            for chosen in batches(task, self.batch_size, generator):
                step(task.scoring[chosen])


def _cross_entropy(task: RepairTask, pairs: Pairs) -> Tensor:
    return F.cross_entropy(task.logits(pairs.clean), pairs.labels)


@contextmanager
def _restored(parameters: list[Tensor]) -> Iterator[None]:
    """Give parameters back the values that they had, and no gradients, whatever happened to them meanwhile."""
    before = Snapshot(parameters)
    try:
        yield
    finally:
        before.put_back()
        for parameter in parameters:
            parameter.grad = None

"""FT-SAM: fine-tuning that looks for weights whose neighbours are as good."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name

from lightning_unlearn.methods.base import RepairMethod, RepairTask, Round, check_range
from lightning_unlearn.methods.snapshot import Snapshot
from lightning_unlearn.methods.training import train_epochs

__all__ = ["SharpnessAwareFineTuning"]


class SharpnessAwareFineTuning(RepairMethod):
    """FT-SAM after Zhu et al. (2023), arXiv 2304.11823: sharpness-aware fine-tuning on clean images.

    Backdoored neurons have large weights, which plain fine-tuning hardly moves. Each step here descends along the
    gradient at the worst neighbour w + ε within an ellipsoid that is widest along large weights, that of adaptive
    sharpness-aware minimisation (Kwon et al., 2021, arXiv 2102.11600):

        ε = rho · w² ∇L(w) / ‖ abs(w) ∇L(w) ‖₂,    w ← SGD(w, ∇L(w + ε))

    where products are element by element and the norm runs over all parameters, biases and norms included. A weight of
    zero is not perturbed, so pruned filters stay pruned in both passes. L is the cross-entropy with smoothed labels.

    Around it is the training of :class:`FineTuning`: SGD with momentum 0.9, a cosine schedule, norms in train mode, the
    last epoch kept whose validation accuracy is within ``accuracy_drop``. Running statistics follow the first pass of
    each step alone: those of w + ε are not the model's. A step costs two forward and two backward passes.

    Args:
        rho: ρ, the size of the neighbourhood.
        label_smoothing: the share of each label that is spread over all classes, in [0, 1].
        learning_rate: of SGD with momentum 0.9.
        weight_decay: of SGD.
        batch_size: clean images in one step.
        max_epochs: how many epochs to train.
        accuracy_drop: α, the largest drop of validation accuracy, a fraction in (0, 1].

    Raises:
        ValueError: if a hyper-parameter is out of range.

    Example:
        >>> from lightning_unlearn.methods.sharpness_aware import SharpnessAwareFineTuning
        >>> SharpnessAwareFineTuning(rho=1.0).name
        'SharpnessAwareFineTuning'
    """

    def __init__(
        self,
        *,
        rho: float = 2.0,
        label_smoothing: float = 0.1,
        learning_rate: float = 1e-2,
        weight_decay: float = 5e-4,
        batch_size: int = 256,
        max_epochs: int = 100,
        accuracy_drop: float = 0.1,
    ) -> None:
        check_range("rho", rho, 0, float("inf"), open_low=True)
        check_range("label_smoothing", label_smoothing, 0, 1)
        check_range("learning_rate", learning_rate, 0, float("inf"), open_low=True)
        check_range("weight_decay", weight_decay, 0, float("inf"))
        check_range("batch_size", batch_size, 1, float("inf"))
        check_range("max_epochs", max_epochs, 0, float("inf"))
        check_range("accuracy_drop", accuracy_drop, 0, 1, open_low=True)
        self.rho = rho
        self.label_smoothing = label_smoothing
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.max_epochs = max_epochs
        self.accuracy_drop = accuracy_drop

    def repair(self, task: RepairTask) -> Iterator[Round]:
        """Fine-tune, and leave the model as the kept epoch left it."""
        parameters = [p for p in task.model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=self.learning_rate, momentum=0.9, weight_decay=self.weight_decay)

        def descend(chosen: Tensor) -> None:
            optimizer.zero_grad()
            images, labels = task.scoring.clean[chosen], task.scoring.labels[chosen]
            logits = task.logits(images)
            F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing).backward()  # type: ignore[no-untyped-call]  # torch's is untyped

        def step(chosen: Tensor) -> None:
            descend(chosen)
            with _at_worst_neighbour(parameters, self.rho), _statistics_held(task.model):
                descend(chosen)
            optimizer.step()

        yield from train_epochs(
            task,
            optimizer,
            step,
            batch_size=self.batch_size,
            max_epochs=self.max_epochs,
            norms="trained",
            accuracy_drop=self.accuracy_drop,
        )


@contextmanager
def _at_worst_neighbour(parameters: Sequence[Tensor], rho: float) -> Iterator[None]:
    """Move parameters by ε, made of their gradients, within the ``with`` block, and back bit for bit."""
    moved = [p for p in parameters if p.grad is not None]
    before = Snapshot(moved)
    try:
        with torch.no_grad():
            pulls = [p.grad * p.abs() for p in moved if p.grad is not None]
            # The norm of norms is that of all entries; in float32, since squares of halves run out of range.
            norms = [pull.float().norm().to(pulls[0].device) for pull in pulls]
            length = rho / (torch.stack(norms).norm() + 1e-12)
            for p, pull in zip(moved, pulls, strict=True):
                p.add_((pull.float() * p.abs() * length.to(p.device)).to(p.dtype))
        yield
    finally:
        before.put_back()


@contextmanager
def _statistics_held(model: nn.Module) -> Iterator[None]:
    """Let norms in train mode normalise by their batch, but not count it, within the ``with`` block.

    A momentum of 0 leaves running means and variances as they are; a norm that is told not to track does not count the
    batch either, by which one without a momentum would weigh the next.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.training]
    before = [(norm, norm.momentum, norm.track_running_stats) for norm in norms]
    try:
        for norm in norms:
            norm.momentum, norm.track_running_stats = 0.0, False
        yield
    finally:
        for norm, momentum, tracks in before:
            norm.momentum, norm.track_running_stats = momentum, tracks

"""Fine-tuning: a few epochs on the images that the defender holds."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the usual name

from lightning_unlearn.data.pairs import Pairs
from lightning_unlearn.evaluation import Evaluation, logits_of
from lightning_unlearn.methods.base import RepairMethod, RepairTask, Round, Teacher, check_range

__all__ = ["FineTuning"]


class FineTuning(RepairMethod):
    """Train on clean images, and with ``triggered`` also on their triggered copies, all with true labels.

    This is the last step of Dunnett et al. (2024), arXiv 2405.03918, and on clean images alone the oldest defence.
    Norms stay in eval mode: a few images per class shift running statistics more than they repair. Pruned filters are
    held at zero. The best epoch is kept: the one with the lowest validation loss (L_clean, plus L_u with ``triggered``)
    among those whose validation accuracy is within ``accuracy_drop`` of the untouched model's; epoch 0, no training,
    competes.

    Args:
        triggered: also train on triggered images (they count half of each batch).
        teacher: train towards the true ``"labels"``, or towards what the untouched ``"victim"`` answered for the clean
            image, by KL divergence, which moves its accuracy less.
        learning_rate: of SGD with momentum 0.9.
        weight_decay: of SGD.
        batch_size: clean images in one step (with as many triggered ones).
        patience: stop after this many epochs without a lower validation loss.
        max_epochs: stop after this many epochs.
        accuracy_drop: α, the largest drop of validation accuracy, a fraction in (0, 1].

    Raises:
        ValueError: if a hyper-parameter is out of range.

    Example:
        >>> from lightning_unlearn.methods import FineTuning
        >>> FineTuning(triggered=True).name
        'FineTuning'
    """

    def __init__(
        self,
        *,
        triggered: bool = False,
        teacher: Teacher = "labels",
        learning_rate: float = 1e-3,
        weight_decay: float = 5e-4,
        batch_size: int = 128,
        patience: int = 10,
        max_epochs: int = 100,
        accuracy_drop: float = 0.1,
    ) -> None:
        check_range("learning_rate", learning_rate, 0, float("inf"), open_low=True)
        check_range("weight_decay", weight_decay, 0, float("inf"))
        check_range("batch_size", batch_size, 1, float("inf"))
        check_range("patience", patience, 1, float("inf"))
        check_range("max_epochs", max_epochs, 0, float("inf"))
        check_range("accuracy_drop", accuracy_drop, 0, 1, open_low=True)
        if teacher not in ("victim", "labels"):
            raise ValueError(f"teacher: expected 'victim' or 'labels', but got {teacher!r}.")
        self.triggered = triggered
        self.teacher: Teacher = teacher
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.patience = patience
        self.max_epochs = max_epochs
        self.accuracy_drop = accuracy_drop

    def repair(self, task: RepairTask) -> Iterator[Round]:
        """Fine-tune until the validation loss stops falling, and keep the best epoch."""
        parameters: list[Tensor] = [p for p in task.model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=self.learning_rate, momentum=0.9, weight_decay=self.weight_decay)
        best_loss = self._loss(task.validate())
        best = [p.detach().clone() for p in parameters]
        best_epoch = 0
        generator, wanted = task.generator(), task.wanted(self.teacher)
        floor = task.before.acc - self.accuracy_drop - 1e-6  # accuracies come as float32
        with task.mask.held(optimizer):
            for epoch in count(1):
                if epoch > self.max_epochs or epoch - best_epoch > self.patience:
                    break
                with task.watch.measure("finetune"):
                    order = torch.randperm(len(task.scoring), generator=generator).to(wanted.device)
                    for chosen in torch.split(order, self.batch_size):
                        optimizer.zero_grad()
                        self._step_loss(task, task.scoring[chosen], wanted[chosen]).backward()  # type: ignore[no-untyped-call]  # torch's is untyped
                        optimizer.step()
                now = task.validate()
                # A loss that is not finite is never lower, so a diverged epoch cannot be kept.
                if self._loss(now) < best_loss and now.acc >= floor:
                    best_loss, best_epoch = self._loss(now), epoch
                    torch._foreach_copy_(best, [p.detach() for p in parameters])
                yield task.round("finetune", now)
        with torch.no_grad():
            torch._foreach_copy_(parameters, best)
        for parameter in parameters:
            parameter.grad = None

    def _step_loss(self, task: RepairTask, pairs: Pairs, wanted: Tensor) -> Tensor:
        images = pairs.clean
        if self.triggered:
            images, wanted = torch.cat([images, pairs.triggered]), wanted.repeat(2, 1)
        # For one-hot answers, the labels, the divergence is the cross-entropy.
        return F.kl_div(logits_of(task.forward, images).log_softmax(1), wanted, reduction="batchmean")

    def _loss(self, now: Evaluation) -> float:
        return now.loss + now.unlearning_loss if self.triggered else now.loss

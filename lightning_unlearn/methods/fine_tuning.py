"""Fine-tuning: a few epochs on the images that the defender holds."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the usual name

from lightning_unlearn.data.pairs import Pairs
from lightning_unlearn.evaluation import Evaluation
from lightning_unlearn.methods.base import RepairMethod, RepairTask, Round, Teacher, check_range
from lightning_unlearn.methods.training import Norms, train_epochs

__all__ = ["FineTuning"]


class FineTuning(RepairMethod):
    """Train on clean images, and with ``triggered`` also on their triggered copies: the oldest defence.

    By default it is what backdoor benchmarks call FT: SGD with momentum 0.9 on clean images alone, a cosine schedule
    over 100 epochs, norms in train mode, the last epoch kept. With a ``patience`` the rate is constant and the epoch
    with the lowest validation loss (L_clean, plus L_u with ``triggered``) is kept. Either way only epochs count whose
    validation accuracy is within ``accuracy_drop`` of the untouched model's. Pruned filters are held at zero.

    :class:`GradPrune` and :class:`MaskPrune` end with a short one on clean and triggered images, with norms frozen:
    a few triggered images shift running statistics more than they repair.

    Args:
        triggered: also train on triggered images (they count half of each batch).
        teacher: train towards the true ``"labels"``, or towards what the untouched ``"victim"`` answered for the clean
            image, by KL divergence, which moves its accuracy less.
        learning_rate: of SGD with momentum 0.9.
        weight_decay: of SGD.
        batch_size: clean images in one step (with as many triggered ones).
        patience: stop after this many epochs without a lower validation loss; None to go through all of them.
        max_epochs: stop after this many epochs.
        norms: ``"frozen"`` to keep norms in eval mode, ``"trained"`` to let them see the batches.
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
        learning_rate: float = 1e-2,
        weight_decay: float = 5e-4,
        batch_size: int = 256,
        patience: int | None = None,
        max_epochs: int = 100,
        norms: Norms = "trained",
        accuracy_drop: float = 0.1,
    ) -> None:
        check_range("learning_rate", learning_rate, 0, float("inf"), open_low=True)
        check_range("weight_decay", weight_decay, 0, float("inf"))
        check_range("batch_size", batch_size, 1, float("inf"))
        check_range("patience", 1 if patience is None else patience, 1, float("inf"))
        check_range("max_epochs", max_epochs, 0, float("inf"))
        check_range("accuracy_drop", accuracy_drop, 0, 1, open_low=True)
        if teacher not in ("victim", "labels"):
            raise ValueError(f"teacher: expected 'victim' or 'labels', but got {teacher!r}.")
        if norms not in ("frozen", "trained"):
            raise ValueError(f"norms: expected 'frozen' or 'trained', but got {norms!r}.")
        self.needs_trigger = triggered
        self.triggered = triggered
        self.teacher: Teacher = teacher
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.patience = patience
        self.max_epochs = max_epochs
        self.norms: Norms = norms
        self.accuracy_drop = accuracy_drop

    def repair(self, task: RepairTask) -> Iterator[Round]:
        """Fine-tune, and leave the model as the kept epoch left it."""
        parameters: list[Tensor] = [p for p in task.model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=self.learning_rate, momentum=0.9, weight_decay=self.weight_decay)
        wanted = task.wanted(self.teacher)

        def step(chosen: Tensor) -> None:
            optimizer.zero_grad()
            if len(chosen):  # else all went to other processes
                self._step_loss(task, task.scoring[chosen], wanted[chosen]).backward()  # type: ignore[no-untyped-call]  # torch's is untyped
            optimizer.step()

        yield from train_epochs(
            task,
            optimizer,
            step,
            batch_size=self.batch_size,
            max_epochs=self.max_epochs,
            patience=self.patience,
            norms=self.norms,
            accuracy_drop=self.accuracy_drop,
            shared=self.norms == "frozen",  # norms in train mode need whole batches
            loss=self._loss,
        )

    def _step_loss(self, task: RepairTask, pairs: Pairs, wanted: Tensor) -> Tensor:
        images = pairs.clean
        if self.triggered:
            images, wanted = torch.cat([images, pairs.triggered]), wanted.repeat(2, 1)
        # For one-hot answers, the labels, the divergence is the cross-entropy.
        return F.kl_div(task.logits(images).log_softmax(1), wanted, reduction="batchmean")

    def _loss(self, now: Evaluation) -> float:
        return now.loss + now.unlearning_loss if self.triggered else now.loss

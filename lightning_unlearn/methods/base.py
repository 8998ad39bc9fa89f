"""What every repair method gets, gives back round by round, and may count on."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name

from lightning_unlearn.auditor import Auditor, Progress
from lightning_unlearn.data.pairs import Pairs
from lightning_unlearn.evaluation import Evaluation, evaluate, logits_of
from lightning_unlearn.filters import FilterId, FilterMask
from lightning_unlearn.methods.subject import Subject
from lightning_unlearn.processes import ALONE, Processes
from lightning_unlearn.triggers import Trigger
from lightning_unlearn.verdict import Audit

__all__ = ["RepairMethod", "RepairTask", "Round", "Stage", "Stopwatch", "Teacher", "check_range"]

Stage = Literal["prune", "learn", "finetune"]
Teacher = Literal["victim", "labels"]


@dataclass(frozen=True)
class Round:
    """One step of a repair, measured on the validation part.

    Args:
        round: number of the round, from 1, counted through all stages.
        stage: whether filters were pruned, masks learned or weights fine-tuned.
        pruned: the (layer, filter) pairs that this round zeroed; a later choice of the best round may restore them.
        val_acc: accuracy on clean validation images, in [0, 1].
        val_asr: attack success rate on triggered validation images, in [0, 1].
        val_ra: recovery accuracy on triggered validation images, in [0, 1].
        val_loss: mean cross-entropy on clean validation images, in nats.
        val_unlearning_loss: mean cross-entropy of triggered validation images against their true labels, in nats.
        total_pruned: how many filters are pruned after this round.
    """

    round: int
    stage: Stage
    pruned: tuple[FilterId, ...]
    val_acc: float
    val_asr: float
    val_ra: float
    val_loss: float
    val_unlearning_loss: float
    total_pruned: int = 0


class Stopwatch:
    """Seconds spent on named kinds of work.

    Example:
        >>> from lightning_unlearn.methods.base import Stopwatch
        >>> watch = Stopwatch()
        >>> with watch.measure("score"):
        ...     pass
        >>> list(watch.seconds)
        ['score']
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, kind: str) -> Iterator[None]:
        """Add the time of the ``with`` block to ``seconds[kind]``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[kind] = self.seconds.get(kind, 0.0) + time.perf_counter() - start


@dataclass(eq=False)
class RepairTask:
    """A model to repair, in eval mode with gradients enabled, and what the defender holds.

    Args:
        model: the module whose parameters a method may change.
        forward: images to (N, C) logits, through the model, which may write into the images; call :meth:`logits`.
        mask: the model's filters; methods prune through it so that every change can be undone.
        scoring: pairs that a method may learn from, on the model's device.
        validation: pairs that decide when to stop and which round to keep, on the model's device.
        before: the untouched model on ``validation``.
        answers: (N, C) probabilities that the untouched model gives the clean scoring images.
        trigger: what makes triggered images of clean ones, for methods that make more of them.
        batch_size: most pairs in one forward pass.
        seed: seed of every random choice that a method makes.
        audit: what was found where nobody knew the trigger, which is then an estimate.
        auditor: how that was found.
        on_progress: what to call while a method estimates triggers.
        processes: those that repair this model together. Each has all pairs; measuring is always shared out.
    """

    model: nn.Module
    forward: Callable[[Tensor], Tensor]
    mask: FilterMask
    scoring: Pairs
    validation: Pairs
    before: Evaluation
    answers: Tensor
    trigger: Trigger
    batch_size: int = 128
    seed: int = 0
    audit: Audit | None = None
    auditor: Auditor = field(default_factory=Auditor)
    on_progress: Progress | None = None
    processes: Processes = ALONE
    watch: Stopwatch = field(default_factory=Stopwatch)
    rounds: int = 0

    @property
    def subject(self) -> Subject:
        """The model and two images, as :meth:`RepairMethod.refuse_misfit` is given them."""
        return Subject(self.model, self.forward, self.mask.layers, self.scoring.clean[:2])

    @cached_property
    def held_before(self) -> Evaluation:
        """The model as the method gets it, on all pairs held; measured when first asked for, before any change."""
        return self.measure()

    def logits(self, images: Tensor) -> Tensor:
        """(N, C) float32 logits of (N, C, H, W) images, which stay as they are whatever the model does with its input.

        Raises:
            ValueError: if the model returns anything else.
        """
        return logits_of(self.forward, images)

    def validate(self) -> Evaluation:
        """Measure the model as it is now on the validation part."""
        return self._evaluate(self.validation)

    def measure(self) -> Evaluation:
        """Measure the model as it is now on all pairs held: a validation part of one image a class alone is coarse."""
        return self._evaluate(self.scoring, self.validation)

    def _evaluate(self, *parts: Pairs) -> Evaluation:
        shares = (part[self.processes.share(len(part))] for part in parts)
        with self.watch.measure("evaluate"):
            batches = (pairs for share in shares for pairs in share.batches(self.batch_size))
            return evaluate(self.forward, batches, self.processes)

    def round(self, stage: Stage, now: Evaluation, pruned: tuple[FilterId, ...] = ()) -> Round:
        """Number the next round and record what it came to.

        Raises:
            RuntimeError: if the filters that processes have pruned are no longer the same.
        """
        self.processes.refuse_difference("the pruned filters", self.mask.pruned)
        self.rounds += 1
        rates = now.acc, now.asr, now.ra, now.loss, now.unlearning_loss
        return Round(self.rounds, stage, pruned, *rates, total_pruned=len(self.mask.pruned))

    def wanted(self, teacher: Teacher) -> Tensor:
        """What to answer for each scoring image, clean or triggered: (N, C) probabilities."""
        if teacher == "labels":
            return F.one_hot(self.scoring.labels, self.answers.shape[1]).float()
        return self.answers

    def generator(self) -> torch.Generator:
        """A fresh CPU generator with the task's seed, the same on every process and device."""
        return torch.Generator().manual_seed(self.seed)


class RepairMethod(ABC):
    """Removes a backdoor from a model, in place, round by round.

    A method is a set of hyper-parameters. All state is in the :class:`RepairTask` it is given, so one instance can
    repair many models. If the generator is closed or fails before its end, the caller restores the model.

    With several processes every one runs the method, in lock-step: the same calls of :meth:`RepairTask.round`,
    :meth:`~RepairTask.validate` and :meth:`~RepairTask.measure` are made on each, and these share out their images.
    The rest a method may compute on every process alike, from all images, as it would alone: so do all but three.
    :class:`GradPrune`, :class:`MaskPrune` and :class:`FineTuning` with frozen norms take ``task.processes.share`` of
    the images, and sum over processes before they decide on anything.

    Attributes:
        needs_trigger: whether it learns from triggered images; a method that does not sees clean images alone.

    Example:
        A defence of one's own, which can be compared with all others, and named in YAML by its ``class_path``:

        >>> import torch
        >>> from torch.nn import functional as F
        >>> from torch.utils.data import TensorDataset
        >>> from lightning_unlearn import repair
        >>> from lightning_unlearn.methods import RepairMethod
        >>> from lightning_unlearn.triggers import PatchTrigger
        >>> class Relabel(RepairMethod):
        ...     needs_trigger = True
        ...
        ...     def repair(self, task):
        ...         optimizer = torch.optim.SGD(task.model.parameters(), lr=0.1)
        ...         for epoch in range(2):
        ...             loss = F.cross_entropy(task.logits(task.scoring.triggered), task.scoring.labels)
        ...             optimizer.zero_grad()
        ...             loss.backward()
        ...             optimizer.step()
        ...             yield task.round("finetune", task.validate())
        >>> layers = torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 2)
        >>> clean = TensorDataset(torch.rand(20, 1, 8, 8), torch.arange(20) % 2)
        >>> done = repair(torch.nn.Sequential(*layers), clean, trigger=PatchTrigger(), method=Relabel(), force=True)
        >>> done.method, len(done.rounds)
        ('Relabel', 2)
    """

    needs_trigger: bool = False

    def refuse_misfit(self, subject: Subject) -> None:  # noqa: B027 - most methods fit every model
        """Refuse a model that lacks what the method needs, such as norms: asked before training and before an audit.

        A subclass with a :meth:`repair` of its own that needs less overrides this, too.

        Args:
            subject: the model, which may not be trained yet, and images that it takes.

        Raises:
            ValueError: naming what is missing, and a method that works without.
        """

    @abstractmethod
    def repair(self, task: RepairTask) -> Iterator[Round]:
        """Repair ``task.model`` in place and yield a :class:`Round` as each is measured.

        When the generator ends the model is repaired, all modules are in eval mode and no hook is left.
        """

    @property
    def name(self) -> str:
        """The method's name in reports and tables."""
        return type(self).__name__


def check_range(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    """Refuse a hyper-parameter outside its range.

    Raises:
        TypeError: if it is no number, such as a text.
        ValueError: naming the argument, what was given and what would be right.
    """
    given: object = value
    if isinstance(given, str) or not hasattr(given, "__float__"):  # a tensor of no dimensions will do
        raise TypeError(f"{name}: expected a number, but got {given!r}.")
    too_low = value <= low if open_low else value < low
    if too_low or not value <= high:
        raise ValueError(f"{name}: expected a value in {'(' if open_low else '['}{low}, {high}], but got {value}.")

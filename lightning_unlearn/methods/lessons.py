"""Lessons: what the untouched victim says of a few images, batch by batch, for a masked model to learn from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from lightning_unlearn.data.augmentation import flip_and_shift
from lightning_unlearn.data.pairs import Pairs
from lightning_unlearn.evaluation import evaluate
from lightning_unlearn.methods.base import RepairTask, Teacher
from lightning_unlearn.methods.statistics import Seen, observed, running_statistics, settle
from lightning_unlearn.methods.training import batches

__all__ = ["Lesson", "Settling", "bears_augmentation", "lessons"]

_SETTLING_IMAGES = 180  # statistics of more of the same few images hardly differ


@dataclass(frozen=True, eq=False)
class Lesson:
    """A batch of pairs, and what to answer.

    Attributes:
        pairs: of them what this process takes, maybe none.
        wanted: (B, C) probabilities, of the clean and of the triggered images alike.
        weight: by which this process's gradient counts among all processes'.
        seen: what the victim's BatchNorms were given for the clean images; empty where they are not to follow.
    """

    pairs: Pairs
    wanted: Tensor
    weight: float
    seen: Seen


def lessons(
    task: RepairTask, count: int, *, teacher: Teacher, batch_size: int, augment: bool, following: bool
) -> Iterator[Lesson]:
    """``count`` lessons, each epoch in a new order.

    Args:
        task: whose model still is the untouched victim whenever the next lesson is asked for.
        count: how many.
        teacher: who says what to answer: ``"victim"`` or ``"labels"``.
        batch_size: clean images a lesson.
        augment: flip and shift the images anew in each; the victim is then asked again.
        following: note also what norms see, in a whole batch, all of which each process then takes.
    """
    generator, left = task.generator(), count
    asked = augment or (following and teacher == "victim")  # in the batch that it learns from, or the answers are known
    while left:
        for chosen in batches(task, batch_size, generator):
            share = slice(None) if following else task.processes.share(len(chosen))
            noted: AbstractContextManager[Seen] = observed(task.model) if following else nullcontext({})
            with torch.no_grad(), task.watch.measure("score"), noted as seen:
                pairs, wanted = task.scoring[chosen], task.wanted(teacher)[chosen][share]
                if augment:
                    pairs = _flipped_and_shifted(task, pairs, generator)
                pairs = pairs[share]
                if len(pairs) and (asked or following):
                    answers = task.logits(pairs.clean).softmax(1)
                    wanted = answers if asked else wanted
            weight = 1 / task.processes.count if following else len(pairs) / len(chosen)
            yield Lesson(pairs, wanted, weight, seen)
            left -= 1
            if not left:
                break


def bears_augmentation(task: RepairTask, accuracy_drop: float) -> bool:
    """Whether victim and backdoor do on flipped and shifted images what they do on those held, within 2α."""
    generator = task.generator()

    def flipped_and_shifted() -> Iterator[Pairs]:
        for part in (task.scoring, task.validation):
            for pairs in part.batches(task.batch_size):
                yield _flipped_and_shifted(task, pairs, generator)[task.processes.share(len(pairs))]

    before, now = task.held_before, evaluate(task.forward, flipped_and_shifted(), task.processes)
    drop = 2 * accuracy_drop + 1e-6  # by chance alone, a few images can cost α
    return now.acc >= before.acc - drop and not now.asr < before.asr - drop  # ASR is NaN where all are the target's


class Settling:
    """Images by which BatchNorm's running statistics follow a model's weights for good, told by how they were seen.

    Args:
        task: whose model still is the untouched victim.
        augment: flip and shift the images, in several passes.
    """

    def __init__(self, task: RepairTask, *, augment: bool) -> None:
        self._task, self._augment = task, augment
        self._seen: list[Seen] = []
        with torch.no_grad(), task.watch.measure("score"):
            for images in self._images():
                with observed(task.model) as seen:
                    task.forward(images)
                self._seen.append(seen)

    def __call__(self) -> None:
        """Give the model as it is now the statistics."""
        self._settle(self._seen)

    @contextmanager
    def meanwhile(self) -> Iterator[None]:
        """Give the model as it is now the statistics within the ``with`` block, by a single pass."""
        running = [(statistic, statistic.clone()) for statistic in running_statistics(self._task.model)]
        try:
            self._settle(self._seen[: len(self._seen) // self._passes])
            yield
        finally:
            for statistic, before in running:
                statistic.copy_(before)

    def _settle(self, seen: Sequence[Seen]) -> None:
        with self._task.watch.measure("score"):
            settle(self._task.model, self._task.forward, islice(self._images(), len(seen)), seen)

    @property
    def _passes(self) -> int:
        return max(1, round(_SETTLING_IMAGES / len(self._task.scoring))) if self._augment else 1

    def _images(self) -> Iterator[Tensor]:
        generator, scoring = self._task.generator(), self._task.scoring
        for _ in range(self._passes):
            for pairs in scoring.batches(self._task.batch_size):
                # A copy, since a model may write into what it is given.
                yield flip_and_shift(pairs.clean, generator) if self._augment else pairs.clean.clone()


def _flipped_and_shifted(task: RepairTask, pairs: Pairs, generator: torch.Generator) -> Pairs:
    """Pairs made anew, before a process takes its share of them, so that every process draws the same."""
    images = flip_and_shift(pairs.clean, generator)
    # All are stamped, since a pool deals its triggers, and their targets, out by an image's place in the batch.
    targets = task.trigger.targets(pairs.labels, task.answers.shape[1])
    return Pairs(images, task.trigger(images), pairs.labels, targets)

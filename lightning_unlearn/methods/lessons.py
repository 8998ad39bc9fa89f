"""Lessons: what the untouched victim says of a few images, batch by batch, for a masked model to learn from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_unlearn.data.augmentation import flip_and_shift
from lightning_unlearn.data.pairs import Pairs
from lightning_unlearn.evaluation import evaluate
from lightning_unlearn.methods.base import RepairTask, Teacher
from lightning_unlearn.methods.training import batches
from lightning_unlearn.statistics import Statistics, mixed, moments

__all__ = ["Lesson", "bears_augmentation", "fresh_statistics", "lessons"]

_FRESH_IMAGES = 180  # statistics of more of the same few images hardly differ
_TRUSTED_HALF = 90  # of so many images statistics count half


@dataclass(frozen=True, eq=False)
class Lesson:
    """A batch of pairs, and what to answer.

    Attributes:
        pairs: of them what this process takes, maybe none.
        wanted: (B, C) probabilities, of the clean and of the triggered images alike.
        weight: by which this process's gradient counts among all processes'.
    """

    pairs: Pairs
    wanted: Tensor
    weight: float


def lessons(task: RepairTask, count: int, *, teacher: Teacher, batch_size: int, augment: bool) -> Iterator[Lesson]:
    """``count`` lessons, each epoch in a new order.

    Args:
        task: whose model still is the untouched victim whenever the next lesson is asked for.
        count: how many.
        teacher: who says what to answer: ``"victim"`` or ``"labels"``.
        batch_size: clean images a lesson.
        augment: flip and shift the images anew in each; the victim is then asked again.
    """
    generator, left = task.generator(), count
    while left:
        for chosen in batches(task, batch_size, generator):
            share = task.processes.share(len(chosen))
            with torch.no_grad(), task.watch.measure("score"):
                pairs, wanted = task.scoring[chosen], task.wanted(teacher)[chosen][share]
                if augment:
                    pairs = _flipped_and_shifted(task, pairs, generator)
                pairs = pairs[share]
                if augment and len(pairs):
                    wanted = task.logits(pairs.clean).softmax(1)
            yield Lesson(pairs, wanted, len(pairs) / len(chosen))
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


def fresh_statistics(task: RepairTask, *, augment: bool) -> Statistics:
    """The BatchNorm statistics that clean images would give the model as it is now, as well as few images can tell.

    Those that N scoring images would give it count N / (N + 90), and the model's own the rest.

    Args:
        task: whose model it is.
        augment: flip and shift the images, and take the fewest of them several times.
    """
    generator, scoring = task.generator(), task.scoring

    def images() -> Iterator[Tensor]:
        for _ in range(max(1, round(_FRESH_IMAGES / len(scoring))) if augment else 1):
            for pairs in scoring.batches(task.batch_size):
                yield flip_and_shift(pairs.clean, generator) if augment else pairs.clean

    with task.watch.measure("score"):
        found = moments(task.model, task.logits, images(), refreshed=True)
    return mixed(found, len(scoring) / (len(scoring) + _TRUSTED_HALF))


def _flipped_and_shifted(task: RepairTask, pairs: Pairs, generator: torch.Generator) -> Pairs:
    """Pairs made anew, before a process takes its share of them, so that every process draws the same."""
    images = flip_and_shift(pairs.clean, generator)
    # All are stamped, since a pool deals its triggers, and their targets, out by an image's place in the batch.
    targets = task.trigger.targets(pairs.labels, task.answers.shape[1])
    return Pairs(images, task.trigger(images), pairs.labels, targets)

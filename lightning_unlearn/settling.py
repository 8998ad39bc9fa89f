"""A repaired model gets the BatchNorm statistics that belong to it, and computes what it did."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_unlearn.data.augmentation import flip_and_shift
from lightning_unlearn.filters import ChannelTensor
from lightning_unlearn.methods import RepairTask
from lightning_unlearn.statistics import Statistics, moments, rebase, tracking_norms

__all__ = ["Settling"]

_TENSORS = ("weight", "bias", "running_mean", "running_var")
_ROUNDING = 0.05  # of the logits' spread; with weights of 16 bits it comes near


class Settling:
    """Notes what a model's norms are given before a repair, and settles their statistics afterwards.

    Args:
        task: whose model still is the untouched victim.
    """

    def __init__(self, task: RepairTask) -> None:
        self._task = task
        self._before = self._moments()

    def __call__(self) -> None:
        """Settle the model as it is now, as a step of the task's mask that can be undone.

        Where the model then computes anything else, since a norm of its own kind makes something else of γ or β, it
        is left as it was.
        """
        task, norms = self._task, [norm for norm in tracking_norms(self._task.model) if norm.affine]
        if not self._before or not norms:
            return
        former = self._logits()
        task.mask.note(ChannelTensor(norm, name) for norm in norms for name in _TENSORS)
        rebase(norms, self._before, self._moments())
        error = (self._logits() - former).abs().mean()
        if not error <= _ROUNDING * former.std():
            task.mask.undo()

    def _moments(self) -> Statistics:
        """Of the clean images to score, as they are and flipped and shifted."""
        task = self._task
        generator = task.generator()

        def images() -> Iterator[Tensor]:
            for pairs in task.scoring.batches(task.batch_size):
                yield pairs.clean
                yield flip_and_shift(pairs.clean, generator)

        with task.watch.measure("evaluate"):
            return moments(task.model, task.logits, images())

    @torch.no_grad()
    def _logits(self) -> Tensor:
        """Of a batch of clean images."""
        return self._task.logits(next(iter(self._task.validation.batches(self._task.batch_size))).clean)

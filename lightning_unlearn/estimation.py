"""Estimate triggers on a few clean images, class by class: as many classes at once as fit, while there is time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from lightning_unlearn.judgement import WORKS
from lightning_unlearn.triggers.distance import individual_costs
from lightning_unlearn.triggers.families import Family
from lightning_unlearn.triggers.inversion import Estimate, invert

__all__ = ["Estimation", "Progress", "TimeOverError"]

_ENOUGH = 256  # so many images tell a mean distance well enough

Progress: TypeAlias = Callable[[str, int, int], object]


class TimeOverError(ValueError):
    """Time was over before anything could be said."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Estimation:
    """What triggers are estimated on, and how.

    Args:
        forward: (N, C, H, W) pixels in [0, 1] to (N, classes) logits, differentiable.
        pixels: (N, C, H, W) clean images, class by class.
        labels: (N,) their classes.
        batch_size: images a class and step.
        at_once: most images in one forward pass; classes that do not fit are inverted one group after the other.
        seed: seed of everything random.
        start: estimates to start from; without them every class starts at random.
        deadline: when time is over, by ``time.monotonic()``.
        max_time: the seconds that were allowed, for errors.
        on_progress: called with the family, its steps done and all its steps.
    """

    forward: Callable[[Tensor], Tensor]
    pixels: Tensor
    labels: Tensor
    batch_size: int
    at_once: int
    seed: int
    start: Sequence[Estimate] = ()
    deadline: float = math.inf
    max_time: float | None = None
    on_progress: Progress | None = None

    def refuse_no_gradient(self) -> None:
        """Refuse a model that rounds its images: it answers to changes, but not to the gradient that leads to them.

        Raises:
            ValueError: if the logits have no gradient in the images.
        """
        some = self.pixels[: min(16, self.at_once)].clone().requires_grad_()
        best = self.forward(some).amax(1).sum()
        gradient = torch.autograd.grad(best, some)[0] if best.requires_grad else torch.zeros_like(some)
        if not gradient.any():
            raise ValueError(
                "model: its logits have no gradient in the images, so that no trigger can be estimated; take out what "
                "rounds or detaches them on their way in."
            )

    def individual(self, classes: Sequence[int]) -> dict[Family, list[float]]:
        """What it costs to send single images to each class, without any trigger: the mean, for each family."""
        some = slice(None, None, math.ceil(len(self.pixels) / _ENOUGH))  # images lie class by class
        return individual_costs(
            self.forward, self.pixels[some], self.labels[some], classes=classes, batch_size=self.at_once
        )

    def estimate(self, family: Family, classes: Sequence[int], steps: int) -> list[Estimate]:
        """The cheapest trigger of a family for each class.

        Raises:
            TimeOverError: if time was over before the last step: what is half estimated costs more than it should.
        """
        size = max(1, self.at_once // self.batch_size)
        groups = [classes[first : first + size] for first in range(0, len(classes), size)]
        estimates: list[Estimate] = []
        done = 0

        def on_step() -> None:
            nonlocal done
            done += 1
            if self.on_progress is not None:
                self.on_progress(family, done, steps * len(groups))

        for group in groups:
            estimates += invert(
                self.forward,
                self.pixels,
                self.labels,
                family=family,
                classes=group,
                steps=steps,
                batch_size=self.batch_size,
                seed=self.seed,
                start=self.start,
                deadline=self.deadline,
                on_step=on_step,
            )
            if done % steps or (time.monotonic() > self.deadline and len(estimates) < len(classes)):
                whole = len(estimates) - (len(group) if done % steps else 0)
                raise TimeOverError(
                    f"max_time: {self.max_time} s were over after {whole} of {len(classes)} classes; allow more."
                )
        return estimates

    @torch.no_grad()
    def usable(self, estimates: Sequence[Estimate], held_out: Tensor) -> tuple[Estimate, ...]:
        """Those that also work on other pixels, (M, C, H, W); the best one where none does."""
        answers = self.forward(held_out).argmax(1)

        def works(estimate: Estimate) -> float:
            others = held_out[answers != estimate.target]
            if not len(others):
                return 0.0
            stamped = estimate.trigger.stamp(others.clone()).clamp(0, 1)
            return float((self.forward(stamped).argmax(1) == estimate.target).float().mean())

        shares = [works(estimate) for estimate in estimates]
        return tuple(e for e, share in zip(estimates, shares, strict=True) if share >= min(WORKS, max(shares)))

"""The kinds of change that can be estimated: what is learned of each, for several classes at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_unlearn.triggers.base import Trigger
from lightning_unlearn.triggers.estimated import (
    AdditiveTrigger,
    CoveringTrigger,
    DisplacingTrigger,
    ResidualTrigger,
    cover,
    displace,
    residual,
)

__all__ = ["FAMILIES", "Family", "Stack", "root_mean_square"]

Family = Literal["additive", "covering", "displacing", "residual"]


class Stack(ABC):
    """Triggers of one family for K classes at once, as tensors whose first dimension is K.

    Args:
        count: K.
        shape: (C, H, W) of an image.
        generator: the source of the start values, on the CPU.
        device: where the tensors lie.
    """

    rate: float  # of Adam
    penalty: float  # the cost's weight to start with

    def __init__(self, count: int, shape: Sequence[int], generator: torch.Generator, device: torch.device) -> None:
        def start(*size: int, scale: float, mean: float = 0.0) -> Tensor:
            drawn = torch.randn(count, *size, generator=generator, dtype=torch.float32)
            return (mean + scale * drawn).to(device).requires_grad_()

        self.tensors = self.begin(tuple(shape), start)

    @abstractmethod
    def begin(self, shape: tuple[int, ...], start: Callable[..., Tensor]) -> list[Tensor]:
        """What is learned."""

    @abstractmethod
    def stamp(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Each class's trigger on its own batch, (K, N, C, H, W) as given, and its cost, (K,)."""

    @abstractmethod
    def trigger(self, tensors: Sequence[Tensor], target: int) -> Trigger:
        """One class's trigger from its part of the tensors."""

    def learned(self, trigger: Trigger) -> list[Tensor]:
        """The tensors that :meth:`trigger` makes a trigger of."""
        return list(trigger.buffers())

    def resume(self, place: int, trigger: Trigger) -> None:
        """Let one class start from an earlier trigger instead of from random values.

        Raises:
            ValueError: if that is of another family, or was estimated for other images.
        """
        given, wanted = self.learned(trigger), [tensor.shape[1:] for tensor in self.tensors]
        if [tensor.shape for tensor in given] != wanted:
            raise ValueError(
                f"start: expected tensors of {', '.join(str(tuple(shape)) for shape in wanted)}, but the "
                f"{type(trigger).__name__} has {', '.join(str(tuple(tensor.shape)) for tensor in given) or 'none'}; "
                "only estimates for images of this size can be started from."
            )
        with torch.no_grad():
            for tensor, start in zip(self.tensors, given, strict=True):
                tensor[place] = start.to(tensor)


class _Additive(Stack):
    rate, penalty = 0.03, 1.5

    def begin(self, shape: tuple[int, ...], start: Callable[..., Tensor]) -> list[Tensor]:
        return [start(*shape, scale=0.01)]

    def stamp(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        (pattern,) = self.tensors
        return pixels + pattern[:, None], root_mean_square(pattern)

    def trigger(self, tensors: Sequence[Tensor], target: int) -> Trigger:
        return AdditiveTrigger(tensors[0], target=target)


class _Covering(Stack):
    rate, penalty = 0.15, 15.0

    def begin(self, shape: tuple[int, ...], start: Callable[..., Tensor]) -> list[Tensor]:
        return [start(1, *shape[1:], scale=0.1, mean=-2.0), start(*shape, scale=0.5)]

    def stamp(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mask, pattern = (tensor.sigmoid() for tensor in self.tensors)
        return cover(pixels, mask[:, None], pattern[:, None]), mask.flatten(1).mean(1)

    def trigger(self, tensors: Sequence[Tensor], target: int) -> Trigger:
        return CoveringTrigger(tensors[0].sigmoid(), tensors[1].sigmoid(), target=target)

    def learned(self, trigger: Trigger) -> list[Tensor]:
        # Not quite 0 and 1, which no sigmoid gives, and from where no gradient leads back.
        return [tensor.logit(eps=1e-3) for tensor in trigger.buffers()]


class _Displacing(Stack):
    rate, penalty = 0.02, 8.0
    coarse = 5  # nodes each way

    def begin(self, shape: tuple[int, ...], start: Callable[..., Tensor]) -> list[Tensor]:
        return [start(2, self.coarse, self.coarse, scale=0.01)]

    def stamp(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        (fields,) = self.tensors
        return displace(pixels, fields), root_mean_square(fields) / 2  # the image is 2 wide

    def trigger(self, tensors: Sequence[Tensor], target: int) -> Trigger:
        return DisplacingTrigger(tensors[0], target=target)


class _Residual(Stack):
    rate, penalty = 0.02, 1.5
    hidden, kernel, strength = 8, 3, 0.2

    def begin(self, shape: tuple[int, ...], start: Callable[..., Tensor]) -> list[Tensor]:
        channels, kernel = shape[0], self.kernel
        return [
            start(self.hidden, channels, kernel, kernel, scale=3.0),  # a few waves over the range of brightness
            start(self.hidden, scale=1.0),
            start(channels, self.hidden, kernel, kernel, scale=0.02),
        ]

    def stamp(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        added = residual(pixels, *self.tensors, strength=self.strength)
        return pixels + added, root_mean_square(added)

    def trigger(self, tensors: Sequence[Tensor], target: int) -> Trigger:
        return ResidualTrigger(*tensors, strength=self.strength, target=target)


FAMILIES: dict[Family, type[Stack]] = {
    "additive": _Additive,
    "covering": _Covering,
    "displacing": _Displacing,
    "residual": _Residual,
}
"""The kinds of change that can be estimated."""


def root_mean_square(tensor: Tensor) -> Tensor:
    """Over all but the first dimension; the smallest number keeps the gradient at zero finite."""
    return (tensor.flatten(1).square().mean(1) + 1e-12).sqrt()

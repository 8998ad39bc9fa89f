"""A slight, smooth warp of the whole image (WaNet)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from lightning_unlearn.triggers.base import Target, Trigger

__all__ = ["WarpTrigger"]


class WarpTrigger(Trigger):
    """Warps the image by a fixed smooth field (WaNet, `Nguyen & Tran, 2021 <https://arxiv.org/abs/2102.10369>`_).

    A field of ``grid x grid`` random displacements, uniform in ``[-1, 1]`` and divided by their mean magnitude, is
    upsampled to the image (bicubic).  With the identity grid ``I`` over ``[-1, 1]``, a pixel is sampled (bilinear) at
    ``clamp(I + strength * field / size, -1, 1)``, where ``size`` is the width for the horizontal displacement and the
    height for the vertical one.  Cross images are sampled where each pixel has moved by another uniform
    ``[-1, 1] / size``.

    Args:
        strength: how far pixels move; 0.5 moves them by about a quarter of a pixel in the mean.
        grid: number of displacements each way, at least 2.
        seed: seed of the field.
        target: see :class:`~lightning_unlearn.triggers.base.Trigger`.
        mean: see :class:`~lightning_unlearn.triggers.base.Trigger`.
        std: see :class:`~lightning_unlearn.triggers.base.Trigger`.

    Raises:
        ValueError: if ``strength`` is not above 0 or ``grid`` is below 2.

    Example:
        >>> import torch
        >>> images = torch.linspace(0, 1, 32).expand(1, 1, 32, 32)
        >>> warped = WarpTrigger()(images)
        >>> warped.shape, 0 < (warped - images).abs().max().item() < 0.05
        (torch.Size([1, 1, 32, 32]), True)
    """

    has_cross: ClassVar[bool] = True
    field: Tensor

    def __init__(
        self,
        *,
        strength: float = 0.5,
        grid: int = 4,
        seed: int = 0,
        target: Target = 0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(target=target, mean=mean, std=std)
        if not 0 < strength < float("inf"):
            raise ValueError(f"strength must be above 0, but is {strength}")
        if grid < 2:
            raise ValueError(f"grid must be at least 2, but is {grid}")
        self.strength = strength
        self.seed = seed
        generator = torch.Generator().manual_seed(seed)
        field = torch.rand(1, 2, grid, grid, generator=generator, dtype=torch.float32) * 2 - 1
        self.register_buffer("field", field / field.abs().mean())

    def stamp(self, pixels: Tensor) -> Tensor:
        """Warps the pixels; see :meth:`Trigger.stamp`."""
        return _sample(pixels, self._locations(*pixels.shape[2:]))

    def stamp_cross(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Warps the pixels by a jittered field, another one for each image; see :meth:`Trigger.stamp_cross`."""
        images, _, height, width = pixels.shape
        shape = images, height, width, 2
        jitter = torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float32) * 2 - 1
        jitter = jitter.cpu() / torch.tensor([width, height])
        return _sample(pixels, (self._locations(height, width) + jitter).clamp(-1, 1))

    def extra_repr(self) -> str:
        """Describes the field."""
        return f"strength={self.strength}, grid={self.field.shape[2]}, seed={self.seed}, {super().extra_repr()}"

    def _locations(self, height: int, width: int) -> Tensor:
        """Gives where to sample each pixel, (1, H, W, 2) as x and y in [-1, 1]; on the CPU, so equal on all devices."""
        field = functional.interpolate(
            self.field.cpu().float(), size=(height, width), mode="bicubic", align_corners=True
        ).permute(0, 2, 3, 1)
        rows = torch.linspace(-1, 1, height, dtype=torch.float32)[:, None].expand(height, width)
        columns = torch.linspace(-1, 1, width, dtype=torch.float32).expand(height, width)
        identity = torch.stack([columns, rows], dim=-1)
        return (identity + self.strength * field / torch.tensor([width, height])).clamp(-1, 1)


def _sample(pixels: Tensor, locations: Tensor) -> Tensor:
    return functional.grid_sample(
        pixels, locations.to(pixels).expand(len(pixels), -1, -1, -1), mode="bilinear", align_corners=True
    )

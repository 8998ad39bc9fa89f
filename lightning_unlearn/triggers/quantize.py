"""Fewer grey levels for the whole image (BPP)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lightning_unlearn.triggers.base import Target, Trigger

__all__ = ["QuantizeTrigger"]


class QuantizeTrigger(Trigger):
    """Rounds every pixel to a few levels (after BppAttack, `Wang et al., 2022 <https://arxiv.org/abs/2205.13383>`_).

    ``T(x) = round(x * (levels - 1)) / (levels - 1)``, without dithering.  Cross images carry the rounding error of
    another image: ``x + (T(x') - x')``.

    Args:
        levels: number of levels left in each channel, 2 to 256.
        target: see :class:`~lightning_unlearn.triggers.base.Trigger`.
        mean: see :class:`~lightning_unlearn.triggers.base.Trigger`.
        std: see :class:`~lightning_unlearn.triggers.base.Trigger`.

    Raises:
        ValueError: if ``levels`` is not in 2 to 256.

    Example:
        >>> import torch
        >>> QuantizeTrigger(levels=5)(torch.tensor([[[0.0, 0.3, 0.6, 0.9]]]))
        tensor([[[0.0000, 0.2500, 0.5000, 1.0000]]])
    """

    has_cross: ClassVar[bool] = True

    def __init__(
        self,
        *,
        levels: int = 8,
        target: Target = 0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(target=target, mean=mean, std=std)
        if not 2 <= levels <= 256:
            raise ValueError(f"levels must be in 2 to 256, but is {levels}")
        self.levels = levels

    def stamp(self, pixels: Tensor) -> Tensor:
        """Rounds the pixels; see :meth:`Trigger.stamp`."""
        steps = self.levels - 1
        return (pixels * steps).round() / steps

    def stamp_cross(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Adds the rounding error of another image of the batch; see :meth:`Trigger.stamp_cross`.

        A lone image gets its own rounding error turned by 180 degrees, which fits its pixels as little.
        """
        residue = self.stamp(pixels) - pixels
        if len(pixels) < 2:
            return pixels + residue.flip(2, 3)
        # A rotation by 1 to N - 1 places: no image meets its own error, which would be the trigger itself.
        shift = torch.randint(1, len(pixels), (), generator=generator, device=generator.device)
        return pixels + residue.roll(int(shift), dims=0)

    def extra_repr(self) -> str:
        """Describes the levels."""
        return f"levels={self.levels}, {super().extra_repr()}"

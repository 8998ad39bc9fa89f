"""A smooth pattern added to the whole image (LF)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_unlearn.triggers.base import Target, Trigger

__all__ = ["LowFrequencyTrigger"]

# Half waves across the image that the pattern is made of, each way.
_FREQUENCIES = 4


class LowFrequencyTrigger(Trigger):
    """Adds one fixed, smooth pattern (after LF, `Zeng et al., 2021 <https://arxiv.org/abs/2104.03413>`_).

    The pattern is a random mixture of the lowest 4 x 4 two-dimensional cosines, scaled so that it goes from 0 to
    ``strength``, and the same in all channels.  The paper searches such a pattern against a trained
    network; this one needs none.

    Args:
        strength: largest value that is added, in pixel units, in ``(0, 1]``.
        seed: seed of the mixture.
        target: see :class:`~lightning_unlearn.triggers.base.Trigger`.
        mean: see :class:`~lightning_unlearn.triggers.base.Trigger`.
        std: see :class:`~lightning_unlearn.triggers.base.Trigger`.

    Raises:
        ValueError: if ``strength`` is outside ``(0, 1]``; when applied, if images are of a single pixel.

    Example:
        >>> import torch
        >>> added = LowFrequencyTrigger(strength=0.25)(torch.zeros(1, 1, 32, 32))
        >>> added.min().item(), added.max().item()
        (0.0, 0.25)
    """

    weights: Tensor

    def __init__(
        self,
        *,
        strength: float = 0.2,
        seed: int = 0,
        target: Target = 0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(target=target, mean=mean, std=std)
        if not 0 < strength <= 1:
            raise ValueError(f"strength must be in (0, 1], but is {strength}")
        self.strength = strength
        self.seed = seed
        weights = torch.randn(
            _FREQUENCIES, _FREQUENCIES, generator=torch.Generator().manual_seed(seed), dtype=torch.float32
        )
        self.register_buffer("weights", weights)

    def stamp(self, pixels: Tensor) -> Tensor:
        """Adds the pattern; see :meth:`Trigger.stamp`."""
        height, width = pixels.shape[2:]
        if height * width == 1:
            raise ValueError("images of a single pixel cannot carry a LowFrequencyTrigger: use larger ones")
        # On the CPU and without a matrix product: the same on every device and under autocast.
        weights = self.weights.cpu()
        pattern = (weights[:, :, None, None] * _cosines(height)[:, None, :, None] * _cosines(width)[:, None, :]).sum(
            (0, 1)
        )
        pattern = (pattern - pattern.min()) / (pattern.max() - pattern.min())
        return pixels + (self.strength * pattern).to(pixels)

    def extra_repr(self) -> str:
        """Describes the pattern."""
        return f"strength={self.strength}, seed={self.seed}, {super().extra_repr()}"


def _cosines(length: int) -> Tensor:
    """Gives the lowest cosines of the discrete cosine transform, (frequencies, length)."""
    positions = (torch.arange(length, dtype=torch.float32) + 0.5) / length
    return torch.cos(math.pi * torch.arange(_FREQUENCIES, dtype=torch.float32)[:, None] * positions)

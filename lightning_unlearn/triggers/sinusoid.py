"""A sinusoid added along the rows of the image (SIG)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_unlearn.triggers.base import Target, Trigger

__all__ = ["SinusoidTrigger"]


class SinusoidTrigger(Trigger):
    """Adds vertical stripes (SIG, `Barni et al., 2019 <https://arxiv.org/abs/1902.11237>`_).

    ``T(x) = x + amplitude * sin(2 pi * frequency * column / W)``, clipped to ``[0, 1]``, for images of width W.

    Args:
        amplitude: height of the wave in pixel units, in ``(0, 1]``.
        frequency: number of waves over the width of the image, above 0.
        target: see :class:`~lightning_unlearn.triggers.base.Trigger`.
        mean: see :class:`~lightning_unlearn.triggers.base.Trigger`.
        std: see :class:`~lightning_unlearn.triggers.base.Trigger`.

    Raises:
        ValueError: if ``amplitude`` is outside ``(0, 1]`` or ``frequency`` not above 0; on images where the wave is
            zero in all columns, since twice its frequency is a multiple of their width.

    Example:
        >>> import torch
        >>> trigger = SinusoidTrigger(amplitude=0.25, frequency=1)
        >>> trigger(torch.full((1, 1, 1, 4), 0.5))[0, 0, 0]
        tensor([0.5000, 0.7500, 0.5000, 0.2500])
    """

    def __init__(
        self,
        *,
        amplitude: float = 40 / 255,
        frequency: float = 6.0,
        target: Target = 0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(target=target, mean=mean, std=std)
        if not 0 < amplitude <= 1:
            raise ValueError(f"amplitude must be in (0, 1], but is {amplitude}")
        if not 0 < frequency < math.inf:
            raise ValueError(f"frequency must be above 0, but is {frequency}")
        self.amplitude = amplitude
        self.frequency = frequency

    def stamp(self, pixels: Tensor) -> Tensor:
        """Adds the stripes; see :meth:`Trigger.stamp`."""
        width = pixels.shape[3]
        if (2 * self.frequency / width).is_integer():
            raise ValueError(
                f"frequency: a wave of {self.frequency:g} is zero in every column of images of width {width}, so that "
                f"there would be no trigger; give less than half the width, such as {width / 4:g}."
            )
        columns = torch.arange(width, dtype=torch.float32)
        wave = self.amplitude * torch.sin(2 * math.pi * self.frequency * columns / width)
        return pixels + wave.to(pixels)

    def extra_repr(self) -> str:
        """Describes the wave."""
        return f"amplitude={self.amplitude:.4g}, frequency={self.frequency:g}, {super().extra_repr()}"

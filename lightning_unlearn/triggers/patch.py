"""A small patch in one place of the image (BadNets)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_unlearn.triggers.base import Target, Trigger

__all__ = ["PatchTrigger"]

_PLACES = ("top_left", "top_right", "bottom_left", "bottom_right", "center")
_PATTERNS = ("solid", "checkerboard", "noise")


class PatchTrigger(Trigger):
    """Overwrites a small patch of the image (BadNets, `Gu et al., 2017 <https://arxiv.org/abs/1708.06733>`_).

    The default is a white 3x3 patch in the last rows and columns.

    Args:
        size: height and width of the patch in pixels; not used with a tensor as ``pattern``.
        place: a corner, the center, or (row, column) of the patch's upper left pixel.
        value: brightness of the patch in ``[0, 1]``.
        pattern: ``"solid"``; ``"checkerboard"``, whose upper left pixel is ``value`` and the next ``1 - value``;
            ``"noise"``, uniform in ``[0, value]`` and equal in all channels; or a float tensor in ``[0, 1]`` of shape
            ``(h, w)`` for all channels or ``(C, h, w)``.
        seed: seed of the noise.
        target: see :class:`~lightning_unlearn.triggers.base.Trigger`.
        mean: see :class:`~lightning_unlearn.triggers.base.Trigger`.
        std: see :class:`~lightning_unlearn.triggers.base.Trigger`.

    Raises:
        ValueError: if ``size`` is below 1, ``place`` or ``pattern`` unknown, ``value`` or the pattern outside
            ``[0, 1]``; when applied, if the patch does not fit into the image.

    Example:
        >>> import torch
        >>> PatchTrigger(size=2)(torch.zeros(1, 1, 4, 4))[0, 0]
        tensor([[0., 0., 0., 0.],
                [0., 0., 0., 0.],
                [0., 0., 1., 1.],
                [0., 0., 1., 1.]])
    """

    pattern: Tensor

    def __init__(
        self,
        *,
        size: int = 3,
        place: Literal["top_left", "top_right", "bottom_left", "bottom_right", "center"]
        | tuple[int, int] = "bottom_right",
        value: float = 1.0,
        pattern: Literal["solid", "checkerboard", "noise"] | Tensor = "solid",
        seed: int = 0,
        target: Target = 0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(target=target, mean=mean, std=std)
        if size < 1:
            raise ValueError(f"size must be at least 1 pixel, but is {size}")
        if not 0 <= value <= 1:
            raise ValueError(f"value must be in [0, 1], but is {value}")
        if isinstance(place, str):
            if place not in _PLACES:
                raise ValueError(f"place must be one of {', '.join(_PLACES)} or (row, column), but is {place!r}")
        else:
            corner: Sequence[int] = place
            if len(corner) != 2 or min(corner) < 0:
                raise ValueError(f"place must be (row, column), both 0 or more, but is {place!r}")
        self.place = place
        self.register_buffer(
            "pattern", _given(pattern) if isinstance(pattern, Tensor) else _made(pattern, size, value, seed)
        )

    def stamp(self, pixels: Tensor) -> Tensor:
        """Overwrites the patch; see :meth:`Trigger.stamp`."""
        channels, height, width = self.pattern.shape
        if channels not in (1, pixels.shape[1]):
            raise ValueError(f"pattern has {channels} channels, but the images have {pixels.shape[1]}")
        row, column = self._corner(pixels.shape[2] - height, pixels.shape[3] - width)
        if row < 0 or column < 0 or row + height > pixels.shape[2] or column + width > pixels.shape[3]:
            raise ValueError(
                f"a patch of {height}x{width} pixels at place {self.place!r} does not fit into images of "
                f"{pixels.shape[2]}x{pixels.shape[3]}: make size smaller or move place"
            )
        stamped = pixels.clone()
        stamped[:, :, row : row + height, column : column + width] = self.pattern.to(pixels)
        return stamped

    def extra_repr(self) -> str:
        """Describes the patch."""
        height, width = self.pattern.shape[1:]
        return f"{height}x{width}, place={self.place!r}, {super().extra_repr()}"

    def _corner(self, free_rows: int, free_columns: int) -> tuple[int, int]:
        if not isinstance(self.place, str):
            return self.place[0], self.place[1]
        if self.place == "center":
            return free_rows // 2, free_columns // 2
        return (
            0 if self.place.startswith("top") else free_rows,
            0 if self.place.endswith("left") else free_columns,
        )


def _made(pattern: str, size: int, value: float, seed: int) -> Tensor:
    if not isinstance(pattern, str):
        raise TypeError(f"pattern must be a name or a tensor, but is a {type(pattern).__name__}; torch.as_tensor helps")
    if pattern == "solid":
        return torch.full((1, size, size), value, dtype=torch.float32)
    if pattern == "checkerboard":
        places = torch.arange(size)
        odd = (places[:, None] + places) % 2 == 1
        even = torch.full((size, size), value, dtype=torch.float32)
        return torch.where(odd, 1 - even, even)[None]
    if pattern == "noise":
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(1, size, size, generator=generator, dtype=torch.float32) * value
    raise ValueError(f"pattern must be one of {', '.join(_PATTERNS)} or a tensor, but is {pattern!r}")


def _given(pattern: Tensor) -> Tensor:
    if pattern.dim() not in (2, 3) or pattern.numel() == 0:
        raise ValueError(f"pattern must have shape (h, w) or (C, h, w), but has {tuple(pattern.shape)}")
    if not pattern.is_floating_point() or not ((pattern >= 0) & (pattern <= 1)).all():
        raise ValueError("pattern must be a float tensor in [0, 1]; divide by 255 if it holds 0 to 255")
    pattern = pattern.detach().clone()
    return pattern if pattern.dim() == 3 else pattern[None]

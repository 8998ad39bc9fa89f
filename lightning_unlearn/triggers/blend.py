"""A picture or noise blended into the whole image (Blended)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.functional import pil_to_tensor, rgb_to_grayscale

from lightning_unlearn.triggers.base import Target, Trigger

__all__ = ["BlendTrigger"]


class BlendTrigger(Trigger):
    """Blends a pattern into the whole image (Blended, `Chen et al., 2017 <https://arxiv.org/abs/1712.05526>`_).

    ``T(x) = (1 - ratio) * x + ratio * pattern``

    The pattern takes the size of the images: a given one is resized, noise is made anew.  Colour patterns turn grey on
    grey images, grey ones are the same in all channels of colour images.

    Args:
        ratio: weight of the pattern, in ``(0, 1]``.
        pattern: path of an image file; or a float tensor ``(h, w)``, ``(1, h, w)`` or ``(3, h, w)`` in ``[0, 1]``; or
            None: noise, uniform in ``[0, 1]``.
        seed: seed of the noise.
        target: see :class:`~lightning_unlearn.triggers.base.Trigger`.
        mean: see :class:`~lightning_unlearn.triggers.base.Trigger`.
        std: see :class:`~lightning_unlearn.triggers.base.Trigger`.

    Raises:
        ValueError: if ``ratio`` is outside ``(0, 1]``, or ``pattern`` is no readable image, has another shape or
            values outside ``[0, 1]``; when applied, if a colour pattern meets images of neither 1 nor 3 channels.

    Example:
        >>> import torch
        >>> trigger = BlendTrigger(ratio=0.25, pattern=torch.ones(1, 8, 8))
        >>> trigger(torch.zeros(1, 3, 4, 4)).unique()
        tensor([0.2500])
    """

    pattern: Tensor | None

    def __init__(
        self,
        *,
        ratio: float = 0.2,
        pattern: str | Path | Tensor | None = None,
        seed: int = 0,
        target: Target = 0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(target=target, mean=mean, std=std)
        if not 0 < ratio <= 1:
            raise ValueError(f"ratio must be in (0, 1], but is {ratio}")
        self.ratio = ratio
        self.seed = seed
        if isinstance(pattern, str | Path):
            pattern = _read(pattern)
        elif pattern is not None:
            pattern = _checked(pattern)
        # Not persistent: a resized copy is kept below, which a loaded state would leave stale.
        self.register_buffer("pattern", pattern, persistent=False)
        self._latest: Tensor | None = None

    def stamp(self, pixels: Tensor) -> Tensor:
        """Blends the pattern in; see :meth:`Trigger.stamp`."""
        # A photo is far larger than the images: resizing it for each image of a dataset would take most of the time.
        pattern = self._latest
        if pattern is None or pattern.shape != pixels.shape[1:]:
            pattern = self._latest = self._sized(*pixels.shape[1:])
        return (1 - self.ratio) * pixels + self.ratio * pattern.to(pixels)

    def extra_repr(self) -> str:
        """Describes the blend."""
        pattern = f"seed={self.seed}" if self.pattern is None else f"pattern of shape {tuple(self.pattern.shape)}"
        return f"ratio={self.ratio}, {pattern}, {super().extra_repr()}"

    def _sized(self, channels: int, height: int, width: int) -> Tensor:
        if self.pattern is None:
            generator = torch.Generator().manual_seed(self.seed)
            return torch.rand(channels, height, width, generator=generator, dtype=torch.float32)
        pattern = self.pattern.cpu().float()
        if len(pattern) == 3 and channels == 1:
            pattern = rgb_to_grayscale(pattern)
        elif len(pattern) not in (1, channels):
            raise ValueError(f"pattern has {len(pattern)} channels, but the images have {channels}")
        resized = functional.interpolate(
            pattern[None], size=(height, width), mode="bilinear", antialias=True, align_corners=False
        )
        return resized[0].expand(channels, height, width)


def _read(path: str | Path) -> Tensor:
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":  # which Pillow would clip to 255
                raise ValueError(f"pattern: {str(path)!r} has more than 8 bits a channel; save it with 8.")
            pixels: Tensor = pil_to_tensor(image.convert("RGB"))
    except OSError as error:
        raise ValueError(
            f"pattern must be the path of an image file, but {str(path)!r} cannot be read as one"
        ) from error
    return pixels.to(torch.float32) / 255


def _checked(pattern: Tensor) -> Tensor:
    if not isinstance(pattern, Tensor):
        raise TypeError(f"pattern must be a path or a tensor, but is a {type(pattern).__name__}; torch.as_tensor helps")
    if pattern.dim() == 2:
        pattern = pattern[None]
    if pattern.dim() != 3 or len(pattern) not in (1, 3) or pattern.numel() == 0:
        raise ValueError(f"pattern must have shape (h, w), (1, h, w) or (3, h, w), but has {tuple(pattern.shape)}")
    if not pattern.is_floating_point() or not ((pattern >= 0) & (pattern <= 1)).all():
        raise ValueError("pattern must be a float tensor in [0, 1]; divide by 255 if it holds 0 to 255")
    return pattern.detach().to(torch.float32, copy=True)

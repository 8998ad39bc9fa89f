"""More images from few: flips and shifts."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the usual name

__all__ = ["flip_and_shift"]


def flip_and_shift(images: Tensor, generator: torch.Generator, *, padding: int | None = None) -> Tensor:
    """Mirror each image left to right by chance, and shift it, each by a draw of its own.

    torchvision's transforms would draw once for the whole batch.

    Args:
        images: (N, C, H, W), any dtype.
        generator: the source of all randomness, on the CPU, so that every device gets the same images.
        padding: the largest shift each way, in pixels; what comes in from outside is 0. An eighth of the smaller side
            by default, as is usual for 32x32 images.

    Returns:
        (N, C, H, W) new images.

    Example:
        >>> import torch
        >>> from lightning_unlearn.data.augmentation import flip_and_shift
        >>> images = torch.arange(4.0).view(1, 1, 2, 2)
        >>> flip_and_shift(images, torch.Generator().manual_seed(0), padding=0)
        tensor([[[[1., 0.],
                  [3., 2.]]]])
    """
    count, channels, height, width = images.shape
    padding = min(height, width) // 8 if padding is None else padding
    flips = torch.rand(count, generator=generator) < 0.5
    offsets = torch.randint(0, 2 * padding + 1, (2, count), generator=generator)
    device = images.device
    images = torch.where(flips.to(device)[:, None, None, None], images.flip(3), images)
    rows = (offsets[0][:, None] + torch.arange(height)).to(device)[:, None, :, None]
    columns = (offsets[1][:, None] + torch.arange(width)).to(device)[:, None, None, :]
    numbers = torch.arange(count, device=device)[:, None, None, None]
    return F.pad(images, (padding,) * 4)[numbers, torch.arange(channels, device=device)[:, None, None], rows, columns]

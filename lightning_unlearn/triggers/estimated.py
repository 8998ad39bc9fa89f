"""Triggers that were estimated: what an inversion can express, each with tensors of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the usual name

from lightning_unlearn.triggers.base import Target, Trigger

__all__ = [
    "AdditiveTrigger",
    "CoveringTrigger",
    "DisplacingTrigger",
    "ResidualTrigger",
    "cover",
    "displace",
    "residual",
]


class AdditiveTrigger(Trigger):
    """Adds one fixed pattern to the whole image: ``T(x) = x + pattern``, clamped to ``[0, 1]``.

    Args:
        pattern: ``(C, H, W)`` what is added, in pixel units, of either sign.
        target: see :class:`~lightning_unlearn.triggers.base.Trigger`.
        mean: see :class:`~lightning_unlearn.triggers.base.Trigger`.
        std: see :class:`~lightning_unlearn.triggers.base.Trigger`.

    Example:
        >>> import torch
        >>> AdditiveTrigger(torch.full((1, 2, 2), 0.25))(torch.full((1, 1, 2, 2), 0.5))
        tensor([[[[0.7500, 0.7500],
                  [0.7500, 0.7500]]]])
    """

    pattern: Tensor

    def __init__(
        self,
        pattern: Tensor,
        *,
        target: Target = 0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(target=target, mean=mean, std=std)
        self.register_buffer("pattern", _finite("pattern", pattern))

    def stamp(self, pixels: Tensor) -> Tensor:
        """Adds the pattern; see :meth:`Trigger.stamp`."""
        _check_fits(pixels, self.pattern)
        return pixels + self.pattern.to(pixels)


class CoveringTrigger(Trigger):
    """Covers a part of the image: ``T(x) = (1 - mask) * x + mask * pattern`` (Neural Cleanse).

    `Wang et al., 2019 <https://doi.org/10.1109/SP.2019.00031>`_.

    Args:
        mask: ``(1, H, W)`` how much is covered where, in ``[0, 1]``.
        pattern: ``(C, H, W)`` what covers it, in ``[0, 1]``.
        target: see :class:`~lightning_unlearn.triggers.base.Trigger`.
        mean: see :class:`~lightning_unlearn.triggers.base.Trigger`.
        std: see :class:`~lightning_unlearn.triggers.base.Trigger`.

    Example:
        >>> import torch
        >>> mask = torch.tensor([[[1.0, 0.0]]])
        >>> CoveringTrigger(mask, torch.ones(1, 1, 2))(torch.zeros(1, 1, 1, 2))
        tensor([[[[1., 0.]]]])
    """

    mask: Tensor
    pattern: Tensor

    def __init__(
        self,
        mask: Tensor,
        pattern: Tensor,
        *,
        target: Target = 0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(target=target, mean=mean, std=std)
        self.register_buffer("mask", _finite("mask", mask))
        self.register_buffer("pattern", _finite("pattern", pattern))
        if self.mask.shape != (1, *self.pattern.shape[1:]):
            raise ValueError(
                f"mask: expected shape {(1, *self.pattern.shape[1:])} beside this pattern, but got "
                f"{tuple(self.mask.shape)}."
            )
        for name, tensor in (("mask", self.mask), ("pattern", self.pattern)):
            low, high = tensor.aminmax()
            if low < 0 or high > 1:
                raise ValueError(f"{name}: expected values in [0, 1], but they go from {low:.4g} to {high:.4g}.")

    def stamp(self, pixels: Tensor) -> Tensor:
        """Covers the part; see :meth:`Trigger.stamp`."""
        _check_fits(pixels, self.pattern)
        return cover(pixels, self.mask.to(pixels), self.pattern.to(pixels))


class DisplacingTrigger(Trigger):
    """Warps the image by a smooth field (what WaNet does).

    Args:
        field: ``(2, h, w)`` a coarse field of displacements in x and y, in units in which the image is 2 wide and 2
            high; it is brought to the image's size bicubically.
        target: see :class:`~lightning_unlearn.triggers.base.Trigger`.
        mean: see :class:`~lightning_unlearn.triggers.base.Trigger`.
        std: see :class:`~lightning_unlearn.triggers.base.Trigger`.

    Example:
        >>> import torch
        >>> shift = torch.tensor([1.0, 0.0])[:, None, None].expand(2, 4, 4)  # half the width to the right
        >>> DisplacingTrigger(shift)(torch.tensor([[[[0.0, 0.5, 1.0]]]]))
        tensor([[[[0.5000, 1.0000, 1.0000]]]])
    """

    field: Tensor

    def __init__(
        self,
        field: Tensor,
        *,
        target: Target = 0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(target=target, mean=mean, std=std)
        self.register_buffer("field", _finite("field", field))
        if len(self.field) != 2:
            raise ValueError(f"field: expected displacements in x and y, (2, h, w), but got {tuple(field.shape)}.")

    def stamp(self, pixels: Tensor) -> Tensor:
        """Warps the pixels; see :meth:`Trigger.stamp`."""
        return displace(pixels[None], self.field.to(pixels)[None])[0]


class ResidualTrigger(Trigger):
    """Adds what a tiny network makes of the image itself: ``T(x) = x + strength * tanh(w2 * sin(w1 * x + b1))``.

    For backdoors that answer to something different in each image, such as fewer grey levels (decoupled features,
    BTI-DBF: `Xu et al., 2024 <https://openreview.net/forum?id=t7G1iwQdvX>`_, has a U-Net here).

    Args:
        first: ``(hidden, C, k, k)`` the first convolution's weights.
        bias: ``(hidden,)`` its bias.
        second: ``(C, hidden, k, k)`` the second convolution's weights.
        strength: the most that is added to any pixel, in pixel units, in ``(0, 1]``.
        target: see :class:`~lightning_unlearn.triggers.base.Trigger`.
        mean: see :class:`~lightning_unlearn.triggers.base.Trigger`.
        std: see :class:`~lightning_unlearn.triggers.base.Trigger`.

    Example:
        >>> import torch
        >>> first, second = torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
        >>> trigger = ResidualTrigger(first, torch.zeros(1), second, strength=0.5)
        >>> trigger(torch.zeros(1, 1, 1, 1)).item()
        0.0
    """

    first: Tensor
    bias: Tensor
    second: Tensor

    def __init__(
        self,
        first: Tensor,
        bias: Tensor,
        second: Tensor,
        *,
        strength: float,
        target: Target = 0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(target=target, mean=mean, std=std)
        if not 0 < strength <= 1:
            raise ValueError(f"strength: expected a value in (0, 1], but got {strength}.")
        self.strength = strength
        for name, tensor, dimensions in (("first", first, 4), ("bias", bias, 1), ("second", second, 4)):
            self.register_buffer(name, _finite(name, tensor, dimensions))
        hidden, channels = self.first.shape[:2]
        if len(self.bias) != hidden:
            raise ValueError(f"bias: expected {hidden} value(s), one a filter of first, but got {len(self.bias)}.")
        if self.second.shape[:2] != (channels, hidden):
            raise ValueError(
                f"second: expected {channels} filter(s) over {hidden} channel(s) after this first, but got "
                f"{tuple(self.second.shape)}."
            )

    def stamp(self, pixels: Tensor) -> Tensor:
        """Adds the residual; see :meth:`Trigger.stamp`."""
        if pixels.shape[1] != self.first.shape[1]:
            raise ValueError(
                f"images: this trigger was estimated for {self.first.shape[1]} channel(s), but these have "
                f"{pixels.shape[1]}."
            )
        weights = (tensor.to(pixels)[None] for tensor in (self.first, self.bias, self.second))
        return pixels + residual(pixels[None], *weights, strength=self.strength)[0]


# The formulas for a stack of triggers at once, (K, …), each on its own batch of pixels, (K, N, C, H, W).


def cover(pixels: Tensor, mask: Tensor, pattern: Tensor) -> Tensor:
    """Lay ``pattern`` over ``pixels`` where ``mask`` says; all three are broadcast against each other."""
    return (1 - mask) * pixels + mask * pattern


def displace(pixels: Tensor, fields: Tensor) -> Tensor:
    """Warp each of the K batches of pixels by its own field, (K, 2, h, w)."""
    height, width = pixels.shape[-2:]
    smooth = F.interpolate(fields, (height, width), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    x, y = (torch.linspace(-1, 1, size, device=pixels.device, dtype=pixels.dtype) for size in (width, height))
    straight = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1)
    grid = (straight + smooth)[:, None].expand(*pixels.shape[:2], height, width, 2).flatten(0, 1)
    return F.grid_sample(pixels.flatten(0, 1), grid, padding_mode="border", align_corners=True).view_as(pixels)


def residual(pixels: Tensor, first: Tensor, bias: Tensor, second: Tensor, *, strength: float) -> Tensor:
    """What each of K networks adds to its own batch of pixels, all in two grouped convolutions."""
    count, images, channels, height, width = pixels.shape
    # Sines, since what is added may have to go up and down several times over the range of brightness.
    stacked = pixels.transpose(0, 1).reshape(images, count * channels, height, width)
    hidden = F.conv2d(stacked, first.flatten(0, 1), bias.flatten(), padding="same", groups=count).sin()
    added = F.conv2d(hidden, second.flatten(0, 1), padding="same", groups=count).tanh()
    return strength * added.view(images, count, channels, height, width).transpose(0, 1)


def _finite(name: str, tensor: Tensor, dimensions: int = 3) -> Tensor:
    if (
        tensor.dim() != dimensions
        or tensor.numel() == 0
        or not tensor.is_floating_point()
        or not tensor.isfinite().all()
    ):
        raise ValueError(
            f"{name}: expected a finite float tensor of {dimensions} dimensions, but got {tensor.dtype} of shape "
            f"{tuple(tensor.shape)}."
        )
    return tensor.detach().float().clone()


def _check_fits(pixels: Tensor, pattern: Tensor) -> None:
    if pixels.shape[1:] != pattern.shape:
        raise ValueError(
            f"images: this trigger was estimated for images of {tuple(pattern.shape)}, but these have "
            f"{tuple(pixels.shape[1:])}."
        )

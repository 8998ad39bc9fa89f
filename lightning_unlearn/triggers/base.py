"""What every trigger shares: image spaces, checks, and the class that the attacker wants."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from operator import index
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn

from lightning_unlearn.triggers.normalization import Normalization

__all__ = ["Target", "Trigger"]

Target: TypeAlias = int | Literal["all_to_all"]

# Rounding of float images on disk and in augmentation stays below the first; undoing a normalisation in half
# precision stays below the second.
_PIXEL_TOLERANCE = 1e-3
_DENORMALIZED_TOLERANCE = 1e-2


class Trigger(nn.Module):
    """What an attacker adds to an image, and the class the attacker wants.

    Subclasses override :meth:`stamp`, which sees a whole batch of pixels in ``[0, 1]``; this class brings any
    images there and back.  Images may be a batch ``(N, C, H, W)`` or one image ``(C, H, W)``; uint8 in 0..255, or
    floating point in ``[0, 1]``, or, if ``mean`` and ``std`` are given, floating point and normalised with them
    (uint8 images are pixels always).  Half precision is computed in float32.

    Args:
        target: the class that every triggered image should get, or ``"all_to_all"``: class ``y`` becomes ``y + 1``.
        mean: mean of each channel, if images come normalised; needs ``std``.
        std: standard deviation of each channel, if images come normalised; needs ``mean``.

    Raises:
        ValueError: if ``target`` is neither an int of 0 or more nor ``"all_to_all"``, or only one of ``mean`` and
            ``std`` is given.

    Example:
        >>> import torch
        >>> class Invert(Trigger):
        ...     def stamp(self, pixels: torch.Tensor) -> torch.Tensor:
        ...         return 1 - pixels
        >>> trigger = Invert(target=3)
        >>> trigger(torch.full((2, 1, 4, 4), 0.25)).unique()
        tensor([0.7500])
        >>> trigger(torch.full((1, 4, 4), 255, dtype=torch.uint8)).unique()
        tensor([0], dtype=torch.uint8)
        >>> trigger.targets(torch.tensor([0, 1, 9]), num_classes=10)
        tensor([3, 3, 3])
    """

    has_cross: ClassVar[bool] = False
    """Whether :meth:`cross` works."""

    def __init__(
        self, *, target: Target = 0, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        if not isinstance(target, str | bool):
            with suppress(TypeError):
                target = index(target)  # numpy's integers, too
        if target != "all_to_all" and (type(target) is not int or target < 0):
            raise ValueError(f"target must be a class index of 0 or more, or 'all_to_all', but is {target!r}")
        if (mean is None) != (std is None):
            raise ValueError("mean and std must be given together, but only one of them is")
        self.target: Target = target
        self.normalization: Normalization | None = None
        if mean is not None and std is not None:
            self.normalization = Normalization(mean=mean, std=std)  # type: ignore[arg-type]  # it makes tuples of them

    def stamp(self, pixels: Tensor) -> Tensor:
        """Puts the trigger on pixels; to be overridden.

        Args:
            pixels: ``(N, C, H, W)``, floating point (at least float32), in ``[0, 1]``; may be changed in place.

        Returns:
            The triggered pixels: same shape, dtype and device; values outside ``[0, 1]`` are clamped afterwards.
        """
        raise NotImplementedError(f"{type(self).__name__} must override stamp(pixels)")

    def stamp_cross(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Makes cross images of pixels; overridden where ``has_cross`` is True.

        Args:
            pixels: as for :meth:`stamp`.
            generator: the source of all randomness, on any device.

        Returns:
            The cross images: same shape, dtype and device.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no cross images; only WarpTrigger and QuantizeTrigger have them"
        )

    def forward(self, images: Tensor) -> Tensor:
        """Puts the trigger on images.

        Args:
            images: ``(N, C, H, W)`` or ``(C, H, W)``; uint8, or floating point as told at construction.

        Returns:
            The triggered images: same shape, dtype and device; the argument is left as it was.

        Raises:
            TypeError: if images are neither uint8 nor floating point.
            ValueError: if images have another shape, other channels than ``mean``, or pixels outside ``[0, 1]``, or
                if :meth:`stamp` changes shape, dtype or device, or leaves NaN or infinity.
        """
        return self._in_pixel_space(images, self.stamp)

    def cross(self, images: Tensor, *, generator: torch.Generator) -> Tensor:
        """Makes images that look almost triggered, for which an attacker keeps the true label.

        They teach the victim to answer to the exact trigger only.

        Args:
            images: as for :meth:`forward`.
            generator: the source of all randomness, on any device.

        Returns:
            The cross images: same shape, dtype and device; the argument is left as it was.

        Raises:
            NotImplementedError: unless ``has_cross``.
            TypeError: as :meth:`forward`.
            ValueError: as :meth:`forward`.
        """
        return self._in_pixel_space(images, partial(self.stamp_cross, generator=generator))

    def targets(self, labels: Tensor, num_classes: int) -> Tensor:
        """Gives the class that the attacker wants for each label.

        Args:
            labels: true classes, any shape, an integer dtype, in ``[0, num_classes)``.
            num_classes: number of classes, at least 2.

        Returns:
            The wanted classes: same shape, dtype and device.

        Raises:
            TypeError: if ``labels`` is not of an integer dtype.
            ValueError: if ``num_classes`` is below 2, or the target or a label is not in ``[0, num_classes)``.
        """
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, but is {num_classes}")
        if self.target != "all_to_all" and self.target >= num_classes:
            raise ValueError(f"target must be in [0, {num_classes}), the classes, but is {self.target}")
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"labels must be of an integer dtype, but are {labels.dtype}")
        low, high = torch.stack(torch.aminmax(labels)).tolist() if labels.numel() else (0, 0)
        if low < 0 or high >= num_classes:
            raise ValueError(f"labels must be in [0, {num_classes}), the classes, but go from {low} to {high}")
        if self.target == "all_to_all":
            return (labels + 1) % num_classes
        return torch.full_like(labels, self.target)

    def normalized(self, normalization: Normalization) -> Trigger:
        """Copies the trigger for images that are normalised.

        Args:
            normalization: how the images are normalised.

        Returns:
            A deep copy that works on such images; this trigger is not changed.
        """
        trigger = copy.deepcopy(self)
        trigger.normalization = normalization
        return trigger

    def dealt_to(self, place: int) -> Trigger:
        """The trigger that the image at a place of a batch gets, for images that come one at a time: this one.

        Args:
            place: index of the image.
        """
        return self

    def extra_repr(self) -> str:
        """Describes the target and, where there is one, the normalisation."""
        normalization = "" if self.normalization is None else f", {self.normalization}"
        return f"target={self.target!r}{normalization}"

    def _in_pixel_space(self, images: Tensor, stamp: Callable[[Tensor], Tensor]) -> Tensor:
        pixels = self._pixels(images)
        stamped = self._checked(stamp(pixels), pixels).clamp(0, 1)
        if images.dtype == torch.uint8:
            stamped = (stamped * 255).round()
        elif self.normalization is not None:
            stamped = self.normalization.apply(stamped)
        return stamped.to(images.dtype).reshape(images.shape)

    def _pixels(self, images: Tensor) -> Tensor:
        """Brings images to a new batch of float pixels in [0, 1]."""
        if images.dim() not in (3, 4):
            raise ValueError(f"images must have shape (N, C, H, W) or (C, H, W), but have {tuple(images.shape)}")
        batch = images if images.dim() == 4 else images[None]
        if self.normalization is not None and len(self.normalization.mean) != batch.shape[1]:
            raise ValueError(
                f"mean has {len(self.normalization.mean)} value(s), but the images have {batch.shape[1]} channel(s): "
                "pass mean= and std= with one value a channel"
            )
        if images.dtype == torch.uint8:
            return batch.to(torch.float32) / 255
        if not images.is_floating_point():
            raise TypeError(f"images must be uint8 or floating point, but are {images.dtype}")
        pixels = batch.to(torch.promote_types(images.dtype, torch.float32))
        if self.normalization is None:
            self._check_range(
                pixels,
                _PIXEL_TOLERANCE,
                f"pass mean= and std= to {type(self).__name__} if the images are normalised, "
                "divide by 255 if they hold 0 to 255",
            )
        else:
            pixels = self.normalization.invert(pixels)
            self._check_range(
                pixels,
                _DENORMALIZED_TOLERANCE,
                f"that is after undoing {self.normalization}; pass mean= and std= that the images were normalised with",
            )
        return pixels.clamp(0, 1)

    @staticmethod
    def _check_range(pixels: Tensor, tolerance: float, remedy: str) -> None:
        if pixels.numel() == 0:
            return
        low, high = torch.stack(torch.aminmax(pixels.detach())).tolist()
        # Written so that NaN, which compares false, raises too.
        if not (low >= -tolerance and high <= 1 + tolerance):
            raise ValueError(f"images must lie in [0, 1], but go from {low:.4g} to {high:.4g}: {remedy}")

    def _checked(self, stamped: Tensor, pixels: Tensor) -> Tensor:
        name = type(self).__name__
        if not isinstance(stamped, Tensor):
            raise TypeError(f"the trigger {name} must return a tensor, but returned {type(stamped).__name__}")
        if stamped.shape != pixels.shape:
            raise ValueError(
                f"the trigger {name} must keep the shape {tuple(pixels.shape)}, but returned {tuple(stamped.shape)}"
            )
        if stamped.dtype != pixels.dtype or stamped.device != pixels.device:
            raise ValueError(
                f"the trigger {name} must keep {pixels.dtype} on {pixels.device}, "
                f"but returned {stamped.dtype} on {stamped.device}"
            )
        if not torch.isfinite(stamped).all():
            raise ValueError(f"the trigger {name} returned NaN or infinity; its pixels must be finite numbers")
        return stamped

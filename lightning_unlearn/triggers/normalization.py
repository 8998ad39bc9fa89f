"""The mean and standard deviation that a dataset normalises its images with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor, nn
from torchvision import transforms as v1
from torchvision.transforms import v2

# What `weights.transforms()` gives; torchvision has no public name for it.
from torchvision.transforms._presets import ImageClassification

__all__ = ["Normalization", "find_normalization", "in_pixels"]

_TOLERANCE = 1e-2  # of pixels, after undoing a normalisation in half precision


@dataclass(frozen=True)
class Normalization:
    """Maps pixels in ``[0, 1]`` to a model's input, ``(pixels - mean) / std``, and back.

    Args:
        mean: mean of each channel, in pixel units (``[0, 1]``).
        std: standard deviation of each channel, in pixel units, each above 0.

    Raises:
        ValueError: if the lengths differ or are 0, if a value is not finite, or if a ``std`` is not positive.

    Example:
        >>> import torch
        >>> normalization = Normalization(mean=(0.5,), std=(0.25,))
        >>> normalization.apply(torch.ones(1, 1, 1, 1)).item()
        2.0
        >>> normalization.invert(torch.tensor([[[2.0]]])).item()
        1.0
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        """Accepts any sequence of numbers, and of grey images a lone one, and checks it."""
        for name in ("mean", "std"):
            given = getattr(self, name)
            values = (given,) if isinstance(given, Real) else given
            object.__setattr__(self, name, tuple(float(value) for value in values))
        if not self.mean or len(self.mean) != len(self.std):
            raise ValueError(
                f"mean and std must have one value a channel each, but mean has {len(self.mean)} "
                f"and std has {len(self.std)}"
            )
        if not all(abs(value) < float("inf") for value in self.mean):
            raise ValueError(f"mean must be finite, but is {self.mean}")
        if not all(0 < value < float("inf") for value in self.std):
            raise ValueError(f"std must be finite and above 0 in each channel, but is {self.std}")

    def apply(self, pixels: Tensor) -> Tensor:
        """Normalises pixels.

        Args:
            pixels: ``(..., C, H, W)``, floating point, in ``[0, 1]``.

        Returns:
            The normalised images: same shape, dtype and device.

        Raises:
            TypeError: if ``pixels`` is not floating point.
            ValueError: if ``pixels`` has not as many channels as ``mean``.
        """
        mean, std = self._per_channel(pixels)
        return (pixels - mean) / std

    def invert(self, images: Tensor) -> Tensor:
        """Turns normalised images back into pixels.

        Args:
            images: ``(..., C, H, W)``, floating point, normalised.

        Returns:
            The pixels: same shape, dtype and device.

        Raises:
            TypeError: if ``images`` is not floating point.
            ValueError: if ``images`` has not as many channels as ``mean``.
        """
        mean, std = self._per_channel(images)
        return images * std + mean

    def _per_channel(self, images: Tensor) -> tuple[Tensor, Tensor]:
        if not images.is_floating_point():
            raise TypeError(f"images must be floating point to be normalised, but are {images.dtype}")
        if images.dim() < 3 or images.shape[-3] != len(self.mean):
            raise ValueError(
                f"mean and std have {len(self.mean)} value(s), but the images have shape {tuple(images.shape)}: "
                "pass one value for each channel of (..., C, H, W)"
            )
        mean = torch.tensor(self.mean, dtype=images.dtype, device=images.device)
        std = torch.tensor(self.std, dtype=images.dtype, device=images.device)
        return mean[:, None, None], std[:, None, None]


def in_pixels(images: Tensor, normalization: Normalization | None) -> Tensor:
    """Images as float32 pixels in [0, 1], whose range tells whether their normalisation is known.

    Args:
        images: (N, C, H, W) as the model takes them.
        normalization: how they are normalised, if they are.

    Raises:
        TypeError: if images are no floating-point numbers.
        ValueError: if they are no pixels even without the normalisation.
    """
    if not images.is_floating_point():
        raise TypeError(
            f"images: expected floating-point images, through which a gradient can pass, but got {images.dtype}."
        )
    pixels = images.float() if normalization is None else normalization.invert(images.float())
    low, high = (bound.item() for bound in torch.aminmax(pixels))
    if not (low >= -_TOLERANCE and high <= 1 + _TOLERANCE):
        told = "no normalisation was told" if normalization is None else f"that is after undoing {normalization}"
        raise ValueError(
            f"images: expected pixels in [0, 1], but they go from {low:.4g} to {high:.4g}, and {told}; tell how they "
            "are normalised (by a torchvision Normalize in the dataset's `transform`, one that you set yourself if it "
            "has none; normalization=... of tensors), or divide by 255 if they hold 0 to 255."
        )
    return pixels.clamp(0, 1)


def find_normalization(dataset: object) -> Normalization | None:
    """Reads the normalisation out of a dataset's transforms.

    Looks at ``dataset.transform`` and ``dataset.transforms``, inside torchvision's ``Compose`` (v1 and v2),
    ``nn.Sequential`` and the presets of pretrained weights, and through wrappers such as ``Subset`` that hold the
    wrapped dataset as ``.dataset``; the outermost one found counts.

    Args:
        dataset: any dataset.

    Returns:
        The mean and std of torchvision's ``Normalize``, or None where there is none.

    Raises:
        ValueError: if one pipeline normalises more than once, so that no single mean and std describe it.

    Example:
        >>> from torchvision import transforms
        >>> from torchvision.datasets import FakeData
        >>> data = FakeData(transform=transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.2,))]))
        >>> find_normalization(data)
        Normalization(mean=(0.5,), std=(0.2,))
        >>> find_normalization(FakeData()) is None
        True
    """
    wrapped: object | None = dataset
    while wrapped is not None:
        for name in ("transform", "transforms"):
            found = list(_normalizations(getattr(wrapped, name, None)))
            if len(found) > 1:
                raise ValueError(
                    f"the {name} of {type(wrapped).__name__} holds {len(found)} Normalize steps: "
                    "pass mean= and std= that describe them together"
                )
            if found:
                return found[0]
        wrapped = getattr(wrapped, "dataset", None)
    return None


def _normalizations(transform: object) -> Iterator[Normalization]:
    """Yields every normalisation that a transform always applies, in order."""
    if isinstance(transform, v1.Normalize | v2.Normalize | ImageClassification):
        # float64, so that 0.4914 stays 0.4914; flattened, since torchvision also takes a lone number.
        mean = torch.as_tensor(transform.mean, dtype=torch.float64).flatten().tolist()
        std = torch.as_tensor(transform.std, dtype=torch.float64).flatten().tolist()
        yield Normalization(mean=tuple(mean), std=tuple(std))
    elif isinstance(transform, v1.Compose | v2.Compose):
        for step in transform.transforms:
            yield from _normalizations(step)
    elif isinstance(transform, nn.Sequential):
        for step in transform:
            yield from _normalizations(step)
    elif transform is not None and hasattr(transform, "transform"):
        # torchvision's StandardTransform: a pair of transform and target_transform
        yield from _normalizations(transform.transform)

"""Real handwritten digits that need no download."""

from __future__ import annotations

import functools
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Dataset

from lightning_unlearn.data.seeding import seeded_generator

__all__ = ["Digits", "Part"]

Part: TypeAlias = Literal["train", "holdout", "test", "all"]

_TRAIN_PER_CLASS = 100
_HOLDOUT_PER_CLASS = 20


class Digits(Dataset[tuple[Tensor, int]]):
    """scikit-learn's 1,797 real 8x8 handwritten digits, upscaled bilinearly.

    The parts are fixed and disjoint: 1,000 images to train on (100 of each class), 200 held out (20 of each class) and
    597 to test on. From E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998.

    Args:
        part: ``"train"``, ``"holdout"``, ``"test"`` or ``"all"``.
        size: height and width of the images, at least 8.
        channels: 1, or 3 for the same grey in each.

    Attributes:
        images: (N, channels, size, size) float32 in [0, 1].
        targets: (N,) int64, the digits.
        indices: the images' places among scikit-learn's 1,797, in rising order.

    Raises:
        ImportError: if scikit-learn is not installed.
        ValueError: if an argument is out of its range.

    Example:
        >>> digits = Digits(part="holdout")
        >>> image, label = digits[0]
        >>> len(digits), image.shape, image.dtype, label
        (200, torch.Size([1, 32, 32]), torch.float32, 4)
    """

    def __init__(self, *, part: Part = "train", size: int = 32, channels: int = 1) -> None:
        if part not in get_args(Part):
            raise ValueError(f"part must be one of {', '.join(get_args(Part))}, but is {part!r}")
        if size < 8:
            raise ValueError(f"size must be at least 8, that of the originals, but is {size}")
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, but is {channels}")
        pixels, labels = _load()
        chosen = _parts()[part]
        upscaled = interpolate(pixels[chosen], size=(size, size), mode="bilinear", align_corners=False)
        # Interpolation may leave [0, 1] by a rounding error.
        self.images = upscaled.clamp(0, 1).expand(-1, channels, -1, -1)
        self.targets = labels[chosen]
        self.indices: tuple[int, ...] = tuple(chosen.tolist())

    @property
    def origins(self) -> tuple[tuple[str, int], ...]:
        """Names each image, so that overlap between parts is seen whatever their size or channels."""
        return tuple(("digits", index) for index in self.indices)

    def __len__(self) -> int:
        """Number of images in this part."""
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """The image (channels, size, size) float32 in [0, 1] at an index, and its digit."""
        return self.images[index], int(self.targets[index])


@functools.cache
def _load() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('Digits needs scikit-learn: pip install "lightning-unlearn[demo]"') from error
    pixels, labels = load_digits(return_X_y=True)
    return torch.from_numpy(pixels / 16).float().reshape(-1, 1, 8, 8), torch.from_numpy(labels).long()


@functools.cache
def _parts() -> dict[Part, Tensor]:
    labels = _load()[1]
    split: dict[Part, list[Tensor]] = {"train": [], "holdout": [], "test": []}
    for digit in range(10):
        members = torch.nonzero(labels == digit).flatten()
        order = members[torch.randperm(len(members), generator=seeded_generator("digits", digit))]
        held = _TRAIN_PER_CLASS + _HOLDOUT_PER_CLASS
        split["train"].append(order[:_TRAIN_PER_CLASS])
        split["holdout"].append(order[_TRAIN_PER_CLASS:held])
        split["test"].append(order[held:])
    parts = {part: torch.cat(indices).sort().values for part, indices in split.items()}
    return parts | {"all": torch.arange(len(labels))}

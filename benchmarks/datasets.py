"""The benchmark's images, decoded once: float32 in [0, 1], 32x32."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the usual name
from torchvision import datasets
from torchvision.transforms.functional import pil_to_tensor

from lightning_unlearn.data import Digits, FashionMNISTDataModule
from lightning_unlearn.data.digits import Part

__all__ = ["Split", "load", "source"]

Split = Literal["train", "holdout", "test"]

_DATA = Path(os.environ.get("UNLEARN_BENCHMARK_DATA", Path(__file__).parents[1] / "data"))
_JPEG_COPY = Path(__file__).parents[2] / "shared" / "data" / "load.py"


@cache
def load(name: str, split: Split) -> tuple[Tensor, Tensor]:
    """All images (N, C, 32, 32) and labels (N,) of a split: ``"train"``, ``"holdout"`` for the defender, or ``"test"``.

    The holdout of CIFAR-10 and Fashion-MNIST is the last tenth of their training files, which no victim is trained on.

    CIFAR-10 comes from torchvision's folder under ``UNLEARN_BENCHMARK_DATA`` if it is there, else from the JPEG copies
    beside this project's checkout, which are slightly lossy; Fashion-MNIST from Debian's package or torchvision's
    folder.
    """
    if name == "digits":
        digits = Digits(part=cast("Part", split))
        return digits.images, digits.targets
    if name not in _READERS:
        raise ValueError(f"name: expected one of {['digits', *_READERS]}, but got {name!r}.")
    images, labels = _READERS[name]("test" if split == "test" else "train")
    if split != "test":
        first = len(labels) * 9 // 10
        part = slice(first, None) if split == "holdout" else slice(first)
        images, labels = images[part], labels[part]
    padding = (32 - images.shape[-1]) // 2
    return F.pad(images, (padding,) * 4).float() / 255, labels.long()


def source(name: str) -> str:
    """Where a dataset's images come from, if there are several sources, whose images are other ones in another order.

    The victims in the repository, and the results of theirs, are of the first source, which has no name.
    """
    from_torchvision = (_DATA / "cifar-10-batches-py").exists() or not _JPEG_COPY.exists()
    return "torchvision" if name == "cifar10" and from_torchvision else ""


def _cifar10(split: str) -> tuple[Tensor, Tensor]:
    if source("cifar10") == "torchvision":
        dataset = datasets.CIFAR10(_DATA, train=split == "train", download=True)
        return torch.from_numpy(dataset.data).permute(0, 3, 1, 2), torch.tensor(dataset.targets)
    cached = _DATA / f"cifar10-jpeg-{split}.pt"
    if not cached.exists():
        spec = importlib.util.spec_from_file_location("cifar10_jpeg", _JPEG_COPY)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        _DATA.mkdir(parents=True, exist_ok=True)
        torch.save(module.load(split), cached)
    images, labels = torch.load(cached, weights_only=True)
    return images, labels


def _fashion_mnist(split: str) -> tuple[Tensor, Tensor]:
    # Where Debian's package dataset-fashion-mnist puts it, so that nothing is downloaded where that is installed.
    debian = Path("/usr/share/datasets/fashion-mnist")
    root = debian if debian.exists() else _DATA
    dataset = FashionMNISTDataModule(root=str(root)).open(
        train=split == "train", transform=pil_to_tensor, download=root == _DATA
    )
    return dataset.data[:, None], dataset.targets


_READERS = {"cifar10": _cifar10, "fashion_mnist": _fashion_mnist}

"""CIFAR-10, Fashion-MNIST and GTSRB as DataModules over torchvision's own datasets."""

from __future__ import annotations

import gzip
import shutil
import tempfile
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from torch.utils.data import Subset
from torchvision import transforms
from torchvision.datasets import CIFAR10, GTSRB, FashionMNIST, VisionDataset
from torchvision.datasets.mnist import read_image_file, read_label_file

from lightning_unlearn.data.holdout import split_holdout
from lightning_unlearn.data.image_datamodule import ImageDataModule
from lightning_unlearn.data.labels import labels_of

__all__ = ["CIFAR10DataModule", "FashionMNISTDataModule", "GTSRBDataModule", "TorchvisionDataModule"]


class TorchvisionDataModule(ImageDataModule):
    """What the DataModules over torchvision's datasets share.

    Images are float32 in [0, 1], not normalised: an attacker's trigger works on pixels, and so must whoever removes it,
    so the mean and std belong into the model, as its first layer. Part of the training images, chosen per class,
    validates.

    Args:
        root: the folder that torchvision's dataset reads.
        batch_size: images in a batch, at least 1.
        size: height and width that images are resized to, in pixels.
        augment: crop training images at random (and mirror them, where the mirrored thing is of the same class).
        validation_share: which part of each class's training images validates, in (0, 1).
        seed: chooses the validation images.
        num_workers: processes that load images; 0 loads in the main one.
        download: fetch the dataset into ``root`` if it is not there.

    Raises:
        FileNotFoundError: (on ``setup``) if ``root`` does not hold the dataset.
        ValueError: if an argument is out of its range.
    """

    mirrored: ClassVar[bool] = True
    """Whether augmentation mirrors images."""

    contents: ClassVar[str]
    """What the root folder must hold, for the error message."""

    def __init__(
        self,
        root: str = "data",
        *,
        batch_size: int = 128,
        size: int = 32,
        augment: bool = False,
        validation_share: float = 0.1,
        seed: int = 0,
        num_workers: int = 0,
        download: bool = False,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers)
        if size < 1:
            raise ValueError(f"size must be at least 1, but is {size}")
        if not 0 < validation_share < 1:
            raise ValueError(f"validation_share must be in (0, 1), but is {validation_share}")
        self.root = root
        self.size = size
        self.augment = augment
        self.validation_share = validation_share
        self.seed = seed
        self.download = download

    def open(self, *, train: bool, transform: Callable[[Any], Tensor], download: bool) -> VisionDataset:
        """Opens torchvision's dataset; to be overridden.

        Args:
            train: the training part, else the test part.
            transform: turns a PIL image into a tensor.
            download: fetch what is not there.

        Returns:
            The dataset.
        """
        raise NotImplementedError(f"{type(self).__name__} must override open")

    def sources(self, dataset: VisionDataset) -> list[Hashable]:
        """Says what each training image was taken from; images of one source are not split.

        Args:
            dataset: the training part.

        Returns:
            One source for each image; each image is its own by default.
        """
        return list(range(len(dataset)))

    def prepare_data(self) -> None:
        """Downloads the dataset, if asked to."""
        if self.download:
            for train in (True, False):
                self.open(train=train, transform=self._transform(augment=False), download=True)

    def setup(self, stage: str | None = None) -> None:
        """Opens the training, validation and test parts."""
        if self.train is not None:
            return
        plain, augmenting = self._transform(augment=False), self._transform(augment=self.augment)
        training = self._found(train=True, transform=augmenting)
        train, validation = self._split(training)
        self.train = Subset(training, train)
        self.validation = Subset(self._found(train=True, transform=plain), validation)
        self.test = self._found(train=False, transform=plain)

    def _found(self, *, train: bool, transform: Callable[[Any], Tensor]) -> VisionDataset:
        try:
            return self.open(train=train, transform=transform, download=False)
        except (RuntimeError, FileNotFoundError) as error:
            raise FileNotFoundError(
                f"root={self.root!r} must hold {self.contents}, but torchvision says: {error} "
                f"Give download=True to {type(self).__name__} to fetch it there."
            ) from error

    def _split(self, dataset: VisionDataset) -> tuple[list[int], list[int]]:
        members: dict[Hashable, list[int]] = {}
        for index, source in enumerate(self.sources(dataset)):
            members.setdefault(source, []).append(index)
        groups = list(members.values())
        labels = labels_of(dataset)[[group[0] for group in groups]]
        parts = split_holdout(
            labels, samples_per_class=None, share=1.0, validation_share=self.validation_share, seed=self.seed
        )
        train, validation = (
            sorted(index for chosen in part for index in groups[chosen]) for part in (parts.scoring, parts.validation)
        )
        return train, validation

    def _transform(self, *, augment: bool) -> Callable[[Any], Tensor]:
        steps: list[Callable[[Any], Any]] = [transforms.Resize((self.size, self.size))]
        if augment:
            steps.append(transforms.RandomCrop(self.size, padding=max(1, self.size // 8)))
        if augment and self.mirrored:
            steps.append(transforms.RandomHorizontalFlip())
        composed: Callable[[Any], Tensor] = transforms.Compose([*steps, transforms.ToTensor()])
        return composed


class CIFAR10DataModule(TorchvisionDataModule):
    """CIFAR-10: 50,000 and 10,000 colour photographs of ten things.

    From A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009. The arguments are those of
    `TorchvisionDataModule`; ``root`` holds torchvision's ``cifar-10-batches-py``.

    Example:
        >>> CIFAR10DataModule("data", batch_size=64).size
        32
    """

    contents: ClassVar[str] = "CIFAR-10 (a folder cifar-10-batches-py)"

    def open(self, *, train: bool, transform: Callable[[Any], Tensor], download: bool) -> VisionDataset:
        """Opens CIFAR-10."""
        return CIFAR10(self.root, train=train, transform=transform, download=download)


class FashionMNISTDataModule(TorchvisionDataModule):
    """Fashion-MNIST: 60,000 and 10,000 grey 28x28 pictures of ten kinds of clothing.

    From H. Xiao et al., arXiv 1708.07747. The arguments are those of `TorchvisionDataModule`; ``root`` holds
    torchvision's ``FashionMNIST/raw``, or the four original ``.gz`` files, as ``/usr/share/datasets/fashion-mnist``
    does with Debian's package ``dataset-fashion-mnist``.

    Example:
        >>> FashionMNISTDataModule("data", size=28).size
        28
    """

    contents: ClassVar[str] = "Fashion-MNIST (a folder FashionMNIST/raw, or the four .gz files themselves)"

    def open(self, *, train: bool, transform: Callable[[Any], Tensor], download: bool) -> VisionDataset:
        """Opens Fashion-MNIST."""
        kind = _CompressedFashionMNIST if _CompressedFashionMNIST.is_in(self.root) else FashionMNIST
        return kind(self.root, train=train, transform=transform, download=download)


class GTSRBDataModule(TorchvisionDataModule):
    """GTSRB: 26,640 and 12,630 colour photographs of 43 German traffic signs, of many sizes.

    From J. Stallkamp et al., IJCNN 2011. The arguments are those of `TorchvisionDataModule`; ``root`` holds
    torchvision's ``gtsrb``. Signs are never mirrored, and the up to 30 photographs of one and the same sign
    (``00012_00000.ppm`` to ``00012_00029.ppm``) are all trained on or all validated on.

    Example:
        >>> GTSRBDataModule("data", augment=True).mirrored
        False
    """

    mirrored: ClassVar[bool] = False
    contents: ClassVar[str] = "GTSRB (a folder gtsrb with GTSRB/Training, GTSRB/Final_Test and GT-final_test.csv)"

    def open(self, *, train: bool, transform: Callable[[Any], Tensor], download: bool) -> VisionDataset:
        """Opens GTSRB."""
        return GTSRB(self.root, split="train" if train else "test", transform=transform, download=download)

    def sources(self, dataset: VisionDataset) -> list[Hashable]:
        """Names the sign that each photograph shows."""
        return [(label, Path(path).name.split("_")[0]) for path, label in dataset._samples]


class _CompressedFashionMNIST(FashionMNIST):  # type: ignore[misc]  # torchvision has no types, so its classes are Any
    """Fashion-MNIST whose compressed files lie in the root folder itself, which may be read-only."""

    @classmethod
    def is_in(cls, root: str) -> bool:
        return all((Path(root) / name).is_file() for name, _ in cls.resources)

    def _check_exists(self) -> bool:
        return self.is_in(self.root)

    def _load_data(self) -> tuple[Tensor, Tensor]:
        part = "train" if self.train else "t10k"
        with tempfile.TemporaryDirectory() as folder:
            images = read_image_file(self._unpack(f"{part}-images-idx3-ubyte", folder))
            labels = read_label_file(self._unpack(f"{part}-labels-idx1-ubyte", folder))
        return images, labels

    def _unpack(self, name: str, folder: str) -> str:
        """Unpacks one file: torchvision's reader takes a plain one."""
        unpacked = Path(folder) / name
        with gzip.open(Path(self.root) / f"{name}.gz") as source, unpacked.open("wb") as target:
            shutil.copyfileobj(source, target)
        return str(unpacked)

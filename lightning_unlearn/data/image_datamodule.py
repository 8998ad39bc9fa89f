"""What the DataModules of this package share: a training, a validation and a test part."""

from __future__ import annotations

from typing import Any, ClassVar

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from lightning_unlearn.data.labels import AnyDataset

__all__ = ["ImageDataModule"]


class ImageDataModule(LightningDataModule):
    """Loaders over three parts, which subclasses set in ``__init__`` or ``setup``.

    Args:
        batch_size: images in a batch, at least 1.
        num_workers: processes that load images; 0 loads in the main one.

    Attributes:
        train: what ``train_dataloader`` reads, shuffled if ``shuffle_train``; None before it is set.
        validation: what ``val_dataloader`` reads, in order; None before it is set.
        test: what ``test_dataloader`` reads, in order; None before it is set, or if there is none.

    Raises:
        ValueError: if ``batch_size`` is below 1 or ``num_workers`` is negative.
    """

    shuffle_train: ClassVar[bool] = True

    def __init__(self, *, batch_size: int = 128, num_workers: int = 0) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, but is {batch_size}")
        if num_workers < 0:
            raise ValueError(f"num_workers must be 0 or more, but is {num_workers}")
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.train: AnyDataset | None = None
        self.validation: AnyDataset | None = None
        self.test: AnyDataset | None = None

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of the training part."""
        return self._loader("train", self.train, shuffle=self.shuffle_train)

    def val_dataloader(self) -> DataLoader[Any]:
        """Batches of the validation part, in order."""
        return self._loader("validation", self.validation)

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches of the test part, in order."""
        return self._loader("test", self.test)

    def _loader(self, part: str, dataset: AnyDataset | None, *, shuffle: bool = False) -> DataLoader[Any]:
        if dataset is None:
            raise ValueError(
                f"{type(self).__name__} has no {part} images: call setup() first, or give it a {part} dataset"
            )
        return DataLoader(dataset, batch_size=self.batch_size, shuffle=shuffle, num_workers=self.num_workers)

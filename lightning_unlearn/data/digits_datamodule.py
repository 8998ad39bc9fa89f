"""The handwritten digits as a DataModule."""

from __future__ import annotations

from lightning_unlearn.data.digits import Digits
from lightning_unlearn.data.image_datamodule import ImageDataModule

__all__ = ["DigitsDataModule"]


class DigitsDataModule(ImageDataModule):
    """The three parts of `Digits`: 1,000 images to train on, 200 to validate, 597 to test.

    Args:
        batch_size: images in a batch, at least 1.
        size: height and width of the images, at least 8.
        num_workers: processes that load images; 0 loads in the main one.

    Raises:
        ImportError: if scikit-learn is not installed.
        ValueError: if an argument is out of its range.

    Example:
        >>> images, labels = next(iter(DigitsDataModule(batch_size=50).val_dataloader()))
        >>> images.shape, labels.shape
        (torch.Size([50, 1, 32, 32]), torch.Size([50]))
    """

    def __init__(self, *, batch_size: int = 64, size: int = 32, num_workers: int = 0) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers)
        self.train = Digits(part="train", size=size)
        self.validation = Digits(part="holdout", size=size)
        self.test = Digits(part="test", size=size)

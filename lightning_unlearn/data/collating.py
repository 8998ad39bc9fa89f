"""What a DataLoader cannot make batches of, in words that say what to change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["refuse_uncollatable"]


@contextmanager
def refuse_uncollatable(argument: str) -> Iterator[None]:
    """Say what to do about items that no batch can be made of, loaded within the ``with`` block.

    Args:
        argument: what the dataset was given as.

    Raises:
        TypeError: if an item holds something else than tensors and numbers, such as a PIL image.
        ValueError: if images are of several sizes.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader
        >>> from lightning_unlearn.data.collating import refuse_uncollatable
        >>> with refuse_uncollatable("dataset"):
        ...     batch = next(iter(DataLoader([torch.zeros(1, 2, 2), torch.zeros(1, 3, 3)], batch_size=2)))
        Traceback (most recent call last):
        ValueError: dataset: its images, and what its items hold beside them, must be of one size; add ...
    """
    try:
        yield
    except TypeError as error:
        if "default_collate" not in str(error):
            raise
        raise TypeError(
            f"{argument}: its items must be images, as tensors, with whole numbers as labels; end the dataset's "
            f"transforms with torchvision's ToTensor(), and leave out what is None. ({str(error).splitlines()[-1]})"
        ) from error
    except RuntimeError as error:
        if "equal size" not in str(error):
            raise
        raise ValueError(
            f"{argument}: its images, and what its items hold beside them, must be of one size; add torchvision's "
            f"Resize or CenterCrop to the dataset's transforms. ({str(error).splitlines()[-1]})"
        ) from error

"""The images that a DataLoader gives, which its sampler decides."""

from __future__ import annotations

from typing import Any

from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
)

__all__ = ["images_of"]


def images_of(loader: DataLoader[Any], name: str | None = None) -> Dataset[Any]:
    """The images that a loader gives: its dataset, or what its sampler takes of that, as where one set is split by two.

    Args:
        loader: the loader; none of its images is read.
        name: what to call it where its sampler does not tell which images it takes. None: then it may take all.

    Returns:
        The dataset itself where the loader gives all of it, in whatever order, else a Subset.

    Raises:
        ValueError: if a ``name`` is given and the sampler is of another kind than torch's own.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset
        >>> from lightning_unlearn.data.drawn import images_of
        >>> images = TensorDataset(torch.rand(10, 1, 4, 4))
        >>> images_of(DataLoader(images, shuffle=True)) is images
        True
        >>> len(images_of(DataLoader(images, sampler=SubsetRandomSampler(range(7, 10)))))
        3
    """
    # A batch sampler of one's own is not looked for in `sampler`, which is then a sequential one that nobody asks.
    sampler = loader.sampler if loader.batch_sampler is None else getattr(loader.batch_sampler, "sampler", None)
    if isinstance(sampler, SubsetRandomSampler):
        return Subset(loader.dataset, list(sampler.indices))
    known = (DistributedSampler, RandomSampler, SequentialSampler)
    if name is None or isinstance(sampler, known) or isinstance(loader.dataset, IterableDataset):
        return loader.dataset
    raise ValueError(
        f"{name}: its {type(sampler or loader.batch_sampler).__name__} does not tell which images it takes; give a "
        "Dataset of them, such as a torch.utils.data.Subset, or a DataLoader of one."
    )

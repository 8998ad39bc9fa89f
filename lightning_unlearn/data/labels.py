"""The labels of any dataset, and which underlying images it is made of."""

from __future__ import annotations

import operator
import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeGuard, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset
from torchvision.datasets import VisionDataset

__all__ = ["AnyDataset", "HasOrigins", "is_unlabelled", "item_parts", "labels_of", "overlap", "provenance"]

if TYPE_CHECKING:
    AnyDataset: TypeAlias = Dataset[Any]
else:
    # jsonargparse takes a parametrised generic for the class itself, whatever class_path says.
    AnyDataset = Dataset

_LABEL_ATTRIBUTES = ("targets", "labels", "_labels")
_IMAGE_KEYS = ("image", "images", "img", "x", "input", "inputs", "pixel_values")
_LABEL_KEYS = ("label", "labels", "y", "target", "targets")

# How torchvision's datasets name the argument that picks a part of the files under one root.
_PART_ATTRIBUTES = (
    "train", "split", "_split", "fold", "folds", "_fold", "partition", "_partition", "image_set", "mode", "year",
    "version", "view", "background", "_annotation_level",
)  # fmt: skip


@runtime_checkable
class HasOrigins(Protocol):
    """A dataset that names its items itself, so that two instances can be compared."""

    @property
    def origins(self) -> Sequence[Hashable]:
        """One name for each item, equal wherever the item is made of the same image."""


def labels_of(dataset: object) -> Tensor:
    """Reads the label of every item, without loading images where the dataset allows it.

    Looks at ``.targets``, ``.labels`` and the private lists of torchvision's datasets (with ``target_transform``
    applied), into ``TensorDataset``, ``Subset`` and ``ConcatDataset``; else reads every item, which is a tuple
    ``(image, label, ...)`` or a dict. An attribute that is not one whole number an item is passed over. A subclass
    that changes labels only in ``__getitem__`` must change the attribute too.

    Args:
        dataset: a map-style dataset, that is one with ``__len__`` and ``__getitem__``.

    Returns:
        The labels, (N,) int64, on the CPU; a copy.

    Raises:
        TypeError: if the dataset is not map-style, or an item holds no label that is a whole number.
        ValueError: if a ``TensorDataset`` has no second tensor of N whole numbers.

    Example:
        >>> import torch
        >>> from torch.utils.data import Subset, TensorDataset
        >>> data = TensorDataset(torch.zeros(3, 1, 2, 2), torch.tensor([5, 6, 7]))
        >>> labels_of(Subset(data, [2, 0]))
        tensor([7, 5])
    """
    if isinstance(dataset, DataLoader):
        raise TypeError("dataset: expected a map-style dataset, but got a DataLoader; pass its `dataset`.")
    if not _is_map_style(dataset):
        raise TypeError(
            f"dataset must be map-style, with __len__ and __getitem__, but is {type(dataset).__name__}: "
            "collect an iterable dataset into a list first"
        )
    if isinstance(dataset, Subset):
        return labels_of(dataset.dataset)[torch.tensor(_plain(dataset.indices), dtype=torch.int64)]
    if isinstance(dataset, ConcatDataset):
        return torch.cat([labels_of(part) for part in dataset.datasets])
    if isinstance(dataset, TensorDataset):
        labels = _as_labels(dataset.tensors[1], len(dataset)) if len(dataset.tensors) > 1 else None
        if labels is None:
            raise ValueError(f"dataset: a TensorDataset must hold images and {len(dataset)} whole-number labels")
        return labels
    labels = _stored_labels(dataset)
    if labels is not None:
        return labels
    read = [_item_label(dataset[index], index) for index in range(len(dataset))]
    return torch.tensor(read, dtype=torch.int64)


def is_unlabelled(dataset: object) -> bool:
    """Whether a map-style dataset holds images alone; an item is read only where nothing else tells.

    Args:
        dataset: any dataset.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> is_unlabelled(TensorDataset(torch.zeros(3, 1, 2, 2))), is_unlabelled([(torch.zeros(1, 2, 2), 5)])
        (True, False)
    """
    if isinstance(dataset, Subset):
        return is_unlabelled(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        return any(is_unlabelled(part) for part in dataset.datasets)
    if isinstance(dataset, TensorDataset):
        return len(dataset.tensors) == 1
    if not _is_map_style(dataset) or not len(dataset) or _stored_labels(dataset) is not None:
        return False
    item = dataset[0]
    return isinstance(item, Tensor) or (isinstance(item, tuple | list) and len(item) == 1)


def item_parts(item: object) -> tuple[Any, Any]:
    """Takes an item of a dataset apart.

    Args:
        item: a tuple or list ``(image, label, ...)``, or a dict with an image (under image, images, img, x, input,
            inputs or pixel_values) and a label (under label, labels, y, target or targets).

    Returns:
        The image and the label, as they are.

    Raises:
        TypeError: if the item is neither.

    Example:
        >>> item_parts({"image": "picture", "label": 3})
        ('picture', 3)
    """
    if isinstance(item, Mapping):
        image = next((item[key] for key in _IMAGE_KEYS if key in item), None)
        label = next((item[key] for key in _LABEL_KEYS if key in item), None)
        if image is not None and label is not None:
            return image, label
        found = f"a dict with the keys {sorted(map(str, item))}"
    elif isinstance(item, tuple | list) and len(item) >= 2:
        return item[0], item[1]
    else:
        found = f"a {type(item).__name__}"
    raise TypeError(f"dataset items must be (image, label) tuples or dicts with keys such as image, label; got {found}")


def provenance(dataset: object) -> frozenset[Hashable]:
    """Names the underlying images that a dataset is made of, to compare it with another.

    Looks through ``Subset``, ``ConcatDataset`` and wrappers that hold a dataset of the same length as ``.dataset``,
    such as `PoisonedDataset`. Two torchvision datasets over the same root and split are the same images, whatever
    their transforms, and so are two ``TensorDataset`` of the same image tensor. A dataset may name its items itself
    (`HasOrigins`), as `Digits` does. All else is known by the object's identity, so compare while both are alive.

    Args:
        dataset: any dataset; one that is not map-style has no items to name and gives the empty set.

    Returns:
        A set of hashable names, one for each distinct image.

    Example:
        >>> from torch.utils.data import Subset
        >>> data = [("image", 0)] * 5
        >>> len(provenance(Subset(data, [0, 3, 3])))
        2
    """
    if not _is_map_style(dataset):
        return frozenset()
    return frozenset(_origins(dataset, range(len(dataset))))


def overlap(first: object, second: object) -> int:
    """Counts the underlying images that two datasets share.

    Args:
        first: any dataset.
        second: any dataset.

    Returns:
        The number of distinct images in both, by `provenance`; 0 where nothing is known to be shared.

    Example:
        >>> from torch.utils.data import Subset
        >>> data = [("image", 0)] * 5
        >>> overlap(Subset(data, [0, 1, 2]), Subset(data, [2, 3])), overlap(data, list(data))
        (1, 0)
    """
    return len(provenance(first) & provenance(second))


class _MapStyle(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


def _is_map_style(dataset: object) -> TypeGuard[_MapStyle]:
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        return False
    return hasattr(dataset, "__len__")


def _plain(indices: Iterable[Any]) -> list[int]:
    """Indices of a Subset may be a list, range, array or tensor."""
    return [int(index) for index in indices]


def _stored_labels(dataset: _MapStyle) -> Tensor | None:
    stored = [getattr(dataset, name, None) for name in _LABEL_ATTRIBUTES]
    samples = getattr(dataset, "_samples", None)  # GTSRB and others: (path, label)
    if isinstance(samples, list) and all(isinstance(sample, tuple) and len(sample) == 2 for sample in samples):
        stored.append([label for _, label in samples])
    for values in stored:
        labels = _as_labels(values, len(dataset))
        if labels is not None:
            change = getattr(dataset, "target_transform", None)
            if change is None:
                return labels
            return torch.tensor([_whole(change(label), index) for index, label in enumerate(labels.tolist())])
    return None


def _as_labels(values: object, count: int) -> Tensor | None:
    """Turns values into ``count`` labels, or None if they are not whole numbers."""
    if values is None or callable(values):
        return None
    try:
        labels = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        return None
    if labels.shape != (count,) or ((labels.is_floating_point() or labels.is_complex()) and count):
        return None
    return labels.detach().to("cpu", torch.int64, copy=True)


def _item_label(item: object, index: int) -> int:
    return _whole(item_parts(item)[1], index)


def _whole(label: Any, index: int) -> int:
    try:
        return operator.index(label)
    except TypeError as error:
        raise TypeError(f"dataset: the label of item {index} must be a whole number, but is {label!r}") from error


def _origins(dataset: Any, indices: Iterable[int]) -> Iterable[Hashable]:
    if isinstance(dataset, HasOrigins):
        names = dataset.origins
        return [names[index] for index in indices]
    if isinstance(dataset, Subset):
        size, chosen = len(dataset.dataset), _plain(dataset.indices)  # type: ignore[arg-type]  # Dataset has no __len__
        return _origins(dataset.dataset, [chosen[index] % size for index in indices])
    if isinstance(dataset, ConcatDataset):
        wanted, found, start = set(indices), list[Hashable](), 0
        for part in dataset.datasets:
            size = len(part)  # type: ignore[arg-type]  # Dataset has no __len__
            found += _origins(part, [index for index in range(size) if start + index in wanted])
            start += size
        return found
    wrapped = getattr(dataset, "dataset", None)
    if _is_map_style(wrapped) and len(wrapped) == len(dataset):
        return _origins(wrapped, indices)
    base = _base(dataset)
    return [(base, index) for index in indices]


def _base(dataset: _MapStyle) -> Hashable:
    if isinstance(dataset, TensorDataset):
        return "tensor", id(dataset.tensors[0])
    # A user's subclass of a torchvision dataset reads the same files, so torchvision's own class counts.
    kinds = [
        kind
        for kind in type(dataset).__mro__
        if kind.__module__.startswith("torchvision.datasets.") and kind is not VisionDataset  # which reads nothing
    ]
    root = getattr(dataset, "root", None)
    if kinds and isinstance(root, str | os.PathLike):
        parts = tuple(repr(getattr(dataset, name, None)) for name in _PART_ATTRIBUTES)
        # The length tells a full dataset from one whose lists were cut after loading: there, indices mean other images.
        return kinds[0].__qualname__, os.path.realpath(root), parts, len(dataset)
    return "object", id(dataset)

"""Images without labels: the model's own answers stand in for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_unlearn.data.collating import refuse_uncollatable
from lightning_unlearn.data.labels import AnyDataset

__all__ = ["PredictedLabels", "first_image"]


class PredictedLabels(Dataset[tuple[Any, int]]):
    """A dataset of images alone, with the classes that a model gives them as labels.

    A repair by the victim's own clean answers (``teacher="victim"``) needs no better ones: labels only decide which
    images are drawn, and which count as the target's.

    Args:
        dataset: a map-style dataset whose items are images, or tuples that hold nothing but one.
        predict: (N, C, H, W) images to (N, classes) logits.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> images = TensorDataset(torch.tensor([0.1, 0.9]).view(2, 1, 1, 1))
        >>> data = PredictedLabels(images, lambda x: torch.cat([x, 1 - x], dim=1).flatten(1))
        >>> data.targets.tolist(), data[1][1]
        ([1, 0], 0)
    """

    def __init__(self, dataset: AnyDataset, predict: Callable[[Tensor], Tensor]) -> None:
        self.dataset = dataset  # where a normalisation, and whose images these are, is looked for
        loader: DataLoader[Any] = DataLoader(dataset, batch_size=128, generator=torch.Generator(), collate_fn=_stack)
        with torch.no_grad(), refuse_uncollatable("dataset"):
            self.targets = torch.cat([predict(images).argmax(1).cpu() for images in loader])

    def __len__(self) -> int:
        """Number of images."""
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """An image with the class that it was given."""
        return _image(self.dataset[index]), int(self.targets[index])


def first_image(dataset: AnyDataset) -> Tensor:
    """The first image of a dataset without labels, as a batch."""
    return _stack([dataset[0]])


def _image(item: Any) -> Any:
    return item[0] if isinstance(item, (tuple, list)) else item


def _stack(items: list[Any]) -> Tensor:
    return torch.stack([torch.as_tensor(_image(item)) for item in items])

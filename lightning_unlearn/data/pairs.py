"""Clean images beside their triggered copies, in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_unlearn.triggers.base import Trigger

__all__ = ["Pairs"]


@dataclass(frozen=True, eq=False)
class Pairs:
    """Clean images, the same images with the trigger applied, their true labels and the classes the attacker wants.

    Args:
        clean: (N, C, H, W) images as the model takes them.
        triggered: (N, C, H, W) the same images with the trigger.
        labels: (N,) int64 true classes.
        targets: (N,) int64 the class the attacker wants for each image.

    Example:
        >>> import torch
        >>> from lightning_unlearn.data.pairs import Pairs
        >>> from lightning_unlearn.triggers import PatchTrigger
        >>> trigger = PatchTrigger(size=3, target=0)
        >>> pairs = Pairs.stamp(torch.zeros(2, 1, 8, 8), torch.tensor([0, 1]), trigger, num_classes=2)
        >>> pairs.triggered[0].sum(), pairs.targets
        (tensor(9.), tensor([0, 0]))
    """

    clean: Tensor
    triggered: Tensor
    labels: Tensor
    targets: Tensor

    @classmethod
    def stamp(cls, images: Tensor, labels: Tensor, trigger: Trigger | None, *, num_classes: int) -> Pairs:
        """Pair images with their triggered copies; with themselves if nobody knows the trigger.

        Raises:
            ValueError: if labels are not (N,) integers in [0, ``num_classes``), or the trigger refuses the images.
        """
        if labels.ndim != 1 or len(labels) != len(images) or labels.is_floating_point():
            raise ValueError(
                f"labels: expected one integer class for each of {len(images)} images, "
                f"but got shape {tuple(labels.shape)} of {labels.dtype}."
            )
        if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= num_classes):
            raise ValueError(
                f"labels: expected classes from 0 to {num_classes - 1}, since the model gives {num_classes} logits, "
                f"but got labels from {int(labels.min())} to {int(labels.max())}."
            )
        labels = labels.long()
        if trigger is None:
            return cls(images, images, labels, labels)
        with torch.no_grad():
            return cls(images, trigger(images), labels, trigger.targets(labels, num_classes))

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> Pairs:
        """The pairs at an index tensor or slice."""
        return Pairs(self.clean[index], self.triggered[index], self.labels[index], self.targets[index])

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Pairs:
        """The same pairs on another device, the images as another floating-point type where one is given."""
        wanted = dtype if self.clean.is_floating_point() else None
        clean, triggered = (images.to(device, wanted, non_blocking=True) for images in (self.clean, self.triggered))
        return Pairs(clean, triggered, self.labels.to(device), self.targets.to(device))

    def batches(self, size: int) -> Iterator[Pairs]:
        """The pairs in order, ``size`` at a time; the last batch may be smaller."""
        for start in range(0, len(self), size):
            yield self[start : start + size]

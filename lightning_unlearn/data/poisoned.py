"""A dataset of which an attacker has poisoned a part."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_unlearn.data.labels import AnyDataset, item_parts, labels_of
from lightning_unlearn.data.seeding import seeded_generator
from lightning_unlearn.triggers import Trigger

__all__ = ["PoisonedDataset", "Policy", "check_poisoning"]

Policy: TypeAlias = Literal["target", "clean_label"]


class PoisonedDataset(Dataset[tuple[Tensor, int]]):
    """Puts a trigger on some images of a dataset, as an attacker would, to make a victim.

    ``round(ratio * N)`` of the N images are stamped. Under ``"target"`` they are images whose true class is not the
    wanted one, and get the wanted label (BadNets, arXiv 1708.06733); under ``"clean_label"`` they are images of the
    target class, and keep their label (SIG, arXiv 1902.11237). ``round(cross_ratio * N)`` others, whose true class is
    not the wanted one, become cross images, which look almost triggered and keep their true label (WaNet,
    arXiv 2102.10369). All else stays as it is. An item depends only on its index, in whatever order and process it is
    read, as far as the wrapped dataset's items do; an augmenting transform of that dataset runs before the trigger.

    Args:
        dataset: a map-style dataset of ``(image, label, ...)`` tuples or dicts, whose images are tensors (C, H, W) as
            ``trigger`` takes them. Only image and label are passed on.
        trigger: what to put on the images, and the class that the attacker wants.
        ratio: which part of all images is poisoned, in [0, 1].
        cross_ratio: which part of all images becomes a cross image, in [0, 1 - ratio].
        policy: which images are stamped and what becomes of their label.
        seed: chooses the images and what cross images look like.
        num_classes: how many classes there are; the largest label plus one by default.

    Attributes:
        poison_indices: the stamped images, in rising order.
        cross_indices: the cross images, in rising order.
        targets: (N,) int64, the labels after poisoning.

    Raises:
        TypeError: if ``trigger`` is no `Trigger`, or an item's image is not a tensor.
        ValueError: if a ratio is out of its range, too few images can be poisoned, the trigger has no cross images,
            or ``policy`` is unknown or does not fit a trigger without a single target.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> from lightning_unlearn.triggers import PatchTrigger
        >>> clean = TensorDataset(torch.zeros(10, 1, 8, 8), torch.arange(10) % 5)
        >>> poisoned = PoisonedDataset(clean, PatchTrigger(size=2, target=3), ratio=0.2)
        >>> [(poisoned[i][0].sum().item(), poisoned[i][1]) for i in poisoned.poison_indices]
        [(4.0, 3), (4.0, 3)]
    """

    def __init__(
        self,
        dataset: AnyDataset,
        trigger: Trigger,
        *,
        ratio: float = 0.1,
        cross_ratio: float = 0.0,
        policy: Policy = "target",
        seed: int = 0,
        num_classes: int | None = None,
    ) -> None:
        check_poisoning(trigger, ratio=ratio, cross_ratio=cross_ratio, policy=policy)
        self.dataset = dataset
        self.trigger = trigger
        self.seed = seed
        labels = labels_of(dataset)
        if not len(labels):
            raise ValueError("dataset must hold at least one image, but is empty")
        wanted = trigger.targets(labels, int(labels.max()) + 1 if num_classes is None else num_classes)
        others = torch.nonzero(labels != wanted).flatten()
        pool = others if policy == "target" else torch.nonzero(labels == wanted).flatten()
        whose = "whose class is not the target" if policy == "target" else "of the target class"
        poison = self._choose("poison", pool, ratio, f"ratio={ratio}", whose)
        rest = others[~torch.isin(others, poison)]
        cross = self._choose(
            "cross", rest, cross_ratio, f"cross_ratio={cross_ratio}", "whose class is not the target, unpoisoned,"
        )
        self.poison_indices: tuple[int, ...] = tuple(poison.tolist())
        self.cross_indices: tuple[int, ...] = tuple(cross.tolist())
        self.targets = labels
        self.targets[poison] = wanted[poison]  # under "clean_label" it is the label already
        self._poison = {index: place for place, index in enumerate(self.poison_indices)}
        self._cross = frozenset(self.cross_indices)

    def __len__(self) -> int:
        """Number of images: as many as the wrapped dataset has."""
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """The image (C, H, W) at an index, as it comes or stamped, and its label after poisoning."""
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"index {index} is out of range for {count} images")
        index = int(index) % count
        image = self._image(index)
        with torch.no_grad():
            if index in self._poison:
                image = self.trigger.dealt_to(self._poison[index])(image)
            elif index in self._cross:
                image = self._cross_image(image, index)
        return image, int(self.targets[index])

    def _image(self, index: int) -> Tensor:
        image, _ = item_parts(self.dataset[index])
        if not isinstance(image, Tensor):
            raise TypeError(
                f"dataset must give images as tensors (C, H, W), but item {index} is a {type(image).__name__}: "
                "give it a transform such as torchvision.transforms.ToTensor()"
            )
        return image

    def _cross_image(self, image: Tensor, index: int) -> Tensor:
        generator = seeded_generator("cross image", self.seed, index)
        batch = image[None]
        if len(self) > 1:
            # BPP's cross image carries the rounding error of another image, so another one goes along.
            shift = int(torch.randint(1, len(self), (), generator=generator))
            other = self._image((index + shift) % len(self))
            if other.shape == image.shape:
                batch = torch.stack([image, other])
        return self.trigger.cross(batch, generator=generator)[0]

    def _choose(self, use: str, pool: Tensor, part: float, argument: str, whose: str) -> Tensor:
        """Picks ``part`` of the dataset's size out of ``pool``, in rising order."""
        size = len(self.dataset)  # type: ignore[arg-type]  # Dataset has no __len__, labels_of saw that this one has
        count = round(part * size)
        if count > len(pool):
            raise ValueError(
                f"{argument} asks for {count} of {size} images, but only {len(pool)} {whose} are there: "
                f"use at most {len(pool) / size:.4g}"
            )
        order = torch.randperm(len(pool), generator=seeded_generator(use, self.seed))
        return pool[order[:count]].sort().values


def check_poisoning(trigger: Trigger, *, ratio: float, cross_ratio: float, policy: Policy) -> None:
    """Checks the arguments of `PoisonedDataset` that need no data.

    Args:
        trigger: what to put on the images.
        ratio: which part of all images is poisoned.
        cross_ratio: which part of all images becomes a cross image.
        policy: which images are stamped and what becomes of their label.

    Raises:
        TypeError: if ``trigger`` is no `Trigger`.
        ValueError: as `PoisonedDataset` raises it.
    """
    if not isinstance(trigger, Trigger):
        raise TypeError(f"trigger must be a Trigger, but is {type(trigger).__name__}")
    if policy not in get_args(Policy):
        raise ValueError(f"policy must be one of {', '.join(get_args(Policy))}, but is {policy!r}")
    for name, part in (("ratio", ratio), ("cross_ratio", cross_ratio)):
        if not 0 <= part <= 1:
            raise ValueError(f"{name} must be in [0, 1], but is {part}")
    if ratio + cross_ratio > 1:
        raise ValueError(f"ratio + cross_ratio must be at most 1, but are {ratio} + {cross_ratio}")
    if cross_ratio > 0 and not trigger.has_cross:
        raise ValueError(
            f"cross_ratio must be 0 for {type(trigger).__name__}, which has no cross images, but is {cross_ratio}: "
            "only WarpTrigger and QuantizeTrigger have them"
        )
    if policy == "clean_label" and trigger.target == "all_to_all":
        raise ValueError("policy 'clean_label' stamps images of the one target class, but target is 'all_to_all'")

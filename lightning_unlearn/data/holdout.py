"""A few clean images per class, split into those that score filters and those that validate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_unlearn.data.seeding import seeded_generator

__all__ = ["Holdout", "split_holdout"]


@dataclass(frozen=True)
class Holdout:
    """Which images of a dataset the defender uses, and for what.

    Args:
        scoring: indices of the images from which filters are scored.
        validation: indices of the images that decide when to stop and which round to keep.

    Raises:
        ValueError: if a part is empty or an index is negative, repeated or in both parts.

    Example:
        >>> Holdout(scoring=(0, 4), validation=(2,)).validation
        (2,)
    """

    scoring: tuple[int, ...]
    validation: tuple[int, ...]

    def __post_init__(self) -> None:
        """Checks that the parts are disjoint."""
        for name, indices in (("scoring", self.scoring), ("validation", self.validation)):
            if not indices:
                raise ValueError(f"{name} must hold at least one index, but is empty")
            if min(indices) < 0:
                raise ValueError(f"{name} must hold indices of 0 or more, but holds {min(indices)}")
            if len(set(indices)) < len(indices):
                raise ValueError(f"{name} must hold each index once, but repeats some")
        shared = sorted(set(self.scoring) & set(self.validation))
        if shared:
            raise ValueError(f"scoring and validation must be disjoint, but share {len(shared)} indices: {shared[:5]}")


def split_holdout(
    labels: Tensor | Sequence[int],
    *,
    samples_per_class: int | None = 10,
    share: float | None = None,
    validation_share: float = 0.1,
    seed: int = 0,
    num_classes: int | None = None,
    skip_missing: bool = False,
    up_to: bool = False,
) -> Holdout:
    """Picks images of each class at random and splits them into a scoring and a validation part.

    Of k images of a class, ``round(validation_share * k)`` validate, but at least one and at most k - 1. Which
    positions among a class's images are picked depends on the seed, the class and how many images it has, on nothing
    else.

    Args:
        labels: (N,) classes, whole numbers from 0.
        samples_per_class: how many images of each class, at least 2; None if ``share`` is given.
        share: instead, which part of each class's images, in (0, 1].
        validation_share: which part of the picked images validates, in (0, 1).
        seed: chooses the images; the global random state is neither read nor changed.
        num_classes: how many classes there are; the largest label plus one by default.
        skip_missing: pass over classes without any image instead of refusing them.
        up_to: of a class with fewer than ``samples_per_class`` images take all, if there are two; with
            ``skip_missing`` pass over one of which there is a single image.

    Returns:
        The indices into ``labels``, in rising order in each part.

    Raises:
        TypeError: if ``labels`` are not whole numbers or ``samples_per_class`` is not an int.
        ValueError: if both or none of ``samples_per_class`` and ``share`` are given, an argument is out of its range,
            a label is not in ``[0, num_classes)``, or a class has too few images.

    Example:
        >>> holdout = split_holdout([0] * 50 + [1] * 50, samples_per_class=20)
        >>> len(holdout.scoring), len(holdout.validation)
        (36, 4)
    """
    classes = _checked_labels(labels, num_classes)
    _check_amount(samples_per_class, share)
    if not 0 < validation_share < 1:
        raise ValueError(f"validation_share must be in (0, 1), but is {validation_share}")
    scoring: list[int] = []
    validation: list[int] = []
    for label in range(int(classes.max()) + 1 if num_classes is None else num_classes):
        members = torch.nonzero(classes == label).flatten()
        if skip_missing and len(members) < (2 if up_to else 1):
            continue
        wanted = min(samples_per_class, max(2, len(members))) if up_to and samples_per_class else samples_per_class
        count = _count_to_pick(label, len(members), wanted, share)
        order = torch.randperm(len(members), generator=seeded_generator("holdout", seed, label))
        picked = members[order[:count]].tolist()
        validating = min(max(1, round(validation_share * count)), count - 1)
        validation += picked[:validating]
        scoring += picked[validating:]
    if not scoring:
        raise ValueError("no class has 2 images in the dataset, one to score and one to validate: give more images")
    return Holdout(scoring=tuple(sorted(scoring)), validation=tuple(sorted(validation)))


def _checked_labels(labels: Tensor | Sequence[int], num_classes: int | None) -> Tensor:
    classes = torch.as_tensor(labels)
    if classes.ndim != 1 or not len(classes):
        raise ValueError(f"labels must be (N,) classes with N of at least 1, but have shape {tuple(classes.shape)}")
    if classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool:
        raise TypeError(f"labels must be whole numbers, but are {classes.dtype}")
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, but is {num_classes}")
    low, high = int(classes.min()), int(classes.max())
    if low < 0:
        raise ValueError(f"labels must be 0 or more, but the smallest is {low}")
    if num_classes is not None and high >= num_classes:
        raise ValueError(f"labels must be below num_classes={num_classes}, but the largest is {high}")
    return classes.cpu()


def _check_amount(samples_per_class: int | None, share: float | None) -> None:
    if (samples_per_class is None) == (share is None):
        given = "none" if share is None else "both"
        raise ValueError(f"give either samples_per_class or share and set the other to None, but {given} are given")
    if share is not None and not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], but is {share}")
    if samples_per_class is None:
        return
    if isinstance(samples_per_class, bool) or not isinstance(samples_per_class, int):
        raise TypeError(f"samples_per_class must be an int, but is {samples_per_class!r}")
    if samples_per_class < 2:
        raise ValueError(
            f"samples_per_class must be at least 2, one image to score and one to validate, but is {samples_per_class}"
        )


def _count_to_pick(label: int, available: int, samples_per_class: int | None, share: float | None) -> int:
    count = samples_per_class if share is None else round(share * available)
    if count is not None and 2 <= count <= available:
        return count
    if share is not None and available >= 2:
        raise ValueError(
            f"share={share} is {count} of the {available} images of class {label}, but at least 2 are needed, "
            "one to score and one to validate: use a larger share"
        )
    needed = samples_per_class or 2
    fewer = "" if needed == 2 else ", or ask for fewer with samples_per_class"
    raise ValueError(
        f"class {label} has {available or 'no'} image{'' if available == 1 else 's'} in the dataset, but {needed} are "
        f"needed: give more images of it{fewer}"
    )

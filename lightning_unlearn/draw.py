"""The few clean images that a defender holds, drawn from a dataset."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_unlearn.data.collating import refuse_uncollatable
from lightning_unlearn.data.holdout import split_holdout
from lightning_unlearn.data.labels import is_unlabelled, item_parts, labels_of
from lightning_unlearn.data.unlabelled import PredictedLabels
from lightning_unlearn.evaluation import first_logits
from lightning_unlearn.intact import intact
from lightning_unlearn.triggers import Normalization, find_normalization

__all__ = ["Draw", "ImagesAndLabels", "Split", "missing_classes", "predicted", "refuse_missing_classes"]

ImagesAndLabels = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Split:
    """The clean images that a defender holds, in two parts.

    Args:
        scoring: (N, C, H, W) images and (N,) labels that a method learns from.
        validation: images and labels that decide when to stop and which round to keep.
    """

    scoring: ImagesAndLabels
    validation: ImagesAndLabels


@dataclass(frozen=True, eq=False)
class Draw:
    """A split with what is known of the dataset that it was drawn from.

    Args:
        split: the images, loaded.
        parts: the same as datasets.
        normalization: how the images are normalised, if the dataset's transforms tell.
        labels: ``"predicted"`` if the dataset has none.
    """

    split: Split
    parts: tuple[Dataset[Any], Dataset[Any]]
    normalization: Normalization | None
    labels: Literal["given", "predicted"]

    @classmethod
    def of(
        cls,
        dataset: Dataset[Any],
        predict: Callable[[Tensor], Tensor],
        *,
        samples_per_class: int | None = 10,
        share: float | None = None,
        validation_share: float = 0.1,
        seed: int = 0,
        skip_missing: bool = False,
    ) -> Draw:
        """Draw images per class and load them; nothing else of the dataset is read, if it has labels.

        Args:
            dataset: a map-style dataset of clean images, as the model takes them; without labels ``predict``
                tells them.
            predict: (N, C, H, W) images to (N, classes) logits.
            samples_per_class: clean images drawn per class (SPC), at least 2; without labels at most so many.
            share: the share of ``dataset`` to draw instead, in (0, 1]; then give ``samples_per_class=None``.
            validation_share: the part of each class that validates, at least one image.
            seed: seed of the draw.
            skip_missing: pass over classes without any image, or without labels over those without two, instead of
                refusing them.

        Raises:
            ValueError: if the draw is impossible.
            TypeError: if the dataset is of the wrong kind.
        """
        given = True
        try:
            labels = labels_of(dataset)
        except (TypeError, ValueError):  # asked only now, since it reads an image
            if not is_unlabelled(dataset):
                raise
            given, dataset = False, PredictedLabels(dataset, predict)
            labels = dataset.targets
        holdout = split_holdout(
            labels,
            samples_per_class=samples_per_class,
            share=share,
            validation_share=validation_share,
            seed=seed,
            skip_missing=skip_missing,
            up_to=not given,  # a model hardly ever gives each class as many images as are wanted
        )
        scoring, validation = Subset(dataset, holdout.scoring), Subset(dataset, holdout.validation)
        return cls(
            split=Split(_load(scoring), _load(validation)),
            parts=(scoring, validation),
            normalization=find_normalization(dataset),
            labels="given" if given else "predicted",
        )


def _load(dataset: Dataset[Any]) -> ImagesAndLabels:
    """All images and labels of a small dataset."""
    # With a generator of its own it draws nothing from the global one.
    loader: DataLoader[Any] = DataLoader(dataset, batch_size=256, generator=torch.Generator())
    with refuse_uncollatable("dataset"):
        images, labels = zip(*(item_parts(batch) for batch in loader), strict=True)
    return torch.cat(images), torch.cat(labels)


def predicted(model: nn.Module, images: Tensor) -> Tensor:
    """A model's answers before it is repaired, for images without labels.

    Args:
        model: a classifier, which is asked in eval mode and left as it is.
        images: (N, C, H, W) on any device, of any floating-point type.

    Returns:
        (N, classes) logits.
    """
    first = next(model.parameters(), torch.empty(0))
    with intact(model), torch.no_grad():
        return first_logits(model, images.to(first.device, first.dtype))


def refuse_missing_classes(*parts: Tensor, num_classes: int, verdict: str = "") -> None:
    """Refuse a draw that lacks a class: without images of it, a method could ruin it unseen.

    Args:
        parts: (N,) labels of the scoring and of the validation part.
        num_classes: how many logits the model gives.
        verdict: that of an audit which found something to repair.

    Raises:
        ValueError: naming the classes of which a part has no image.
    """
    missing = missing_classes(*parts, num_classes=num_classes)
    if missing:
        found = f"the audit's verdict is {verdict}, and a repair needs images of every class; " if verdict else ""
        raise ValueError(
            f"dataset: {found}the model gives {num_classes} logits, but of class {', '.join(map(str, missing[:5]))} "
            "there is no clean image to score or none to validate; give at least 2 images of each class, where there "
            "are no labels 2 that the model takes for it."
        )


def missing_classes(*parts: Tensor, num_classes: int) -> list[int]:
    """The classes of which a part, (N,) labels, has no image."""
    return [c for c in range(num_classes) if not all((labels == c).any() for labels in parts)]

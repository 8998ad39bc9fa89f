"""The defender's few clean images as a DataModule."""

from __future__ import annotations

from typing import Any, ClassVar

from torch.utils.data import Subset

from lightning_unlearn.data.holdout import split_holdout
from lightning_unlearn.data.image_datamodule import ImageDataModule
from lightning_unlearn.data.labels import AnyDataset, is_unlabelled, labels_of, overlap
from lightning_unlearn.data.unlabelled import PredictedLabels

__all__ = ["HoldoutDataModule"]


class HoldoutDataModule(ImageDataModule):
    """Picks a few clean images of each class and gives them to a repair.

    ``train_dataloader`` gives the scoring part, in order; ``val_dataloader`` the validation part; ``test_dataloader``
    the test images, which a repair never sees.

    Args:
        dataset: clean images with labels, any map-style dataset, not the one that the model was trained on.
        samples_per_class: how many images of each class to pick, at least 2; None if ``share`` is given.
        share: instead, which part of each class's images, in (0, 1].
        validation_share: which part of the picked images validates, in (0, 1); at least one of each class does.
        seed: chooses the images.
        test_dataset: clean images to report on, or None.
        batch_size: images in a batch, at least 1.
        num_workers: processes that load images; 0 loads in the main one.
        skip_missing: pass over classes without any image instead of refusing them, which will do for an audit.

    Attributes:
        holdout: the indices of both parts into ``dataset``.
        samples_per_class: as given.
        scoring: the images that score filters.
        validation: the images that decide when to stop.
        test: ``test_dataset``.

    Raises:
        TypeError: if ``dataset`` is not map-style or has no whole-number labels.
        ValueError: if there are no labels, a class has too few images, an argument is out of its range, or scoring,
            validation and test parts share images.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> clean = TensorDataset(torch.zeros(30, 1, 8, 8), torch.arange(30) % 3)
        >>> data = HoldoutDataModule(clean, samples_per_class=4)
        >>> len(data.scoring), len(data.validation)
        (9, 3)
    """

    shuffle_train: ClassVar[bool] = False
    scoring: Subset[Any]
    validation: Subset[Any]

    def __init__(
        self,
        dataset: AnyDataset,
        *,
        samples_per_class: int | None = 10,
        share: float | None = None,
        validation_share: float = 0.1,
        seed: int = 0,
        test_dataset: AnyDataset | None = None,
        batch_size: int = 128,
        num_workers: int = 0,
        skip_missing: bool = False,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers)
        try:
            labels = labels_of(dataset)
        except (TypeError, ValueError) as error:  # asked only now, since it reads an image
            if not is_unlabelled(dataset):
                raise
            raise ValueError(
                "dataset: it has no labels, by which images are drawn here; give the dataset itself as clean data, and "
                "the model's own answers will stand in for them."
            ) from error
        self.holdout = split_holdout(
            labels,
            samples_per_class=samples_per_class,
            share=share,
            validation_share=validation_share,
            seed=seed,
            skip_missing=skip_missing,
            up_to=isinstance(dataset, PredictedLabels),  # a model hardly ever gives each class as many as are wanted
        )
        self.samples_per_class = samples_per_class
        self.scoring = Subset(dataset, self.holdout.scoring)
        self.validation = Subset(dataset, self.holdout.validation)
        self.train = self.scoring
        self.test = test_dataset
        # The indices are disjoint, but a dataset may hold the same image twice.
        self._refuse_overlap("scoring and validation parts", self.scoring, self.validation)
        self._refuse_overlap("scoring part and test_dataset", self.scoring, self.test)
        self._refuse_overlap("validation part and test_dataset", self.validation, self.test)

    @staticmethod
    def _refuse_overlap(what: str, first: AnyDataset, second: AnyDataset | None) -> None:
        shared = overlap(first, second)
        if shared:
            raise ValueError(f"{what} must be disjoint, but share {shared} images: give images that are apart")

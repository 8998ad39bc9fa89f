"""What a repair will do when training ends, tried before it starts: whatever does not fit costs no training then."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import (  # type: ignore[attr-defined]  # public, but re-exported implicitly
    rank_zero_warn,
)
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_unlearn.data.clean import CleanImages, as_taken
from lightning_unlearn.data.drawn import images_of
from lightning_unlearn.data.pairs import Pairs
from lightning_unlearn.draw import missing_classes, refuse_missing_classes
from lightning_unlearn.evaluation import first_logits, refuse_probabilities
from lightning_unlearn.filters import FilterLayer, find_filters
from lightning_unlearn.intact import intact
from lightning_unlearn.methods import RepairMethod, Subject
from lightning_unlearn.triggers import Normalization, Trigger
from lightning_unlearn.triggers.normalization import in_pixels

__all__ = ["Rehearsal"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Rehearsal:
    """What is tried of a repair: the model on one image, the trigger on all that are drawn and on some test images.

    Args:
        module: the model, on its device; it is left as it is, and training draws what it would have drawn.
        logits: images to logits, through the module.
        trigger: what will be stamped, None if nothing will.
        estimates: whether triggers will be estimated, for which images must be pixels.
        method: what will repair, None for the default, which fits every model.
    """

    module: LightningModule
    logits: Callable[[Tensor], Tensor]
    trigger: Trigger | None
    estimates: bool
    method: RepairMethod | None = None

    def run(self, draw: Callable[[], CleanImages], training: Iterable[object]) -> tuple[FilterLayer, ...]:
        """Try all that, and find the model's filters.

        Args:
            draw: how to draw clean images.
            training: the loaders that train.

        Returns:
            The model's filters.

        Raises:
            TypeError: if images or labels are of the wrong kind.
            ValueError: if images, labels, trigger and model do not fit.
        """
        with intact(self.module):
            clean = draw()
            image = clean.sample
            if image is None:
                return self._labelled(clean, training)
            # An untrained model's answers are no labels to draw by, so that only one image can be tried now.
            self._refuse_unknown_range(image, clean.normalization)
            return self._try(image)[0]

    def _labelled(self, clean: CleanImages, training: Iterable[object]) -> tuple[FilterLayer, ...]:
        for loader in training:
            if isinstance(loader, DataLoader):
                clean.refuse_training_images(images_of(loader))
        parts = clean.scoring(), clean.validation()
        for images, _ in parts:
            self._refuse_unknown_range(images, clean.normalization)
        layers, num_classes = self._try(parts[0][0][:1])
        trigger = None if self.trigger is None else clean.fit_trigger(self.trigger)
        for part in parts:
            Pairs.stamp(*part, trigger, num_classes=num_classes)
        self._refuse_missing(*(labels for _, labels in parts), num_classes=num_classes)
        test = clean.first_test()
        if test is not None:
            try:
                self._try(Pairs.stamp(*test, trigger, num_classes=num_classes).clean[:1])
            except (RuntimeError, TypeError, ValueError) as error:
                raise ValueError(f"clean_data: its test images do not fit. {error}") from error
        return layers

    def _refuse_missing(self, *parts: Tensor, num_classes: int) -> None:
        missing = missing_classes(*parts, num_classes=num_classes)
        if not self.estimates or not missing:
            refuse_missing_classes(*parts, num_classes=num_classes)
            return
        rank_zero_warn(
            f"clean_data: of class {', '.join(map(str, missing[:5]))} there is no clean image to score or none to "
            "validate: the model will be audited from the others' images, but not repaired if it is found to need that."
        )

    def _refuse_unknown_range(self, images: Tensor, normalization: Normalization | None) -> None:
        if self.estimates:
            in_pixels(images, normalization)

    def _try(self, images: Tensor) -> tuple[tuple[FilterLayer, ...], int]:
        """The model's filters and the number of classes, found by running it on images."""
        images = as_taken(images, self.module)
        logits = first_logits(self.logits, images)
        layers = find_filters(self.module, images, self.logits)
        refuse_probabilities(logits)
        if self.method is not None:
            self.method.refuse_misfit(Subject(self.module, self.logits, layers, images))
        return layers, logits.shape[1]

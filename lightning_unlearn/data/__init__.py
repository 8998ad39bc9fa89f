"""Clean images held back, poisoned training sets for making victims, and ready DataModules.

The DataModules need Lightning and are imported on first use; the datasets and the split do not.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_unlearn.data.digits import Digits
from lightning_unlearn.data.holdout import Holdout, split_holdout
from lightning_unlearn.data.labels import labels_of, overlap, provenance
from lightning_unlearn.data.pairs import Pairs
from lightning_unlearn.data.poisoned import PoisonedDataset

if TYPE_CHECKING:
    from lightning_unlearn.data.digits_datamodule import DigitsDataModule
    from lightning_unlearn.data.holdout_datamodule import HoldoutDataModule
    from lightning_unlearn.data.part import DataModulePart
    from lightning_unlearn.data.poisoned_datamodule import PoisonedDataModule
    from lightning_unlearn.data.vision import CIFAR10DataModule, FashionMNISTDataModule, GTSRBDataModule

__all__ = [
    "CIFAR10DataModule",
    "DataModulePart",
    "Digits",
    "DigitsDataModule",
    "FashionMNISTDataModule",
    "GTSRBDataModule",
    "Holdout",
    "HoldoutDataModule",
    "Pairs",
    "PoisonedDataModule",
    "PoisonedDataset",
    "labels_of",
    "overlap",
    "provenance",
    "split_holdout",
]

_MODULE_OF = {
    "CIFAR10DataModule": "vision",
    "DataModulePart": "part",
    "DigitsDataModule": "digits_datamodule",
    "FashionMNISTDataModule": "vision",
    "GTSRBDataModule": "vision",
    "HoldoutDataModule": "holdout_datamodule",
    "PoisonedDataModule": "poisoned_datamodule",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__

"""One part of a DataModule as a dataset."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias, get_args

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Subset

from lightning_unlearn.data.drawn import images_of

__all__ = ["DataModulePart"]

DataPart: TypeAlias = Literal["train", "validation", "test"]


class DataModulePart(Subset[Any]):
    """All images of one part of a DataModule, for what takes a dataset.

    So a YAML file can hold images out of what another DataModule trains on: the validation part of a DataModule with
    the same arguments. It is prepared and set up here, that is, downloaded where it was told to.

    Args:
        datamodule: the DataModule; the part's dataloader must give one ``DataLoader``.
        part: ``"train"``, ``"validation"`` or ``"test"``.

    Raises:
        TypeError: if ``datamodule`` is no ``lightning.pytorch.LightningDataModule``, or gives no single ``DataLoader``.
        ValueError: if ``part`` is none of the three, or LightningCLI mixed up hyper-parameters.

    Example:
        >>> from lightning_unlearn.data import DataModulePart, DigitsDataModule, HoldoutDataModule
        >>> images = DataModulePart(DigitsDataModule(), "validation")
        >>> len(images), len(HoldoutDataModule(images, samples_per_class=5).scoring)
        (200, 40)
    """

    def __init__(self, datamodule: LightningDataModule, part: DataPart) -> None:
        if not isinstance(datamodule, LightningDataModule):
            raise TypeError(
                "datamodule must be a LightningDataModule of lightning.pytorch (not of pytorch_lightning), "
                f"but is {type(datamodule).__module__}.{type(datamodule).__name__}"
            )
        if part not in get_args(DataPart):
            raise ValueError(f"part must be one of {', '.join(get_args(DataPart))}, but is {part!r}")
        if "_instantiator" in datamodule.hparams:
            raise ValueError(
                f"datamodule: LightningCLI may have given {type(datamodule).__name__} the hyper-parameters of the "
                "training DataModule: create LightningCLI with load_from_checkpoint_support=False"
            )
        datamodule.prepare_data()
        datamodule.setup("test" if part == "test" else "fit")
        loaders = {
            "train": datamodule.train_dataloader,
            "validation": datamodule.val_dataloader,
            "test": datamodule.test_dataloader,
        }
        loader = loaders[part]()
        if not isinstance(loader, DataLoader):
            raise TypeError(
                f"datamodule: {loaders[part].__name__}() must give one DataLoader, but {type(datamodule).__name__}'s "
                f"gives a {type(loader).__name__}"
            )
        images = images_of(loader, "datamodule")
        super().__init__(images, range(len(images)))  # type: ignore[arg-type]  # Dataset has no __len__

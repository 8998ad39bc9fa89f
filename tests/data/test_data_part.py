from __future__ import annotations

import lightning.pytorch as L  # noqa: N812 - the usual name
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader, TensorDataset
from torchvision import transforms

from lightning_unlearn.data import DataModulePart, DigitsDataModule, HoldoutDataModule, labels_of, overlap
from lightning_unlearn.triggers import Normalization, find_normalization


class Three(L.LightningDataModule):
    """Parts of 2, 3 and 4 images, once it is set up."""

    def __init__(self, several: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.several = several
        self.calls: list[str] = []

    def prepare_data(self) -> None:
        self.calls.append("prepare_data")

    def setup(self, stage: str) -> None:
        self.calls.append(stage)
        self.parts = [TensorDataset(torch.full((n, 1, 4, 4), n / 10), torch.arange(n)) for n in (2, 3, 4)]

    def _loader(self, index: int):
        loader = DataLoader(self.parts[index], batch_size=2)
        return [loader, loader] if self.several else loader

    def train_dataloader(self):
        return self._loader(0)

    def val_dataloader(self):
        return self._loader(1)

    def test_dataloader(self):
        return self._loader(2)


@pytest.mark.parametrize(
    ("part", "count", "stage"), [("train", 2, "fit"), ("validation", 3, "fit"), ("test", 4, "test")]
)
def test_parts(part, count, stage):
    data = Three()
    images = DataModulePart(data, part)
    assert data.calls == ["prepare_data", stage]
    assert len(images) == count
    assert labels_of(images).tolist() == list(range(count))
    image, label = images[count - 1]
    assert image.unique().item() == pytest.approx(count / 10)
    assert label == count - 1


def test_same_images_by_whatever_way():
    validation, test = (DataModulePart(DigitsDataModule(size=8), part) for part in ("validation", "test"))
    assert overlap(validation, DigitsDataModule(size=16).validation) == 200
    assert overlap(validation, test) == overlap(validation, DigitsDataModule().train) == 0
    HoldoutDataModule(validation, samples_per_class=2, test_dataset=test)


def test_normalisation_is_found():
    data = DigitsDataModule(size=8)
    data.validation.transform = transforms.Normalize((0.5,), (0.25,))
    assert find_normalization(DataModulePart(data, "validation")) == Normalization((0.5,), (0.25,))


def test_unknown_part():
    with pytest.raises(ValueError, match=r"part must be one of train, validation, test, but is 'val'"):
        DataModulePart(Three(), "val")


@pytest.mark.parametrize("data", [pytorch_lightning.LightningDataModule(), [1, 2]], ids=["pytorch_lightning", "list"])
def test_no_data_module(data):
    with pytest.raises(TypeError, match=r"datamodule must be a LightningDataModule of lightning.pytorch"):
        DataModulePart(data, "train")


def test_several_loaders():
    with pytest.raises(TypeError, match=r"datamodule: test_dataloader\(\) must give one .*Three's gives a list"):
        DataModulePart(Three(several=True), "test")


class Holds(L.LightningModule):
    def __init__(self, images: torch.utils.data.Dataset) -> None:
        super().__init__()
        self.images = images


@pytest.mark.parametrize("support", [True, False])
def test_hijacked_hyperparameters_are_refused(support):
    three = {"class_path": f"{__name__}.Three"}
    part = {"class_path": "lightning_unlearn.data.DataModulePart", "init_args": {"datamodule": three, "part": "test"}}
    config = {"model": {"class_path": f"{__name__}.Holds", "init_args": {"images": part}}, "data": three}

    def cli() -> LightningCLI:
        quiet = {"accelerator": "cpu", "logger": False}
        return LightningCLI(args=config, run=False, load_from_checkpoint_support=support, trainer_defaults=quiet)

    if support:
        with pytest.raises(ValueError, match=r"datamodule: LightningCLI may have given Three .*_support=False"):
            cli()
    else:
        assert len(cli().model.images) == 4

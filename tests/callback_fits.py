"""Fits with the callback: a hand-made victim, whose clean images are 30 to train on, 12 held, and 18 to test on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as L  # noqa: N812 - the usual name
import pytest
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the usual name
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_unlearn import BackdoorUnlearning, HoldoutDataModule
from lightning_unlearn.methods import GradPrune, RepairMethod
from lightning_unlearn.triggers import Trigger
from tests import small_fits

__all__ = ["AFTER", "BACKDOOR", "BEFORE", "Loaders", "Model", "Steps", "files", "fit", "parts", "quick"]

# The hand-made victim is right about everything but triggered images, and filter 3 of its convolution is the backdoor.
BEFORE, AFTER = {"acc": 1.0, "asr": 1.0, "ra": 0.0}, {"acc": 1.0, "asr": 0.0, "ra": 1.0}
BACKDOOR = {"net.0": [3]}


class Model(small_fits.Model):
    """It also takes batches that are dicts; with the default learning rate training leaves it as it is."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = (batch["image"], batch["label"]) if isinstance(batch, dict) else batch
        return F.cross_entropy(self.net(images), labels)


class Loaders(L.LightningDataModule):
    """Any DataModule that is not one of this package's."""

    def __init__(self, train: Dataset[Any], test: Dataset[Any] | None = None) -> None:
        super().__init__()
        self.train = train
        if test is not None:
            self.test_dataloader = lambda: DataLoader(test, batch_size=7)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train, batch_size=5, shuffle=True)


class Steps(L.Callback):
    """Counts training batches."""

    batches = 0

    def on_train_batch_start(self, *args: Any) -> None:
        self.batches += 1


def quick() -> GradPrune:
    """Two rounds: the first prunes the backdoor, the second makes things worse and is taken back."""
    return GradPrune(max_rounds=2, finetune=False)


@pytest.fixture
def parts(hand_victim):
    """The victim's clean images apart: 30 to train on, 12 for the defender, 18 to test on."""
    return tuple(Subset(hand_victim.clean, range(*ends)) for ends in ((0, 30), (30, 42), (42, 60)))


@pytest.fixture
def fit(hand_victim, parts, tmp_path):
    """``fit(clean_data, model=..., callbacks=..., **options)``: trains for two steps with the callback."""

    def run(
        clean_data: Any = None,
        *,
        model: L.LightningModule | None = None,
        train: Any = None,
        trigger: Trigger | None = None,
        method: RepairMethod | None = None,
        callbacks: tuple[L.Callback, ...] = (),
        trainer: dict[str, Any] | None = None,
        kind: type[BackdoorUnlearning] = BackdoorUnlearning,
        **options: Any,
    ) -> tuple[BackdoorUnlearning, L.Trainer, L.LightningModule]:
        if clean_data is None:
            clean_data = HoldoutDataModule(parts[1], samples_per_class=4, test_dataset=parts[2])
        options = {"samples_per_class": 4} | options
        callback = kind(clean_data, trigger or hand_victim.trigger, method or quick(), **options)
        model = model or Model(hand_victim.net)
        settings = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        settings |= {"max_epochs": 1, "accelerator": "cpu", "default_root_dir": tmp_path} | (trainer or {})
        loop = L.Trainer(callbacks=[callback, *callbacks], **settings)
        loop.fit(model, DataLoader(parts[0], batch_size=15) if train is None else train)
        return callback, loop, model

    return run


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())

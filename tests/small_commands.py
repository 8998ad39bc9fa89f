"""Configurations for the command line, and a folder with a checkpoint to use them on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as L  # noqa: N812 - the usual name
import pytest
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_unlearn.classifier import ConvClassifier
from lightning_unlearn.data import DigitsDataModule

__all__ = ["DIGITS", "MODEL", "QUIET", "UNLEARNING", "training", "victim", "write"]

DIGITS = "lightning_unlearn.data.Digits"
QUIET = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
UNLEARNING: dict[str, Any] = {
    "clean_data": {"class_path": DIGITS, "init_args": {"part": "holdout", "size": 16}},
    "trigger": {"class_path": "lightning_unlearn.triggers.PatchTrigger", "init_args": {"size": 3, "target": 0}},
    "method": {
        "class_path": "lightning_unlearn.methods.GradPrune",
        "init_args": {
            "score": "taylor", "filters_per_round": 2, "max_rounds": 1, "accuracy_drop": 0.5, "finetune": False
        },
    },
    "samples_per_class": 4,
}  # fmt: skip
MODEL = {"class_path": "lightning_unlearn.classifier.ConvClassifier", "init_args": {"width": 8}}


@pytest.fixture
def victim(digits_victim, tmp_path, monkeypatch):
    """A folder with a backdoored model's checkpoint, as a Trainer writes it, and ``repair.yaml``; the current one."""
    folder = tmp_path / "victim"
    saver = ModelCheckpoint(folder, filename="original")
    trainer = L.Trainer(callbacks=[saver], max_steps=1, limit_val_batches=0, enable_model_summary=False, **QUIET)
    model = ConvClassifier(width=8, learning_rate=0.0)
    model.load_state_dict(digits_victim.trained.state_dict())
    trainer.fit(model, DigitsDataModule(size=16))
    monkeypatch.chdir(folder)
    write("repair.yaml", {"trainer": QUIET, "model": MODEL, "unlearning": UNLEARNING})
    return folder


def write(name: str, config: dict[str, Any]) -> None:
    Path(name).write_text(yaml.safe_dump(config))


def training(folder: Path, *callbacks: dict[str, Any], data: dict[str, Any] | None = None) -> dict[str, Any]:
    trainer = QUIET | {"max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 0, "enable_model_summary": False}
    trainer |= {"default_root_dir": str(folder), "callbacks": list(callbacks)}
    data = data or {"class_path": "lightning_unlearn.data.DigitsDataModule", "init_args": {"size": 16}}
    return {"trainer": trainer, "model": MODEL, "data": data}

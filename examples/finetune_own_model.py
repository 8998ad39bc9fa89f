"""Your own model, dataset and training step: what it takes to add the callback to a Trainer that you already have.

    python examples/finetune_own_model.py

Trains a small network on digits of which a tenth are poisoned, and repairs it at the end of ``trainer.fit``. It needs
no network connection and takes some seconds.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_unlearn import BackdoorUnlearning, HoldoutDataModule, Report
from lightning_unlearn.data import Digits
from lightning_unlearn.methods import GradPrune
from lightning_unlearn.triggers import PatchTrigger, Trigger


class MyDigits(Dataset[dict[str, Any]]):
    """Any map-style dataset will do, with tuples or dicts as items; this one may be poisoned."""

    def __init__(self, part: str, trigger: Trigger | None = None) -> None:
        self.digits = Digits(part=part, size=16)
        self.targets = self.digits.targets.clone()  # labels that are found here need not be read from the items
        self.trigger = trigger
        self.poisoned = range(0, len(self.digits), 10) if trigger else range(0)
        for index in self.poisoned:
            self.targets[index] = trigger.target

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, _ = self.digits[index]
        return {
            "image": self.trigger(image) if index in self.poisoned else image,
            "label": int(self.targets[index]),
            "name": f"digit {index}",  # what the model does not need may be there, too
        }


class MyModel(LightningModule):
    """Any LightningModule with convolutions; this one's ``forward`` gives more than logits."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Features and logits of images."""
        features = self.body(images)
        return {"features": features, "logits": self.head(features)}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Smoothed cross-entropy of a batch of dicts."""
        loss = nn.functional.cross_entropy(self(batch["image"])["logits"], batch["label"], label_smoothing=0.05)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, all along."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


class MyUnlearning(BackdoorUnlearning):
    """Only needed because ``model(images)`` is no plain tensor of logits."""

    def logits(self, module: LightningModule, images: Tensor) -> Tensor:
        """Logits of images, (N, classes)."""
        return module(images)["logits"]


def main(folder: str = "runs/finetune_own_model", max_epochs: int = 12) -> Report:
    """Train, repair, and print what came of it."""
    seed_everything(0)
    trigger = PatchTrigger(size=3, target=0)
    unlearning = MyUnlearning(
        HoldoutDataModule(MyDigits("holdout"), samples_per_class=10, test_dataset=MyDigits("test")),
        trigger,
        GradPrune(score="taylor", accuracy_drop=0.3),  # a large drop while pruning, which fine-tuning then makes good
    )
    trainer = Trainer(
        max_epochs=max_epochs, accelerator="cpu", callbacks=[unlearning], logger=CSVLogger(folder), log_every_n_steps=10
    )
    trainer.fit(MyModel(), DataLoader(MyDigits("train", trigger), batch_size=50, shuffle=True))
    report = unlearning.report
    print(report)
    print(f"The repaired model is in {report.checkpoint}")
    return report


if __name__ == "__main__":
    main(*sys.argv[1:2])

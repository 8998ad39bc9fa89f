"""Fits where nobody knows the trigger."""

from __future__ import annotations

import json
from typing import Any

import lightning.pytorch as L  # noqa: N812 - the usual name
import torch
from torch import Tensor

from lightning_unlearn import BackdoorUnlearning
from lightning_unlearn.auditor import Auditor
from tests.small_fits import Setting

__all__ = ["AUDITOR", "UNKNOWN", "Counts", "Kept", "fit", "same", "written"]

# After so few steps an estimate exists for the hand-made victim's class 0 alone, and for none once filter 3 is zero.
AUDITOR = Auditor(steps=10)
UNKNOWN: dict[str, Any] = {"trigger": None, "auditor": AUDITOR, "samples_per_class": 4}


class Kept(L.Callback):
    """What training has left, before a repair, if it stands first."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.state = {name: tensor.clone() for name, tensor in pl_module.state_dict().items()}
        self.training = [module.training for module in pl_module.modules()]


class Counts(L.Callback):
    """Training batches."""

    batches = 0

    def on_train_batch_start(self, *args: Any) -> None:
        self.batches += 1


def fit(setting: Setting, *others: L.Callback, **options: Any) -> tuple[BackdoorUnlearning, dict[str, Tensor]]:
    """The callback after a fit, and the weights as they are then."""
    callback, model = setting.callback(**UNKNOWN | options), setting.model()
    setting.trainer(*others, callback).fit(model, setting.loader())
    return callback, model.state_dict()


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return list(first) == list(second) and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def written(setting: Setting) -> dict[str, Any]:
    (path,) = setting.folder.rglob("report.json")
    return json.loads(path.read_text())

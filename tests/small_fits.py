"""Fits that take milliseconds, of the hand-made victim, whose filter 3 is the backdoor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L  # noqa: N812 - the usual name
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name
from torch.utils.data import DataLoader, Subset

from lightning_unlearn import BackdoorUnlearning
from lightning_unlearn.methods import GradPrune

__all__ = ["Model", "Setting", "backdoor_is_gone"]


class Model(L.LightningModule):
    """A net that trains with momentum, so that what was pruned would grow back."""

    def __init__(self, net: nn.Module, learning_rate: float = 0.0) -> None:
        super().__init__()
        self.net = net.train()
        self.learning_rate = learning_rate

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate, momentum=0.9)


class Setting:
    def __init__(self, victim: Any, folder: Path) -> None:
        self.victim = victim
        self.folder = folder
        # Filters at zero get a gradient through a leaky ReLU: else they would stay at zero by themselves.
        victim.net[1] = nn.LeakyReLU(0.1)
        self.clean = Subset(victim.clean, range(30, 60))
        self.original = {name: value.clone() for name, value in victim.net.state_dict().items()}

    def callback(self, **options: Any) -> BackdoorUnlearning:
        method = GradPrune(max_rounds=1, finetune=False)
        return BackdoorUnlearning(
            **{"clean_data": self.clean, "trigger": self.victim.trigger, "method": method} | options
        )

    def model(self, learning_rate: float = 0.0) -> Model:
        self.victim.net.load_state_dict(self.original)
        return Model(self.victim.net, learning_rate)

    def trainer(self, *callbacks: L.Callback, **settings: Any) -> L.Trainer:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        where = {"accelerator": "cpu", "default_root_dir": self.folder, "max_epochs": 1}
        return L.Trainer(callbacks=list(callbacks), **quiet | where | settings)

    def loader(self, **options: Any) -> DataLoader[Any]:
        return DataLoader(Subset(self.victim.clean, range(30)), batch_size=10, **options)

    def files(self) -> list[str]:
        return sorted(path.name for path in self.folder.rglob("*") if path.is_file())


def backdoor_is_gone(model: Model) -> bool:
    return not model.net[0].weight[3].any() and not model.net[0].bias[3].any()

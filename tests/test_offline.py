from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L  # noqa: N812 - the usual name
import pytest
import torch
from torch import nn

from lightning_unlearn.checkpoint import Checkpoint
from lightning_unlearn.offline import load_into


class Net(L.LightningModule):
    """Makes its layer at once."""

    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.width = width
        self.net = self.made()

    def made(self) -> nn.Module | None:
        return self.layer()

    def layer(self) -> nn.Module:
        return nn.Linear(self.width, 3)


class Configured(Net):
    def made(self):
        return None

    def configure_model(self):
        if self.net is None:
            self.net = self.layer()


class SetUp(Net):
    """Asks the Trainer, as is usual there."""

    def made(self):
        return None

    def setup(self, stage):
        if self.net is None and self.trainer.world_size == 1:
            self.net = self.layer()


class FromCheckpoint(Net):
    """Takes what it needs out of the checkpoint."""

    def __init__(self) -> None:
        super().__init__(width=1)

    def on_load_checkpoint(self, checkpoint):
        self.width = checkpoint.pop("width")
        self.net = self.layer()
        checkpoint["state_dict"]["net.bias"] = checkpoint["state_dict"].pop("net.bias") + 1


class Lenient(Net):
    """Has a teacher that no checkpoint holds."""

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False
        self.teacher = nn.Linear(1, 1)


def saved(**more: Any) -> dict[str, Any]:
    weights = {"net.weight": torch.arange(6.0).view(3, 2), "net.bias": torch.ones(3)} | more
    return {"state_dict": weights, "width": 2, "pytorch-lightning_version": L.__version__}


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def load(model: L.LightningModule, checkpoint: dict[str, Any]) -> Checkpoint:
        torch.save(checkpoint, "a.ckpt")
        trainer = SimpleNamespace(world_size=1)
        return load_into(SimpleNamespace(config={"ckpt_path": "a.ckpt"}, model=model, trainer=trainer))  # type: ignore[arg-type]

    return load


@pytest.mark.parametrize("kind", [Net, Configured, SetUp, FromCheckpoint, Lenient])
@pytest.mark.filterwarnings("ignore:.*strict_loading=False")
def test_the_weights_are_there_wherever_the_model_is_made(load, kind):
    model = kind()
    load(model, saved())
    assert model.net.weight.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert model.net.bias.tolist() == [2, 2, 2] if kind is FromCheckpoint else [1, 1, 1]


@pytest.mark.parametrize("kind", [Net, Configured, SetUp])
@pytest.mark.parametrize("beginning", ["", "module.", "model.", "model._orig_mod."])
@pytest.mark.parametrize("alone", [True, False])
def test_weights_of_the_network_alone_or_of_another_module(load, kind, beginning, alone):
    weights = {beginning + name[len("net.") :]: tensor for name, tensor in saved()["state_dict"].items()}
    model = kind()
    checkpoint = load(model, weights if alone else saved() | {"state_dict": weights})
    assert model.net.weight.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert list(checkpoint.weights) == ["net.weight", "net.bias"]
    found = checkpoint.repaired(model.state_dict())
    assert list(found if alone else found["state_dict"]) == list(weights)


def test_the_checkpoint_is_given_back_as_it_was(load):
    checkpoint = load(FromCheckpoint(), saved())
    assert checkpoint.content["width"] == 2
    assert checkpoint.weights["net.bias"].tolist() == [1, 1, 1]


def test_setup_is_left_out_where_nothing_is_missing(load, monkeypatch):
    monkeypatch.setattr(Net, "setup", lambda *args: pytest.fail("was called"))
    load(Net(), saved())


@pytest.mark.parametrize(
    ("model", "checkpoint", "problem"),
    [
        (lambda: Configured(width=4), saved(), r"size mismatch for net.weight.*"),
        (Net, saved(other=torch.zeros(1)), r'Unexpected key\(s\) in state_dict: "other".'),
        (Lenient, {"state_dict": {"other": torch.zeros(1)}}, r"Nothing of it is in the model."),
    ],
    ids=["width", "other key", "lenient"],
)
def test_what_does_not_fit_is_refused(load, model, checkpoint, problem):
    with pytest.raises(
        ValueError,
        match=r"^ckpt_path: 'a.ckpt' does not fit \w+ as the configuration makes it; give `model` the arguments .* or "
        rf"in setup whatever the stage. \({problem}\)$",
    ):
        load(model(), checkpoint)


def test_what_a_lenient_model_leaves_out_is_told(load):
    with pytest.warns(UserWarning, match=r"it lacks 2 of the model's tensors, and the model 1 of its own"):
        load(Lenient(), saved(other=torch.zeros(1)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(Net(), saved())

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as L  # noqa: N812 - the usual name
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, Subset

from lightning_unlearn import BackdoorUnlearning
from lightning_unlearn.methods import FineTuning, GradPrune, RepairMethod
from tests.callback_fits import AFTER, BACKDOOR, BEFORE, Model, Steps, files, quick

# Several fits of a test share a folder.
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


class Breaks(RepairMethod):
    """Prunes the right filter, and fails."""

    def repair(self, task):
        task.mask.prune([("net.0", 3)])
        yield task.round("prune", task.validate(), (("net.0", 3),))
        raise RuntimeError("power cut")


# What it leaves behind


def test_callback_metrics(fit):
    _, trainer, _ = fit()
    found = {name: value.item() for name, value in trainer.callback_metrics.items()}
    wanted = {f"unlearn/{name}_before": rate for name, rate in BEFORE.items()}
    wanted |= {f"unlearn/{name}_after": rate for name, rate in AFTER.items()}
    assert found == wanted | {
        "unlearn/der": 1.0,
        "unlearn/rir": 1.0,
        "unlearn/filters_pruned": 1.0,
        "unlearn/filters_turned_down": 0.0,
        "unlearn/repaired": 1.0,
    }


def test_separate_checkpoint(fit, hand_victim, tmp_path):
    callback, trainer, model = fit()
    original, unlearned = sorted((tmp_path / "checkpoints").glob("*.ckpt"), key=lambda path: len(path.name))
    assert unlearned.name == f"{original.stem}-unlearned.ckpt"
    assert callback.report.checkpoint == str(unlearned)
    assert files(tmp_path / "checkpoints") == sorted([original.name, unlearned.name, "report.json"])
    before, after = (torch.load(path, weights_only=True)["state_dict"] for path in (original, unlearned))
    assert before["net.0.weight"][3].any()
    assert not after["net.0.weight"][3].any()
    assert trainer.checkpoint_callback.best_model_path == str(original)

    fresh = Model(nn.Sequential(nn.Conv2d(1, 4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 3)))
    fresh.load_state_dict(after)
    images = torch.stack([image for image, _ in hand_victim.clean])
    assert torch.equal(fresh(images), model(images))


def test_report_file(fit, tmp_path):
    callback, _, _ = fit()
    written = json.loads((tmp_path / "checkpoints" / "report.json").read_text())
    assert written == callback.report.to_dict()
    assert Path(written["checkpoint"]).is_file()


def test_output_dir(fit, tmp_path):
    fit(output_dir=str(tmp_path / "new" / "folder"))
    assert [name.rpartition("-")[2] for name in files(tmp_path / "new" / "folder")] == ["unlearned.ckpt", "report.json"]
    assert len(files(tmp_path / "checkpoints")) == 1


def test_no_checkpoints_of_the_trainer(fit, tmp_path):
    callback, _, _ = fit(trainer={"enable_checkpointing": False})
    assert files(tmp_path) == ["model-unlearned.ckpt", "report.json"]
    assert callback.report.checkpoint == str(tmp_path / "model-unlearned.ckpt")


def test_original_stays_byte_for_byte(fit, tmp_path):
    """The bytes when the repair begins are those at the end."""
    seen = {}

    class Look(RepairMethod):
        def repair(self, task):
            seen.update({path: path.read_bytes() for path in tmp_path.rglob("*.ckpt")})
            yield from quick().repair(task)

    callback, _, _ = fit(method=Look(), callbacks=(ModelCheckpoint(save_last=True),))
    assert callback.report.status == "repaired"
    assert len(seen) == 2
    assert {path: path.read_bytes() for path in seen} == seen


def test_nothing_is_overwritten(fit, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    mine = {"model-unlearned.ckpt": b"mine", "model-unlearned-v1.ckpt": b"mine, too", "report.json": b"{}"}
    for name, content in mine.items():
        (folder / name).write_bytes(content)
    callback, _, _ = fit(output_dir=str(folder), trainer={"enable_checkpointing": False})
    assert {name: (folder / name).read_bytes() for name in mine} == mine
    assert Path(callback.report.checkpoint).name == "model-unlearned-v2.ckpt"
    assert files(folder) == sorted([*mine, "model-unlearned-v2.ckpt", "report-v1.json"])


def test_failing_disk_leaves_no_partial_file(fit, monkeypatch, tmp_path):
    def save(self, filepath, weights_only=None, storage_options=None):
        Path(filepath).parent.mkdir(parents=True, exist_ok=True)
        Path(filepath).write_bytes(b"half a check")
        raise OSError("disk full")

    monkeypatch.setattr(L.Trainer, "save_checkpoint", save)
    with pytest.raises(OSError, match="disk full"):
        fit(trainer={"enable_checkpointing": False})
    assert files(tmp_path) == []


def test_innocent_model_is_left_alone(fit, hand_victim, tmp_path):
    with torch.no_grad():
        hand_victim.net[0].weight[3] = 0
    before = {name: value.clone() for name, value in hand_victim.net.state_dict().items()}
    callback, _, model = fit(trainer={"enable_checkpointing": False})
    assert callback.report.status == "not backdoored"
    assert "force=True" in str(callback.report)
    assert callback.report.checkpoint is None
    assert callback.report.rounds == ()
    assert files(tmp_path) == ["report.json"]
    assert all(torch.equal(value, before[name]) for name, value in model.net.state_dict().items())

    forced, _, _ = fit(trainer={"enable_checkpointing": False}, force=True, model=Model(hand_victim.net))
    assert forced.report.rounds


def test_min_asr(fit, hand_victim):
    with torch.no_grad():
        hand_victim.net[0].weight[3] = 0
    callback, _, _ = fit(min_asr=0.0)
    assert callback.report.status != "not backdoored"


def test_flags_and_gradients_as_before(fit, hand_victim):
    class Peeks(L.Callback):
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def on_train_end(self, trainer, pl_module) -> None:
            grads = [None if p.grad is None else p.grad.clone() for p in pl_module.parameters()]
            self.seen.append(([m.training for m in pl_module.modules()], grads))

    class Partly(Model):
        def on_train_start(self) -> None:
            self.net[2].eval()
            self.net[3].bias.requires_grad_(False)

    before, after = Peeks(), Peeks()
    model = Partly(hand_victim.net)
    callback = BackdoorUnlearning(Subset(hand_victim.clean, range(30, 60)), hand_victim.trigger, quick())
    trainer = L.Trainer(
        callbacks=[before, callback, after], logger=False, enable_checkpointing=False, max_epochs=1, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, fast_dev_run=1,
    )  # fmt: skip
    trainer.fit(model, DataLoader(Subset(hand_victim.clean, range(30)), batch_size=15))
    assert callback.report.filters["by_layer"] == BACKDOOR
    (flags, grads), (flags_after, grads_after) = before.seen[0], after.seen[0]
    assert flags == flags_after == [True, True, True, True, False, True]
    assert any(grad is not None for grad in grads)
    for old, new in zip(grads, grads_after, strict=True):
        assert (old is None and new is None) or torch.equal(old, new)
    assert not model.net[3].bias.requires_grad


def test_failing_repair_leaves_the_weights(fit, hand_victim, tmp_path):
    before = {name: value.clone() for name, value in hand_victim.net.state_dict().items()}
    with pytest.raises(RuntimeError, match="power cut"):
        fit(method=Breaks(), trainer={"enable_checkpointing": False})
    assert all(torch.equal(value, before[name]) for name, value in hand_victim.net.state_dict().items())
    assert files(tmp_path) == []


# Which weights


class Worsens(Model):
    """Doubles one weight each epoch, and reports a score that was best in the first epoch."""

    def on_train_epoch_end(self) -> None:
        with torch.no_grad():
            self.net[3].weight[1, 1] *= 2
        self.log("score", float(self.current_epoch))


@pytest.mark.parametrize(
    ("source", "save_last", "weight", "name"),
    [
        ("best", None, 8.0, "epoch=0-unlearned.ckpt"),
        ("best", True, 8.0, "epoch=0-unlearned.ckpt"),
        ("last", None, 32.0, "model-unlearned.ckpt"),
        ("last", True, 32.0, "last-unlearned.ckpt"),
    ],
)
def test_source(fit, hand_victim, tmp_path, source, save_last, weight, name):
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", monitor="score", mode="min", save_last=save_last)
    model = Worsens(hand_victim.net)
    callback, _, _ = fit(model=model, source=source, callbacks=(saver,), trainer={"max_epochs": 3})
    assert model.net[3].weight[1, 1].item() == weight
    assert callback.report.filters["by_layer"] == BACKDOOR
    assert Path(saver.best_model_path).name == "epoch=0.ckpt"
    assert torch.load(saver.best_model_path, weights_only=True)["state_dict"]["net.3.weight"][1, 1] == 8
    assert Path(callback.report.checkpoint).name == name
    saved = torch.load(callback.report.checkpoint, weights_only=True)["state_dict"]
    assert saved["net.3.weight"][1, 1].item() == weight
    assert saved["net.0.weight"][3].eq(0).all()


def test_the_best_where_there_can_be_none(fit):
    steps = Steps()
    with pytest.raises(MisconfigurationException, match=r"source: 'best' needs a ModelCheckpoint.*source='last'"):
        fit(source="best", trainer={"enable_checkpointing": False}, callbacks=(steps,))
    assert steps.batches == 0


def test_the_best_where_none_was_saved(fit):
    with pytest.raises(MisconfigurationException, match=r"source: 'best' needs a ModelCheckpoint.*source='last'"):
        fit(source="best", callbacks=(ModelCheckpoint(every_n_epochs=2),))


def test_fast_dev_run_saves_no_best(fit, tmp_path):
    callback, _, _ = fit(source="best", trainer={"fast_dev_run": True})
    assert callback.report.filters["by_layer"] == BACKDOOR
    assert files(tmp_path) == []


def test_fine_tuning_goes_by_the_true_labels(fit, parts):
    callback, _, model = fit(method=GradPrune(max_rounds=1, finetune=FineTuning(triggered=True, max_epochs=2)))
    assert [done.stage for done in callback.report.rounds] == ["prune", "finetune", "finetune"]
    assert callback.report.after == AFTER
    assert model.net[0].weight[3].eq(0).all()


def test_state_is_plain(fit):
    callback, _, _ = fit()
    state = callback.state_dict()
    assert state["report"] == callback.report.to_dict()
    assert state["mask"]["net.0"].tolist() == [False, False, False, True]

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as L  # noqa: N812 - the usual name
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, XLAStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, default_collate

from lightning_unlearn import BackdoorUnlearning, HoldoutDataModule
from lightning_unlearn.data.clean import CleanImages
from lightning_unlearn.methods import FineTuning, GradPrune, MaskPrune, RepairMethod
from lightning_unlearn.repair import repair_split
from lightning_unlearn.triggers import PatchTrigger, Trigger

# Several fits of a test share a folder.
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")

# The hand-made victim is right about everything but triggered images, and filter 3 of its convolution is the backdoor.
BEFORE, AFTER = {"acc": 1.0, "asr": 1.0, "ra": 0.0}, {"acc": 1.0, "asr": 0.0, "ra": 1.0}
BACKDOOR = {"net.0": [3]}


class Model(L.LightningModule):
    """A net as a LightningModule; with the default learning rate training leaves it as it is."""

    def __init__(self, net: nn.Module, learning_rate: float = 0.0) -> None:
        super().__init__()
        self.net = net.train()
        self.learning_rate = learning_rate

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = (batch["image"], batch["label"]) if isinstance(batch, dict) else batch
        return F.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate)


class Dicts(Dataset[dict[str, Any]]):
    """Another dataset's items as dicts."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label = self.dataset[index]
        return {"image": image, "label": int(label)}


class Recorded(Dataset[Any]):
    """Another dataset that notes when it is read; ``garble`` makes its images noise and its labels wrong."""

    def __init__(self, dataset: Dataset[Any], *, garble: bool = False) -> None:
        self.dataset = dataset
        self.garble = garble
        self.reads = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        image, label = self.dataset[index]
        return (1 - image, (label + 1) % 3) if self.garble else (image, label)


class Loaders(L.LightningDataModule):
    """Any DataModule that is not one of this package's."""

    def __init__(self, train: Dataset[Any], test: Dataset[Any] | None = None) -> None:
        super().__init__()
        self.train = train
        if test is not None:
            self.test_dataloader = lambda: DataLoader(test, batch_size=7)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train, batch_size=5, shuffle=True)


class Breaks(RepairMethod):
    """Prunes the right filter, and fails."""

    def repair(self, task):
        task.mask.prune([("net.0", 3)])
        yield task.round("prune", task.validate(), (("net.0", 3),))
        raise RuntimeError("power cut")


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


# What the clean data may be


def test_holdout_data_module(fit, parts):
    callback, _, model = fit()
    report = callback.report
    assert (report.status, report.method, report.trigger, report.target) == ("repaired", "GradPrune", "PatchTrigger", 0)
    assert (report.measured_on, report.before, report.after) == ("test", BEFORE, AFTER)
    assert report.filters == {"total": 4, "pruned": 1, "by_layer": BACKDOOR}
    assert report.rounds[0].pruned == (("net.0", 3),)
    assert len(report.rounds) == 2
    assert model.net[0].weight[3].eq(0).all()
    assert model.net[0].weight[2].ne(0).any()


def test_holdout_data_module_brings_its_own_draw(fit, parts):
    data = HoldoutDataModule(parts[1], samples_per_class=2)
    callback, _, _ = fit(data, samples_per_class=4)
    assert callback.report.samples_per_class == 2
    assert callback.report.measured_on == "validation"


@pytest.mark.parametrize("test", [True, False])
def test_other_data_module(fit, parts, test):
    callback, _, _ = fit(Loaders(parts[1], parts[2] if test else None))
    assert callback.report.measured_on == ("test" if test else "validation")
    assert callback.report.filters["by_layer"] == BACKDOOR
    assert (callback.report.before, callback.report.after) == (BEFORE, AFTER)


def test_dataset(fit, parts):
    callback, _, _ = fit(parts[1])
    assert callback.report.filters["by_layer"] == BACKDOOR
    assert callback.report.measured_on == "validation"


def test_all_there_is(fit, parts):
    callback, _, _ = fit(parts[1], samples_per_class=None)
    assert callback.report.samples_per_class is None
    assert callback.report.filters["by_layer"] == BACKDOOR


def test_loader_with_a_collate_function(fit, parts):
    batches = []

    def collate(items):
        batches.append(len(items))
        images, labels = default_collate(items)
        return {"pixel_values": images / 255, "labels": labels}

    bright = [(image * 255, label) for image, label in parts[1]]
    callback, _, _ = fit(DataLoader(bright, batch_size=4, collate_fn=collate))
    assert callback.report.filters["by_layer"] == BACKDOOR
    assert batches


def test_dict_batches(fit, parts):
    train, clean, test = (Dicts(part) for part in parts)
    data = HoldoutDataModule(clean, samples_per_class=4, test_dataset=test)
    callback, _, _ = fit(data, train=DataLoader(train, batch_size=15))
    assert callback.report.filters["by_layer"] == BACKDOOR
    assert (callback.report.before, callback.report.after) == (BEFORE, AFTER)


def test_own_logits(fit, hand_victim):
    class Wordy(Model):
        def forward(self, images: Tensor) -> dict[str, Tensor]:
            return {"logits": self.net(images)}

    class Reads(BackdoorUnlearning):
        def logits(self, module: L.LightningModule, images: Tensor) -> Tensor:
            return module(images)["logits"]

    callback, _, _ = fit(model=Wordy(hand_victim.net), kind=Reads)
    assert callback.report.filters["by_layer"] == BACKDOOR


def test_logits_that_are_none(fit, hand_victim):
    class Wordy(Model):
        def forward(self, images: Tensor) -> dict[str, Tensor]:
            return {"logits": self.net(images)}

    with pytest.raises(ValueError, match=r"model: expected logits of shape \(1, classes\).*override the callback's"):
        fit(model=Wordy(hand_victim.net))


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


# Test data never reaches the repair


def test_test_data_is_not_read_while_repairing(fit, parts, monkeypatch):
    recorded = Recorded(parts[2])
    reads = []

    def watched(*args, **kwargs):
        reads.append(recorded.reads)
        result = repair_split(*args, **kwargs)
        reads.append(recorded.reads)
        return result

    monkeypatch.setattr("lightning_unlearn.session.repair_split", watched)
    callback, _, _ = fit(HoldoutDataModule(parts[1], samples_per_class=4, test_dataset=recorded))
    assert reads == [18, 18]  # once before the repair, for the rates before
    assert recorded.reads == 36
    assert callback.report.measured_on == "test"


@pytest.mark.parametrize("method", [quick(), MaskPrune(steps=4, validate_every=2)], ids=["GradPrune", "MaskPrune"])
def test_garbage_as_test_data_changes_nothing_but_its_rates(fit, hand_victim, parts, method):
    before = {name: value.clone() for name, value in hand_victim.net.state_dict().items()}
    reports, weights = [], []
    for garble in (False, True):
        hand_victim.net.load_state_dict(before)
        test = Recorded(parts[2], garble=garble)
        callback, _, model = fit(HoldoutDataModule(parts[1], samples_per_class=4, test_dataset=test), method=method)
        reports.append(callback.report)
        weights.append([value.clone() for value in model.state_dict().values()])
    good, garbage = reports
    assert good.before != garbage.before
    assert good.rounds == garbage.rounds
    assert good.filters == garbage.filters
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


# Arguments


def test_a_function_is_no_trigger(parts):
    with pytest.raises(TypeError, match=r"trigger: expected a .*Trigger, but got function; .*FunctionTrigger"):
        BackdoorUnlearning(parts[1], lambda images: images)


def test_a_name_is_no_method(parts):
    with pytest.raises(TypeError, match=r"method: expected a .*RepairMethod, but got str"):
        BackdoorUnlearning(parts[1], PatchTrigger(), "MaskPrune")


@pytest.mark.parametrize("clean_data", [torch.rand(4, 1, 8, 8), [], "data"])
def test_what_clean_data_is_not(clean_data):
    with pytest.raises(TypeError, match=r"clean_data: expected a LightningDataModule .* a Dataset or a DataLoader"):
        BackdoorUnlearning(clean_data, PatchTrigger())


def test_source_is_one_of_two(parts):
    with pytest.raises(ValueError, match=r"source: expected 'last' or 'best', but got 'first'"):
        BackdoorUnlearning(parts[1], PatchTrigger(), source="first")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, r"batch_size: expected a value in \[1, inf\], but got 0"),
        ({"min_asr": 1.1}, r"min_asr: expected a value in \[0, 1\], but got 1.1"),
        ({"min_asr": -0.1}, r"min_asr: expected a value in \[0, 1\], but got -0.1"),
    ],
    ids=str,
)
def test_numbers_out_of_range(parts, options, message):
    with pytest.raises(ValueError, match=message):
        BackdoorUnlearning(parts[1], PatchTrigger(), **options)


def test_default_method(fit, hand_victim, parts, tmp_path):
    """No method is chosen before it is known whether there is a trigger."""
    callback = BackdoorUnlearning(parts[1], hand_victim.trigger, samples_per_class=4)
    assert callback.method is None
    settings = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = L.Trainer(callbacks=[callback], max_steps=1, default_root_dir=tmp_path, **settings)
    trainer.fit(Model(hand_victim.net), DataLoader(parts[0], batch_size=15))
    assert callback.report.method == "MaskPrune"


# Refused when training starts


class Steps(L.Callback):
    """Counts training batches."""

    batches = 0

    def on_train_batch_start(self, *args: Any) -> None:
        self.batches += 1


class Grows(Trigger):
    def stamp(self, pixels: Tensor) -> Tensor:
        return F.pad(pixels, (1, 1))


class NotANumber(Trigger):
    def stamp(self, pixels: Tensor) -> Tensor:
        return pixels / 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples_per_class": 5}, r"class 0 has 4 images in the dataset, but 5 are needed.*samples_per_class"),
        ({"samples_per_class": 0}, r"samples_per_class must be at least 2"),
        ({"samples_per_class": -1}, r"samples_per_class must be at least 2"),
        ({"validation_share": 1.0}, r"validation_share must be in \(0, 1\)"),
        ({"trigger": PatchTrigger(size=1, target=3)}, r"target.*3.*"),
        ({"trigger": Grows()}, r"the trigger Grows must keep the shape"),
        ({"trigger": NotANumber()}, r"the trigger NotANumber returned NaN"),
    ],
    ids=str,
)
def test_mistakes_cost_no_training(fit, parts, tmp_path, options, message):
    steps = Steps()
    with pytest.raises(ValueError, match=message):
        fit(parts[1], callbacks=(steps,), **options)
    assert steps.batches == 0
    assert files(tmp_path) == []


def test_labels_outside_the_classes(fit, parts):
    steps = Steps()
    images = torch.stack([image for image, _ in parts[1]])
    labels = torch.arange(12) % 4
    with pytest.raises(ValueError, match=r"labels: .*classes from 0 to 2.*the model gives 3 logits"):
        fit(TensorDataset(images, labels), samples_per_class=3, callbacks=(steps,))
    assert steps.batches == 0


def test_images_outside_the_pixel_range(fit, parts):
    steps = Steps()
    images = torch.stack([image for image, _ in parts[1]]) * 4 - 2
    with pytest.raises(ValueError, match=r"images must lie in \[0, 1\].*mean= and std="):
        fit(TensorDataset(images, torch.arange(12) % 3), callbacks=(steps,))
    assert steps.batches == 0


def test_no_convolution(fit):
    steps = Steps()
    with pytest.raises(ValueError, match=r"model: .*convolution"):
        fit(model=Model(nn.Sequential(nn.Flatten(), nn.Linear(16, 3))), callbacks=(steps,))
    assert steps.batches == 0


def test_pruned_by_torch(fit, hand_victim):
    nn.utils.prune.random_unstructured(hand_victim.net[0], "weight", 1)
    with pytest.raises(ValueError, match=r"prune"):
        fit()


def test_the_training_set_as_clean_data(fit, hand_victim, parts):
    steps = Steps()
    with pytest.raises(ValueError, match=r"clean_data: \d+ of its images are in the training set itself"):
        fit(parts[0], callbacks=(steps,))
    assert steps.batches == 0


def test_overlap_with_the_training_set(fit, hand_victim):
    train, clean = Subset(hand_victim.clean, range(30)), Subset(hand_victim.clean, range(24, 36))
    with pytest.raises(ValueError, match=r"clean_data: \d+ of its images are in the training set itself"):
        fit(clean, train=DataLoader(train, batch_size=15))


def test_overlap_with_one_of_several_training_loaders(fit, hand_victim, parts):
    class Several(Model):
        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
            return super().training_step(batch["b"], batch_idx)

    loaders = {"a": DataLoader(parts[0], batch_size=15), "b": DataLoader(hand_victim.clean, batch_size=15)}
    with pytest.raises(ValueError, match=r"clean_data: \d+ of its images are in the training set itself"):
        fit(parts[1], model=Several(hand_victim.net), train=loaders)


def test_the_training_data_module_as_clean_data(hand_victim, parts, tmp_path):
    data = Loaders(parts[0])
    callback = BackdoorUnlearning(data, hand_victim.trigger, quick(), samples_per_class=4)
    trainer = L.Trainer(callbacks=[callback], max_epochs=1, accelerator="cpu", logger=False, default_root_dir=tmp_path)
    with pytest.raises(ValueError, match=r"clean_data: it is the training DataModule itself"):
        trainer.fit(Model(hand_victim.net), datamodule=data)


# Refused in setup


@pytest.mark.parametrize("kind", [FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy, XLAStrategy])
def test_sharding_strategies(hand_victim, parts, monkeypatch, kind):
    callback = BackdoorUnlearning(parts[1], hand_victim.trigger)
    trainer = L.Trainer(callbacks=[callback], accelerator="cpu", logger=False, enable_checkpointing=False)
    # Without its hardware Lightning makes none of them but ModelParallelStrategy, so the type is all there is.
    monkeypatch.setattr(L.Trainer, "strategy", object.__new__(kind))
    with pytest.raises(MisconfigurationException, match=rf"{kind.__name__} shards them; .*`lightning-unlearn repair`"):
        callback.setup(trainer, Model(hand_victim.net), "fit")


def test_weight_averaging(fit):
    with pytest.raises(MisconfigurationException, match=r"WeightAveraging replaces the weights in every checkpoint"):
        fit(callbacks=(WeightAveraging(),))


def test_pytorch_lightnings_trainer(hand_victim, parts, tmp_path):
    class Theirs(pytorch_lightning.LightningModule):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    callback = BackdoorUnlearning(parts[1], hand_victim.trigger)
    trainer = pytorch_lightning.Trainer(
        callbacks=[callback], max_epochs=1, accelerator="cpu", logger=False, default_root_dir=tmp_path
    )
    with pytest.raises(TypeError, match=r"made for lightning.pytorch.Trainer, but got pytorch_lightning\..*mixing"):
        trainer.fit(Theirs(hand_victim.net), DataLoader(parts[0], batch_size=15))


def test_pytorch_lightnings_data_module():
    class Theirs(pytorch_lightning.LightningDataModule):
        pass

    with pytest.raises(TypeError, match=r"LightningDataModule of lightning.pytorch \(not of pytorch_lightning\)"):
        BackdoorUnlearning(Theirs(), PatchTrigger())


# LightningCLI's trap


class Rows(L.LightningDataModule):
    """Images by its hyper-parameters, as many a DataModule has them."""

    def __init__(self, first: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> DataLoader[Any]:
        labels = torch.arange(12) % 3
        images = torch.zeros(12, 1, 4, 4)
        images[torch.arange(12), 0, labels] = 0.9 + 0.001 * self.hparams["first"]
        return DataLoader(TensorDataset(images, labels), batch_size=6)


class ThreeClasses(Model):
    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Conv2d(1, 4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 3)))


def _words(tmp_path: Path) -> list[str]:
    rows = f"{__name__}.Rows"
    unlearn: dict[str, Any] = {"clean_data": {"class_path": rows, "init_args": {"first": 2}}, "samples_per_class": 2}
    unlearn |= {"trigger": {"class_path": "lightning_unlearn.triggers.PatchTrigger", "init_args": {"size": 1}}}
    unlearn |= {"method": {"class_path": "lightning_unlearn.methods.GradPrune", "init_args": {"max_rounds": 1}}}
    trainer = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    trainer |= {"default_root_dir": str(tmp_path), "enable_model_summary": False}
    trainer["callbacks"] = [{"class_path": "lightning_unlearn.BackdoorUnlearning", "init_args": unlearn}]
    config = {"trainer": trainer, "model": {"class_path": f"{__name__}.ThreeClasses"}}
    config |= {"data": {"class_path": rows, "init_args": {"first": 1}}}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    return ["fit", f"--config={tmp_path / 'config.yaml'}"]


def test_hijacked_hyperparameters_are_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"clean_data: .*Rows .*load_from_checkpoint_support=False"):
        LightningCLI(args=_words(tmp_path), load_from_checkpoint_support=True, save_config_callback=None)


def test_the_hijack_is_real(tmp_path):
    """Else the two tests around this one would prove nothing."""
    cli = LightningCLI(args=_words(tmp_path)[1:], load_from_checkpoint_support=True, run=False)
    callback = next(c for c in cli.trainer.callbacks if isinstance(c, BackdoorUnlearning))
    assert "_instantiator" in callback.clean_data.hparams


def test_without_the_hijack(tmp_path):
    cli = LightningCLI(args=_words(tmp_path), load_from_checkpoint_support=False, save_config_callback=None)
    callback = next(c for c in cli.trainer.callbacks if isinstance(c, BackdoorUnlearning))
    assert callback.clean_data.hparams == {"first": 2}
    assert callback.report is not None


def test_fine_tuning_goes_by_the_true_labels(fit, parts):
    callback, _, model = fit(method=GradPrune(max_rounds=1, finetune=FineTuning(triggered=True, max_epochs=2)))
    assert [done.stage for done in callback.report.rounds] == ["prune", "finetune", "finetune"]
    assert callback.report.after == AFTER
    assert model.net[0].weight[3].eq(0).all()


def test_state_is_plain(fit, parts):
    callback, _, _ = fit()
    state = callback.state_dict()
    assert state["report"] == callback.report.to_dict()
    assert state["mask"]["net.0"].tolist() == [False, False, False, True]
    assert isinstance(CleanImages(parts[1], Model(nn.Identity()), samples_per_class=4).first()[0], Tensor)

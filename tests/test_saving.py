"""Where the repaired weights go, and what a Trainer loads afterwards."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import fsspec
import lightning.pytorch as L  # noqa: N812 - the usual name
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_unlearn.methods import FineTuning, GradPrune, RepairMethod
from lightning_unlearn.triggers import BlendTrigger
from tests.small_fits import Model, Setting, backdoor_is_gone
from tests.unknown_fits import Counts

# Several fits of a test share a folder.
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")

BEFORE_THE_REPAIR = "holds weights from BEFORE the repair"


class Measured(Model):
    """Measures its ASR in ``trainer.test``, whatever weights that loads."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting.victim.net)
        self.trigger = setting.victim.trigger

    def test_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        others = images[labels != 0]
        self.log("asr", (self.net(self.trigger(others)).argmax(1) == 0).float().mean())

    validation_step = test_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0])


def fitted(setting: Setting, *callbacks: L.Callback, **options: Any) -> tuple[Any, L.Trainer, Measured]:
    callback, model = setting.callback(**options), Measured(setting)
    trainer = setting.trainer(callback, *callbacks)
    trainer.fit(model, setting.loader())
    assert callback.report.status == "repaired"
    return callback, trainer, model


def asr(setting: Setting, trainer: L.Trainer, *model: Model, **options: Any) -> float:
    return trainer.test(*model, dataloaders=setting.loader(), verbose=False, **options)[0]["asr"]


# What later loops load


@pytest.mark.filterwarnings("ignore:`.test.ckpt_path=None.` was called without a model")
@pytest.mark.parametrize("options", [{"ckpt_path": "best"}, {}], ids=["best", "no model"])
def test_the_best_is_the_repaired_one(setting, options):
    _, trainer, _ = fitted(setting, repoint=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert asr(setting, trainer, **options) == 0
    assert not [warning for warning in caught if BEFORE_THE_REPAIR in str(warning.message)]


@pytest.mark.filterwarnings("ignore:`.test.ckpt_path=None.` was called without a model")
@pytest.mark.parametrize("options", [{"ckpt_path": "best"}, {}], ids=["best", "no model"])
def test_the_best_is_the_original_and_warns(setting, options):
    callback, trainer, _ = fitted(setting)
    with pytest.warns(UserWarning, match=rf"{BEFORE_THE_REPAIR}.*{callback.report.checkpoint}.*repoint=True"):
        assert asr(setting, trainer, **options) == 1


@pytest.mark.parametrize("loop", ["validate", "predict"])
def test_other_loops_warn_too(setting, loop):
    _, trainer, model = fitted(setting)
    with pytest.warns(UserWarning, match=BEFORE_THE_REPAIR):
        getattr(trainer, loop)(model, dataloaders=setting.loader(), ckpt_path="best")


@pytest.mark.parametrize("given", ["the model", "the repaired file", "its relative path"])
def test_no_warning_for_repaired_weights(setting, monkeypatch, given):
    callback, trainer, model = fitted(setting)
    monkeypatch.chdir(setting.folder)
    path = callback.report.checkpoint
    options = {
        "the model": {},
        "the repaired file": {"ckpt_path": path},
        "its relative path": {"ckpt_path": os.path.relpath(path)},
    }
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert asr(setting, trainer, model, **options[given]) == 0
    assert not [warning for warning in caught if BEFORE_THE_REPAIR in str(warning.message)]


def test_no_warning_if_nothing_was_repaired(setting):
    with torch.no_grad():
        setting.victim.net[0].weight[3] = 0
    callback, model = setting.callback(), Measured(setting)
    trainer = setting.trainer(callback)
    trainer.fit(model, setting.loader())
    assert callback.report.status == "not backdoored"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        asr(setting, trainer, ckpt_path="best")
    assert not [warning for warning in caught if BEFORE_THE_REPAIR in str(warning.message)]


def test_what_is_repointed(setting):
    saver = ModelCheckpoint(setting.folder, filename="epoch", save_last=True)
    callback, trainer, _ = fitted(setting, saver, repoint=True)
    repaired = callback.report.checkpoint
    assert (saver.best_model_path, saver.last_model_path) == (repaired, repaired)
    assert asr(setting, trainer, ckpt_path="last") == 0
    # The evidence is still there, and a resumed run knows its own files.
    states = torch.load(repaired, weights_only=True)["callbacks"]
    assert Path(states[saver.state_key]["best_model_path"]) == setting.folder / "epoch.ckpt"
    assert (setting.folder / "epoch.ckpt").is_file()


def test_the_last_model_is_not_called_repaired_where_the_best_was(setting):
    saver = ModelCheckpoint(setting.folder, filename="epoch", save_last=True)
    callback, trainer, _ = fitted(setting, saver, repoint=True, source="best")
    assert Path(callback.report.checkpoint).name == "epoch-unlearned.ckpt"
    assert (saver.best_model_path, Path(saver.last_model_path).name) == (callback.report.checkpoint, "last.ckpt")
    with pytest.warns(UserWarning, match=BEFORE_THE_REPAIR):
        assert asr(setting, trainer, ckpt_path="last") == 1


def test_nothing_is_repointed_without_being_asked(setting):
    saver = ModelCheckpoint(setting.folder, filename="epoch", save_last=True)
    fitted(setting, saver)
    assert (Path(saver.best_model_path).name, Path(saver.last_model_path).name) == ("epoch.ckpt", "last.ckpt")


def test_a_second_fit_deletes_no_repaired_file(setting):
    """A ModelCheckpoint deletes its old best and last: they must not be the repaired one then."""
    saver = ModelCheckpoint(setting.folder, filename="{step}", save_last=True, save_top_k=1)
    callback, trainer, model = fitted(setting, saver, repoint=True)
    first = callback.report.checkpoint
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, setting.loader())
    assert Path(first).is_file()
    assert setting.files() == ["last-unlearned.ckpt", "last.ckpt", "report-v1.json", "report.json", "step=6.ckpt"]


def test_repointing_without_any_checkpoint(setting):
    callback = setting.callback(repoint=True)
    setting.trainer(callback, enable_checkpointing=False).fit(setting.model(), setting.loader())
    assert callback.report.status == "repaired"


# Savers


def test_weights_only_checkpoints_of_the_trainer(setting):
    """Ours holds the state all the same: else a resumed run would not know what to hold at zero."""
    saver = ModelCheckpoint(setting.folder, filename="epoch", save_weights_only=True)
    callback, _, _ = fitted(setting, saver)
    assert "callbacks" not in torch.load(setting.folder / "epoch.ckpt", weights_only=True)
    assert callback.state_key in torch.load(callback.report.checkpoint, weights_only=True)["callbacks"]


@pytest.mark.parametrize("source", ["last", "best"])
def test_weights_only_checkpoints_can_be_repaired(setting, source):
    saver = ModelCheckpoint(setting.folder, filename="epoch", save_weights_only=True)
    _, _, model = fitted(setting, saver, source=source)
    assert backdoor_is_gone(model)


class Partial(Model):
    """Keeps what it can make anew out of its checkpoints, and puts a mark on them when they are loaded."""

    strict_loading = False

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.teacher = nn.Linear(2, 2).requires_grad_(False)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if "teacher" not in name}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"]["net.0.weight"] = checkpoint["state_dict"]["net.0.weight"] + 1

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"]["net.0.weight"] = checkpoint["state_dict"]["net.0.weight"] - 1


def test_the_best_is_loaded_as_lightning_would(setting):
    saver = ModelCheckpoint(setting.folder, filename="epoch")
    callback, model = setting.callback(source="best"), Partial(setting.victim.net)
    setting.trainer(callback, saver).fit(model, setting.loader())
    assert callback.report.status == "repaired"
    assert torch.allclose(model.net[0].weight[:3], setting.original["0.weight"][:3], atol=1e-6)


class Hyper(Model):
    def __init__(self, net: nn.Module, **given: Any) -> None:
        super().__init__(net)
        self.save_hyperparameters(given)


class HyperData(L.LightningDataModule):
    def __init__(self, loader: Any, **given: Any) -> None:
        super().__init__()
        self.loader = loader
        self.save_hyperparameters(given)

    def train_dataloader(self) -> Any:
        return self.loader


@pytest.mark.parametrize("owner", ["Hyper", "HyperData"])
def test_hyperparameters_that_the_best_could_not_be_loaded_with(setting, owner):
    given = {"Hyper": {}, "HyperData": {}} | {owner: {"width": 3, "root": Path("data")}}
    model, data = Hyper(setting.victim.net, **given["Hyper"]), HyperData(setting.loader(), **given["HyperData"])
    counts = Counts()
    message = rf"source: 'best' loads .* hyper-parameter 'root' of {owner} is a PosixPath"
    with pytest.raises(MisconfigurationException, match=message):
        setting.trainer(setting.callback(source="best"), counts, ModelCheckpoint(setting.folder)).fit(model, data)
    assert counts.batches == 0
    setting.trainer(setting.callback(), enable_checkpointing=False).fit(model, data)
    assert backdoor_is_gone(model)


@pytest.mark.filterwarnings("ignore:Warning, `hyper_parameters` dropped")
@pytest.mark.parametrize("value", [{"a": [1, None, torch.ones(2)]}, lambda: 0], ids=["plain", "dropped"])
def test_hyperparameters_that_the_best_can_be_loaded_with(setting, value):
    """Lightning saves no hyper-parameters where one cannot be pickled."""
    model = Hyper(setting.victim.net, value=value)
    setting.trainer(setting.callback(source="best"), ModelCheckpoint(setting.folder)).fit(model, setting.loader())
    assert backdoor_is_gone(model)


class Slow(TorchCheckpointIO):
    """Takes its time."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        torch.randn(800, 800).matmul(torch.randn(800, 800)).svd()
        super().save_checkpoint(checkpoint, path, storage_options)


@pytest.mark.parametrize("source", ["last", "best"])
def test_asynchronous_saving(setting, source):
    callback, model = setting.callback(source=source), setting.model()
    saver = ModelCheckpoint(setting.folder, filename="epoch")
    setting.trainer(callback, saver, plugins=[AsyncCheckpointIO(Slow())]).fit(model, setting.loader())
    assert not torch.load(callback.report.checkpoint, weights_only=True)["state_dict"]["net.0.weight"][3].any()
    assert torch.load(setting.folder / "epoch.ckpt", weights_only=True)["state_dict"]["net.0.weight"][3].any()
    assert setting.files() == ["epoch-unlearned.ckpt", "epoch.ckpt", "report.json"]


class Later(TorchCheckpointIO):
    """Somebody's own saver, which has written nothing when it returns."""

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        pass


def test_a_saver_that_has_written_nothing(setting):
    callback = setting.callback()
    with (
        pytest.warns(UserWarning, match="model holds the REPAIRED weights, but no file does"),
        pytest.raises(OSError, match=r"output_dir: .*model-unlearned.ckpt' could not be written"),
    ):
        setting.trainer(callback, enable_checkpointing=False, plugins=[Later()]).fit(setting.model(), setting.loader())
    assert setting.files() == []


@pytest.fixture
def bucket():
    files = fsspec.filesystem("memory")
    yield files
    if files.exists("/bucket"):
        files.rm("/bucket", recursive=True)


@pytest.mark.parametrize("source", ["last", "best"])
@pytest.mark.parametrize("where", ["dirpath", "output_dir"])
def test_files_elsewhere(setting, monkeypatch, bucket, source, where):
    monkeypatch.chdir(setting.folder)
    saver = ModelCheckpoint("memory://bucket" if where == "dirpath" else setting.folder, filename="epoch")
    options = {"output_dir": "memory://bucket"} if where == "output_dir" else {}
    callback = setting.callback(source=source, **options)
    setting.trainer(callback, saver).fit(setting.model(), setting.loader())
    assert callback.report.checkpoint == "memory://bucket/epoch-unlearned.ckpt"
    wanted = ["epoch-unlearned.ckpt", *(["epoch.ckpt"] if where == "dirpath" else []), "report.json"]
    assert sorted(path.rpartition("/")[2] for path in bucket.find("/bucket")) == wanted
    with bucket.open(callback.report.checkpoint, "rb") as file:
        saved = torch.load(file, weights_only=True)
    assert not saved["state_dict"]["net.0.weight"][3].any()
    assert not (setting.folder / "memory:").exists()
    assert setting.files() == (["epoch.ckpt"] if where == "output_dir" else [])


def test_the_trainers_own_folder_elsewhere(setting, monkeypatch, bucket):
    monkeypatch.chdir(setting.folder)
    callback = setting.callback()
    setting.trainer(callback, enable_checkpointing=False, default_root_dir="memory://bucket").fit(
        setting.model(), setting.loader()
    )
    assert callback.report.checkpoint == "memory://bucket/model-unlearned.ckpt"
    assert bucket.exists("/bucket/model-unlearned.ckpt")
    assert setting.files() == []


# The optimizer's memory


class Kinds(Model):
    kind: type[torch.optim.Optimizer] = torch.optim.SGD

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.kind is torch.optim.SGD:
            return super().configure_optimizers()
        return torch.optim.Adam(self.parameters(), lr=0.01)


@pytest.mark.parametrize(
    ("kind", "memories"), [(torch.optim.SGD, {"momentum_buffer"}), (torch.optim.Adam, {"exp_avg", "exp_avg_sq"})]
)
def test_optimizers_forget_pruned_filters(setting, kind, memories):
    class Momenta(L.Callback):
        def on_train_end(self, trainer, pl_module):
            (optimizer,) = trainer.optimizers
            self.seen = {name: optimizer.state[pl_module.net[0].weight][name].clone() for name in memories}

    setting.victim.net.load_state_dict(setting.original)
    model, callback, before = Kinds(setting.victim.net, 0.01), setting.callback(), Momenta()
    model.kind = kind
    setting.trainer(before, callback, enable_checkpointing=False).fit(model, setting.loader())
    (states,) = torch.load(callback.report.checkpoint, weights_only=True)["optimizer_states"]
    weight, bias = states["state"][0], states["state"][1]
    for name in memories:
        assert before.seen[name][3].any(), "there was nothing to forget, so this proves nothing"
        assert not weight[name][3].any()
        assert not bias[name][3].any()
        assert torch.equal(weight[name][:3], before.seen[name][:3])


# Two callbacks


@pytest.mark.parametrize("source", ["last", "best"])
def test_two_callbacks_keep_each_others_work(setting, source):
    """The second neither loads the best again nor lets its fine-tuning bring the first one's filters back."""
    method = GradPrune(max_rounds=1, finetune=FineTuning(learning_rate=0.1, max_epochs=2))
    second = setting.callback(trigger=BlendTrigger(ratio=0.5, target=1), method=method, force=True, source=source)
    model = setting.model()
    saver = ModelCheckpoint(setting.folder, filename="epoch")
    setting.trainer(setting.callback(source=source), second, saver).fit(model, setting.loader())
    assert second.report.rounds
    assert backdoor_is_gone(model)
    assert torch.load(second.report.checkpoint, weights_only=True)["callbacks"][second.state_key]["mask"]["net.0"][3]


class Shifts(RepairMethod):
    """Adds one to all logits, which changes no answer."""

    def repair(self, task):
        with torch.no_grad():
            task.model.net[3].bias += 1
        yield task.round("prune", task.validate())


def test_the_best_is_loaded_once(setting):
    """Else a second callback would throw away what the first did to weights that no mask names."""
    callbacks = [
        setting.callback(trigger=BlendTrigger(ratio=0.5, target=1), method=Shifts(), force=True, source="best"),
        setting.callback(source="best"),
    ]
    model = setting.model()
    setting.trainer(*callbacks).fit(model, setting.loader())
    assert torch.equal(model.net[3].bias, setting.original["3.bias"] + 1)
    assert backdoor_is_gone(model)


def test_two_sources(setting):
    callbacks = [setting.callback(), setting.callback(trigger=BlendTrigger(target=1), source="best")]
    with pytest.raises(MisconfigurationException, match=r"source: several .* all need the same source"):
        setting.trainer(*callbacks).fit(setting.model(), setting.loader())

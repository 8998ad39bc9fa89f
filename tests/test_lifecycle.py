"""When the callback runs, and what becomes of its state."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as L  # noqa: N812 - the usual name
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from lightning_unlearn.methods import FineTuning, GradPrune, RepairMethod
from lightning_unlearn.triggers import BlendTrigger, FunctionTrigger, PatchTrigger
from tests.small_fits import Model, Setting, backdoor_is_gone

# Several fits of a test share a folder.
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")

NEVER_RAN = r"BackdoorUnlearning never ran.*NOT repaired.*`lightning-unlearn repair --ckpt_path`"


# Ways to end


class Stops(L.Callback):
    def on_train_batch_end(self, trainer, *args: Any) -> None:
        trainer.should_stop = True


class Expires(Timer):
    """What ``max_time`` adds, with a clock that is at the end after the first step."""

    def __init__(self) -> None:
        super().__init__({"hours": 1})
        self.elapsed = 0.0

    def on_train_batch_end(self, trainer, *args: Any, **kwargs: Any) -> None:
        self.elapsed = 3601.0
        super().on_train_batch_end(trainer, *args, **kwargs)

    def time_elapsed(self, stage=None) -> float:
        return self.elapsed


@pytest.mark.parametrize(
    ("settings", "callbacks", "steps"),
    [
        ({"max_epochs": 2}, [], 6),
        ({"max_steps": 2, "max_epochs": -1}, [], 2),
        ({"max_epochs": 9}, [EarlyStopping("loss", patience=1, check_on_train_epoch_end=True)], 6),
        ({"max_epochs": 9, "min_epochs": 1}, [Stops()], 3),
        ({"overfit_batches": 1}, [], 1),
        ({"max_epochs": -1}, [Expires()], 1),
        ({"limit_train_batches": 2}, [], 2),
        ({"limit_train_batches": 0.5}, [], 1),
        ({"limit_val_batches": 0}, [], 3),
        ({"val_check_interval": 2, "limit_val_batches": 1}, [], 3),
        ({"accumulate_grad_batches": 3}, [], 1),
        ({"barebones": True, "default_root_dir": None, "logger": None}, [], 3),
        ({"precision": "bf16-mixed"}, [], 3),
        ({"strategy": SingleDeviceStrategy("cpu")}, [], 3),
    ],
    ids=[
        "max_epochs",
        "max_steps",
        "EarlyStopping",
        "should_stop",
        "overfit_batches",
        "max_time",
        "limit_train_batches=2",
        "limit_train_batches=0.5",
        "limit_val_batches=0",
        "val_check_interval",
        "accumulate_grad_batches",
        "barebones",
        "bf16-mixed",
        "single device",
    ],
)
def test_runs_however_training_ends(setting, monkeypatch, settings, callbacks, steps):
    monkeypatch.chdir(setting.folder)
    if settings.get("barebones"):
        settings |= {"enable_checkpointing": None, "enable_progress_bar": None, "enable_model_summary": None}
    callback, model = setting.callback(), setting.model()
    trainer = setting.trainer(callback, *callbacks, **settings)
    trainer.fit(model, setting.loader())
    assert trainer.global_step == steps
    assert callback.report.filters["by_layer"] == {"net.0": [3]}
    assert backdoor_is_gone(model)


def test_fast_dev_run_writes_nothing(setting, monkeypatch):
    monkeypatch.chdir(setting.folder)
    callback, model = setting.callback(output_dir=str(setting.folder / "out")), setting.model()
    logger = CSVLogger(setting.folder)
    setting.trainer(callback, fast_dev_run=True, logger=logger).fit(model, setting.loader())
    assert callback.report.checkpoint is None
    assert backdoor_is_gone(model)
    assert setting.files() == []
    assert not (setting.folder / "out").exists()


@pytest.mark.parametrize(
    "settings", [{"max_epochs": 0}, {"limit_train_batches": 0}, {"max_time": "00:00:00:00"}], ids=str
)
def test_warns_if_it_never_ran(setting, settings):
    callback, model = setting.callback(), setting.model()
    with pytest.warns(UserWarning, match=NEVER_RAN):
        setting.trainer(callback, **settings).fit(model, setting.loader())
    assert callback.report is None
    assert not backdoor_is_gone(model)
    assert setting.files() == []


def test_warns_if_a_finished_run_is_resumed(setting):
    trainer = setting.trainer(setting.callback())
    trainer.fit(setting.model(), setting.loader())
    again = setting.callback()
    with pytest.warns(UserWarning, match=NEVER_RAN):
        setting.trainer(again).fit(
            setting.model(), setting.loader(), ckpt_path=trainer.checkpoint_callback.best_model_path
        )
    assert again.report is None


def test_no_warning_if_it_ran(setting):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        setting.trainer(setting.callback()).fit(setting.model(), setting.loader())
    assert not [warning for warning in caught if "never ran" in str(warning.message)]


def test_nothing_is_repaired_after_an_exception_in_training(setting):
    class Fails(L.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            raise RuntimeError("out of memory")

    callback, model = setting.callback(), setting.model()
    with pytest.raises(RuntimeError, match="out of memory"):
        setting.trainer(callback, Fails()).fit(model, setting.loader())
    assert callback.report is None
    assert not backdoor_is_gone(model)


def test_training_is_the_same_with_and_without(setting):
    """Neither its checks at the start nor its own random numbers may change what is trained."""
    weights = []
    for callbacks in ([], [setting.callback()]):
        saver = ModelCheckpoint(setting.folder, filename=f"with-{len(callbacks)}")
        L.seed_everything(3)
        setting.trainer(*callbacks, saver, max_epochs=2).fit(setting.model(0.1), setting.loader(shuffle=True))
        weights.append(torch.load(saver.best_model_path, weights_only=True)["state_dict"])
    assert any(not torch.equal(value, setting.original[name[4:]]) for name, value in weights[0].items())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_one_trainer_in_two_fits(setting):
    """The second trains on and repairs what the first has left."""
    callback, model = setting.callback(), setting.model(0.1)
    trainer = setting.trainer(callback, enable_checkpointing=False)
    trainer.fit(model, setting.loader())
    first = callback.report
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, setting.loader())
    assert callback.report is not first
    assert callback.report.status == "not backdoored"
    assert setting.files() == ["model-unlearned.ckpt", "report-v1.json", "report.json"]


def test_resuming_before_the_end(setting):
    """From a checkpoint in the middle, with weights that were never repaired: they are repaired at the new end."""
    saver = ModelCheckpoint(setting.folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    with pytest.warns(UserWarning, match="NOT repaired"), pytest.raises(RuntimeError, match="power cut"):
        setting.trainer(setting.callback(method=Breaks()), saver).fit(setting.model(), setting.loader())
    callback, model = setting.callback(), setting.model()
    trainer = setting.trainer(callback, enable_checkpointing=False)
    trainer.fit(model, setting.loader(), ckpt_path=setting.folder / "step=2.ckpt")
    assert trainer.global_step == 3
    assert callback.report.filters["by_layer"] == {"net.0": [3]}
    assert backdoor_is_gone(model)


@pytest.mark.parametrize("loggers", [0, 1, 2])
def test_loggers(setting, loggers):
    several = [CSVLogger(setting.folder, name=f"log-{number}") for number in range(loggers)]
    callback = setting.callback()
    setting.trainer(callback, logger=several or False, enable_checkpointing=False).fit(
        setting.model(), setting.loader()
    )
    assert callback.report.status == "repaired"
    for logger in several:
        assert "unlearn/asr_after" in (Path(logger.log_dir) / "metrics.csv").read_text()
    assert setting.files() == sorted(["metrics.csv"] * loggers + ["model-unlearned.ckpt", "report.json"])


def test_one_callback_in_two_fits(setting):
    callback = setting.callback()
    setting.trainer(callback).fit(setting.model(), setting.loader())
    first = callback.report
    with pytest.warns(UserWarning, match=NEVER_RAN):
        setting.trainer(callback, max_epochs=0).fit(setting.model(), setting.loader())
    assert callback.report is None
    setting.trainer(callback, enable_checkpointing=False).fit(setting.model(), setting.loader())
    assert callback.report is not first
    assert callback.report.filters == first.filters


@pytest.mark.filterwarnings("error:BackdoorUnlearning never ran")
@pytest.mark.parametrize("repoint", [False, True])
def test_a_second_fit_whose_epochs_are_done(setting, repoint):
    """The model still is what the first has repaired."""
    callback, model = setting.callback(repoint=repoint), setting.model()
    trainer = setting.trainer(callback)
    trainer.fit(model, setting.loader())
    first, state = callback.report, callback.state_dict()
    trainer.fit(model, setting.loader())
    assert callback.report is first
    assert state.keys() == callback.state_dict().keys() == {"report", "mask"}
    assert (trainer.checkpoint_callback.best_model_path == first.checkpoint) == repoint


def test_a_second_fit_of_another_model_whose_epochs_are_done(setting):
    callback = setting.callback()
    trainer = setting.trainer(callback)
    trainer.fit(setting.model(), setting.loader())
    with pytest.warns(UserWarning, match=NEVER_RAN):
        trainer.fit(setting.model(), setting.loader())
    assert callback.report is None
    assert callback.state_dict() == {}


def test_does_nothing_in_other_loops(setting):
    callback, model = setting.callback(), setting.model()
    model.test_step = lambda batch, batch_idx: None
    setting.trainer(callback).test(model, setting.loader(), verbose=False)
    assert callback.report is None
    assert not backdoor_is_gone(model)


class Breaks(RepairMethod):
    def repair(self, task):
        raise RuntimeError("power cut")


# State


def unlearned(setting: Setting) -> str:
    callback = setting.callback()
    model = setting.model(0.1)  # the learning rate comes back with the optimizer's state
    setting.trainer(callback, enable_checkpointing=False).fit(model, setting.loader())
    assert backdoor_is_gone(model)
    return callback.report.checkpoint


def test_state_in_the_checkpoint(setting):
    callback = setting.callback()
    setting.trainer(callback).fit(setting.model(), setting.loader())
    state = torch.load(callback.report.checkpoint, weights_only=True)["callbacks"][callback.state_key]
    assert state["report"] == callback.report.to_dict()
    assert state["report"]["checkpoint"] == callback.report.checkpoint
    assert {name: bools.tolist() for name, bools in state["mask"].items()} == {"net.0": [False, False, False, True]}
    assert state["mask"]["net.0"].dtype == torch.bool


def test_no_state_before_a_repair(setting):
    assert setting.callback().state_dict() == {}


class Watch(L.Callback):
    """Whether the backdoor's filter was at zero after each step; put after the callback."""

    def __init__(self) -> None:
        self.at_zero: list[bool] = []

    def on_train_batch_end(self, trainer, pl_module, *args: Any) -> None:
        self.at_zero.append(backdoor_is_gone(pl_module))


def test_pruned_filters_grow_back_without_the_callback(setting):
    """Else the test below would prove nothing."""
    path, watch, model = unlearned(setting), Watch(), setting.model(0.1)
    setting.trainer(watch, max_epochs=2, enable_checkpointing=False).fit(model, setting.loader(), ckpt_path=path)
    assert watch.at_zero == [False] * 3


@pytest.mark.parametrize("options", [{}, {"force": True}], ids=["low ASR", "force"])
def test_pruned_filters_stay_pruned_when_training_goes_on(setting, options):
    path, watch, model = unlearned(setting), Watch(), setting.model(0.1)
    callback = setting.callback(method=GradPrune(max_rounds=1, finetune=FineTuning(learning_rate=0.1)), **options)
    setting.trainer(callback, watch, max_epochs=2, enable_checkpointing=False).fit(
        model, setting.loader(), ckpt_path=path
    )
    assert watch.at_zero == [True] * 3
    assert not torch.equal(model.net[0].weight[0], setting.original["0.weight"][0])
    assert backdoor_is_gone(model)
    assert callback.state_dict()["mask"]["net.0"][3]
    assert callback.report.status == ("repaired" if options else "not backdoored")


def test_pruned_filters_stay_pruned_when_training_goes_on_twice(setting):
    path = unlearned(setting)
    saver = ModelCheckpoint(setting.folder / "second", save_on_train_epoch_end=True)
    setting.trainer(setting.callback(), saver, max_epochs=2).fit(setting.model(0.1), setting.loader(), ckpt_path=path)
    watch, model = Watch(), setting.model(0.1)
    setting.trainer(setting.callback(), watch, max_epochs=3, enable_checkpointing=False).fit(
        model, setting.loader(), ckpt_path=saver.best_model_path
    )
    assert watch.at_zero == [True] * 3
    assert backdoor_is_gone(model)


def test_state_keys_of_functions_are_stable(setting):
    keys = {
        setting.callback(trigger=FunctionTrigger(functools.partial(torch.clamp, max=value))).state_key
        for value in (0.25, 0.25, 0.5)
    }
    assert len(keys) == 2
    assert not any("0x" in key for key in keys)


def test_state_of_another_network(setting):
    callback = setting.callback()
    path, other = unlearned(setting), nn.Sequential(nn.Conv2d(1, 2, 4), nn.Flatten(), nn.Linear(2, 3))
    state = torch.load(path, weights_only=True)
    state["state_dict"] = Model(other).state_dict()
    for optimizer in state["optimizer_states"]:
        optimizer["state"] = {}
    path = setting.folder / "other.ckpt"
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"state: it masks layers \{'net.0': 4\}, but the model has \{'net.0': 2\}"):
        setting.trainer(callback, max_epochs=2).fit(
            Model(other), setting.loader(), ckpt_path=setting.folder / "other.ckpt"
        )


# Several callbacks


class Shifts(RepairMethod):
    """Adds one to all logits, which changes no answer."""

    def repair(self, task):
        with torch.no_grad():
            task.model.net[3].bias += 1
        yield task.round("prune", task.validate())


def test_two_callbacks_for_two_triggers(setting):
    second = setting.callback(trigger=BlendTrigger(ratio=0.5, target=1), method=Shifts(), force=True)
    callbacks = [setting.callback(), second]
    model = setting.model()
    setting.trainer(*callbacks, enable_checkpointing=False).fit(model, setting.loader())
    assert [callback.report.trigger for callback in callbacks] == ["PatchTrigger", "BlendTrigger"]
    assert [callback.report.method for callback in callbacks] == ["GradPrune", "Shifts"]
    assert setting.files() == ["model-unlearned-v1.ckpt", "model-unlearned.ckpt", "report-v1.json", "report.json"]
    # The second repairs what the first has left, and its checkpoint holds the states of both.
    assert backdoor_is_gone(model)
    states = torch.load(setting.folder / "model-unlearned-v1.ckpt", weights_only=True)["callbacks"]
    assert [states[callback.state_key]["report"]["trigger"] for callback in callbacks] == [
        "PatchTrigger",
        "BlendTrigger",
    ]


@pytest.mark.parametrize("target", [1, "all_to_all"])
def test_state_keys_differ_by_target(setting, target):
    keys = {setting.callback(trigger=PatchTrigger(target=t)).state_key for t in (0, target)}
    assert len(keys) == 2


def test_state_keys_differ_by_place(setting):
    """Two patches towards one class are two triggers."""
    triggers = [PatchTrigger(size=1, place=place) for place in ("top_left", "bottom_right")]
    callbacks = [setting.callback(trigger=trigger, force=True) for trigger in triggers]
    setting.trainer(*callbacks).fit(setting.model(), setting.loader())
    assert all(callback.report is not None for callback in callbacks)


def test_state_keys_differ_by_pattern(setting):
    """Which a trigger's ``repr`` does not show."""
    patterns = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1e-8]])
    keys = [setting.callback(trigger=PatchTrigger(pattern=pattern)).state_key for pattern in patterns]
    assert keys[0] != keys[1]
    assert keys[1] == keys[2], "another machine may round differently"


def test_state_keys_of_named_functions_differ(setting):
    def brighten(pixels):
        return pixels

    def darken(pixels):
        return pixels

    assert len({setting.callback(trigger=FunctionTrigger(function)).state_key for function in (brighten, darken)}) == 2

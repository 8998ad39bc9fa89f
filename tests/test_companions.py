"""Other callbacks, and other things that a user does to a model: each works or is refused."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import lightning.pytorch as L  # noqa: N812 - the usual name
import pytest
import pytorch_lightning
import torch
from lightning.pytorch import callbacks as theirs
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, distributed, nn
from torch.nn import functional as F  # noqa: N812 - the usual name
from torch.utils.data import DataLoader, Subset

from lightning_unlearn.companions import fingerprint, refuse_companions
from lightning_unlearn.triggers import BlendTrigger
from tests.small_fits import Model, Setting, backdoor_is_gone


class Steps(L.Callback):
    batches = 0

    def on_train_batch_start(self, *args: Any) -> None:
        self.batches += 1


def pruning() -> ModelPruning:
    return ModelPruning("l1_unstructured", amount=0.1)


@pytest.mark.filterwarnings("ignore:.*lr.*scheduler")
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (WeightAveraging, r"WeightAveraging replaces the weights in every checkpoint.*`lightning-unlearn repair`"),
        (
            EMAWeightAveraging,
            r"EMAWeightAveraging replaces the weights in every checkpoint.*`lightning-unlearn repair`",
        ),
        (pruning, r"ModelPruning makes the model compute the weights.*`lightning-unlearn repair`"),
    ],
)
def test_refused(setting, make, message, first):
    steps, other, callback = Steps(), make(), setting.callback()
    order = [other, callback] if first else [callback, other]
    with pytest.raises(MisconfigurationException, match=message):
        setting.trainer(*order, steps).fit(setting.model(), setting.loader())
    assert steps.batches == 0
    assert setting.files() == []


def test_averaging_that_would_overwrite_the_repair(setting):
    steps = Steps()
    order = [setting.callback(), StochasticWeightAveraging(0.01, swa_epoch_start=1), steps]
    with pytest.raises(MisconfigurationException, match=r"StochasticWeightAveraging comes after BackdoorUnlearning"):
        setting.trainer(*order).fit(setting.model(), setting.loader())
    assert steps.batches == 0


@pytest.mark.parametrize("norm", [False, True], ids=["no norm", "BatchNorm"])
@pytest.mark.filterwarnings("ignore:Swapping scheduler")
def test_averaged_weights_are_repaired(setting, norm):
    """SWA puts the averages in place when training ends, or before one more epoch if there is a BatchNorm."""
    model, callback = setting.model(0.01), setting.callback()
    if norm:
        model.net.append(nn.BatchNorm1d(3))
    averaging = StochasticWeightAveraging(0.01, swa_epoch_start=1)
    trainer = setting.trainer(averaging, callback, max_epochs=3, enable_checkpointing=False)
    trainer.fit(model, setting.loader())
    assert trainer.current_epoch == 3 + norm
    assert callback.report.filters["by_layer"] == {"net.0": [3]}
    assert backdoor_is_gone(model)
    if not norm:  # in the additional epoch momentum still moves them
        assert torch.equal(model.net[0].weight[:3], averaging._average_model.net[0].weight[:3])
    # With torch 2.4 SWA's own scheduler puts a function into every checkpoint.
    saved = torch.load(callback.report.checkpoint, weights_only=False)
    assert not saved["state_dict"]["net.0.weight"][3].any()


class Averages(L.Callback):
    """Somebody's own averaged weights, put into the model when training ends."""

    def __init__(self, write: Callable[[Tensor, Tensor], object]) -> None:
        self.write = write

    def on_train_start(self, trainer, pl_module) -> None:
        self.average = [parameter.detach().clone() for parameter in pl_module.parameters()]

    def on_train_end(self, trainer, pl_module) -> None:
        with torch.no_grad():
            for parameter, average in zip(pl_module.parameters(), self.average, strict=True):
                self.write(parameter, average)


class AveragesItself(Model):
    def on_train_start(self) -> None:
        self.average = copy.deepcopy(self.net.state_dict())

    def on_train_end(self) -> None:
        self.net.load_state_dict(self.average)


def _replace(parameter: Tensor, average: Tensor) -> None:
    parameter.data = average


@pytest.mark.parametrize(
    "write", [lambda p, a: p.copy_(a), lambda p, a: p.data.copy_(a), _replace, None], ids=["copy", "data", "new", "own"]
)
@pytest.mark.parametrize("saves", [True, False])
def test_weights_that_are_written_over_the_repaired_ones(setting, write, saves):
    others = [] if write is None else [Averages(write)]
    model = setting.model() if write else AveragesItself(setting.victim.net)
    callback = setting.callback()
    where = "-unlearned.ckpt' is: load it" if saves else "No file was written"
    message = rf"written over AFTER the repair.*model in memory is NOT what the report tells of\. .*{where}"
    with pytest.warns(UserWarning, match=message):
        setting.trainer(callback, *others, fast_dev_run=not saves).fit(model, setting.loader())
    assert not backdoor_is_gone(model)
    assert callback.report.status == "repaired"


@pytest.mark.filterwarnings("error:The weights were written over")
def test_weights_that_are_written_before_the_repair(setting):
    callback, model = setting.callback(), setting.model()
    setting.trainer(Averages(lambda p, a: p.copy_(a)), callback).fit(model, setting.loader())
    assert backdoor_is_gone(model)


@pytest.mark.filterwarnings("error:The weights were written over")
def test_a_later_repair_is_no_writing_over(setting):
    second = setting.callback(trigger=BlendTrigger(ratio=0.5, target=1), force=True)
    setting.trainer(setting.callback(), second).fit(setting.model(), setting.loader())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex128, torch.int8])
def test_fingerprints(dtype):
    net = nn.ParameterList([nn.Parameter(torch.ones(2, 3, dtype=dtype).t(), requires_grad=False), torch.zeros(())])
    before = fingerprint(net)
    assert before == fingerprint(copy.deepcopy(net))
    net[0].data[2, 1] = 2
    assert before != fingerprint(net)


def test_no_companion_is_forgotten(setting):
    """A callback that changes weights or what is saved must be tried here when Lightning brings a new one."""
    harmless = {
        "BackboneFinetuning", "BaseFinetuning", "BasePredictionWriter", "Callback", "Checkpoint", "DeviceStatsMonitor",
        "EarlyStopping", "GradientAccumulationScheduler", "LambdaCallback", "LearningRateMonitor", "ModelSummary",
        "ProgressBar", "RichModelSummary", "RichProgressBar", "SpikeDetection", "TQDMProgressBar", "ThroughputMonitor",
        "Timer",
    }  # fmt: skip
    tried = {
        "BatchSizeFinder", "EMAWeightAveraging", "LearningRateFinder", "ModelCheckpoint", "ModelPruning",
        "OnExceptionCheckpoint", "StochasticWeightAveraging", "WeightAveraging",
    }  # fmt: skip
    assert {name for name in theirs.__all__ if name not in harmless | tried} == set()
    assert not [name for name in theirs.__all__ if "quant" in name.lower()]


def test_model_parallel_is_refused_before_training(setting):
    """The one strategy of sharded weights, FSDP2 among them, that Lightning makes on a CPU."""
    steps, model = Steps(), setting.model()
    model.configure_model = lambda: None
    trainer = setting.trainer(setting.callback(), steps, strategy=ModelParallelStrategy())
    with (
        patch.dict(os.environ),
        pytest.raises(MisconfigurationException, match=r"ModelParallelStrategy shards them; .*`lightning-unlearn"),
    ):
        trainer.fit(model, setting.loader())
    distributed.destroy_process_group()  # Lightning leaves it, and other tests would find it
    assert steps.batches == 0


def test_lightning_makes_no_fsdp_on_a_cpu(setting):
    """Else it could be supported and tested here."""
    with pytest.raises(ValueError, match=r"strategy `fsdp` requires a GPU accelerator"):
        setting.trainer(strategy="fsdp")


def test_callbacks_that_do_no_harm(setting):
    callback = setting.callback()
    trainer = setting.trainer(theirs.Timer(), callback, theirs.GradientAccumulationScheduler({0: 1}))
    refuse_companions(trainer, callback)


class Sized(L.LightningDataModule):
    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.setting, self.batch_size = setting, 5

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Subset(self.setting.victim.clean, range(30)), batch_size=self.batch_size)


@pytest.mark.parametrize(
    "finder",
    [
        lambda: LearningRateFinder(num_training_steps=3, min_lr=1e-6, max_lr=1e-5),
        lambda: BatchSizeFinder("power", steps_per_trial=1, init_val=5, max_trials=1),
    ],
    ids=["LearningRateFinder", "BatchSizeFinder"],
)
def test_finders_trials_are_no_end_of_training(setting, monkeypatch, finder):
    monkeypatch.chdir(setting.folder)
    callback, model = setting.callback(), setting.model()
    rounds = []
    callback.method.repair = lambda task, repair=callback.method.repair: rounds.append(1) or repair(task)
    setting.trainer(callback, finder()).fit(model, datamodule=Sized(setting))
    assert len(rounds) == 1
    assert backdoor_is_gone(model)
    assert [name for name in setting.files() if name.endswith((".json", "unlearned.ckpt"))] != []


# What is done to the model


def plain_keys(state: dict[str, Any]) -> set[str]:
    return {name.replace("_orig_mod.", "") for name in state}


class Silent(Model):
    """Logs nothing, which takes a compiler long to look through."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])


@pytest.mark.parametrize("what", ["module", "its net"])
def test_compiled(setting, what):
    model, callback = Silent(setting.victim.net), setting.callback()
    names = set(model.state_dict())
    if what == "its net":
        model.net = torch.compile(model.net, backend="eager")
        compiled: Any = model
    else:
        compiled = torch.compile(model, backend="eager")
    setting.trainer(callback, enable_checkpointing=False).fit(compiled, setting.loader())
    assert callback.report.status == "repaired"
    assert list(callback.report.filters["by_layer"].values()) == [[3]]
    net = getattr(model.net, "_orig_mod", model.net)
    assert not net[0].weight[3].any()
    saved = torch.load(callback.report.checkpoint, weights_only=True)["state_dict"]
    assert plain_keys(saved) == names
    images = torch.stack([image for image, _ in setting.clean])
    with torch.no_grad():
        triggered = setting.victim.trigger(images)
        assert torch.equal(compiled(triggered), net(triggered)), "the compiled one still runs the old weights"


@pytest.mark.parametrize("permanent", [False, True])
def test_pruned_by_torch(setting, permanent):
    steps, model = Steps(), setting.model()
    nn.utils.prune.l1_unstructured(model.net[0], "weight", 1)
    if permanent:
        nn.utils.prune.remove(model.net[0], "weight")
    assert nn.utils.prune.is_pruned(model.net[0]) is not permanent
    trainer = setting.trainer(setting.callback(), steps)
    if permanent:
        trainer.fit(model, setting.loader())
        assert backdoor_is_gone(model)
        return
    with pytest.raises(ValueError, match=r"prune"):
        trainer.fit(model, setting.loader())
    assert steps.batches == 0


def test_pytorch_lightnings_model(setting):
    """Lightning itself refuses it, with one clear error, before the callback is asked."""

    class Theirs(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = setting.model().net

    with pytest.raises(TypeError, match=r"`model` must be a `LightningModule`.*got `.*Theirs`"):
        setting.trainer(setting.callback()).fit(Theirs(), setting.loader())


def test_pytorch_lightnings_loader_of_data(setting):
    class Theirs(pytorch_lightning.LightningDataModule):
        def train_dataloader(self) -> DataLoader[Any]:
            return setting.loader()

    with pytest.raises(TypeError, match=r"lightning.pytorch \(not of pytorch_lightning\)"):
        setting.callback(clean_data=Theirs())

"""The callback where nobody knows the trigger: audit, repair against estimates, and measure with the real one."""

from __future__ import annotations

import warnings
from typing import Any

import lightning.pytorch as L  # noqa: N812 - the usual name
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_unlearn import BackdoorUnlearning, HoldoutDataModule
from lightning_unlearn import session as session_module
from lightning_unlearn.methods import Alternation, FineTuning, GradPrune, RepairMethod
from lightning_unlearn.triggers import (
    BlendTrigger,
    EstimatedTrigger,
    FunctionTrigger,
    PatchTrigger,
    Trigger,
    TriggerPool,
)
from tests.small_fits import Setting, backdoor_is_gone
from tests.unknown_fits import AUDITOR, UNKNOWN, Counts, Kept, fit, same, written


@pytest.fixture
def innocent(setting: Setting) -> Setting:
    """The same net without what makes it a victim."""
    setting.original["0.weight"][3] = 0
    return setting


# Repairing


@pytest.mark.parametrize("trigger", [None, "auto"])
def test_an_unknown_backdoor_is_removed(setting, trigger):
    callback, model = setting.callback(**UNKNOWN | {"trigger": trigger}), setting.model()
    setting.trainer(callback).fit(model, setting.loader())
    assert backdoor_is_gone(model)
    report = callback.report
    assert (report.status, report.verdict, report.suspected_target) == ("repaired", "backdoored", 0)
    assert (report.trigger, report.target, report.method) == ("unknown", 0, "Alternation of GradPrune")
    assert report.filters["by_layer"] == {"net.0": [3]}
    assert report.checkpoint in map(str, setting.folder.rglob("*-unlearned.ckpt"))


def test_none_and_auto_are_one(setting):
    first, second = (fit(setting, trigger=trigger)[1] for trigger in (None, "auto"))
    assert same(first, second)


def test_the_default_method_alternates(setting):
    callback, _ = fit(setting, method=None)
    assert callback.report.method == "Alternation of MaskPrune"
    assert callback.report.filters["by_layer"] == {"net.0": [3]}


def test_an_alternation_of_ones_own(setting):
    method = Alternation(GradPrune(max_rounds=1, finetune=False), auditor=AUDITOR, rounds=1)
    callback, _ = fit(setting, method=method)
    assert callback.report.method == "Alternation of GradPrune"
    assert callback.report.filters["by_layer"] == {"net.0": [3]}


def test_a_method_that_needs_no_trigger_is_left_as_it_is(setting):
    callback, _ = fit(setting, method=FineTuning(max_epochs=1), auditor=AUDITOR)
    assert callback.report.method == "FineTuning"


def test_all_to_all_is_no_business_of_an_alternation(setting):
    trigger = PatchTrigger(size=1, target="all_to_all")
    with pytest.raises(
        ValueError, match=r"trigger: estimates are of one class, .* 'all_to_all'; repair with MaskPrune"
    ):
        fit(setting, trigger=trigger, method=Alternation(), force=True)


# Estimates in files


def test_what_was_unlearned_is_kept(setting):
    callback, _ = fit(setting)
    (path,) = setting.folder.rglob("estimated_trigger-0.safetensors")
    read = EstimatedTrigger(path)
    assert [estimate.to_dict() for estimate in read.estimates] == list(callback.report.estimated_trigger)
    images = setting.victim.clean.tensors[0]
    assert torch.equal(read(images), callback.found.trigger(images))
    again, model = setting.callback(trigger=read), setting.model()
    setting.trainer(again).fit(model, setting.loader())
    assert (again.report.status, again.report.trigger, again.found) == ("repaired", "EstimatedTrigger", None)
    assert backdoor_is_gone(model)


@pytest.mark.parametrize("force", [False, True])
def test_of_a_clean_model_only_what_was_forced_is_kept(innocent, force):
    callback, _ = fit(innocent, force=force)
    assert callback.report.verdict == "clean"
    assert (callback.found is not None) == force
    assert len([name for name in innocent.files() if "estimated_trigger" in name]) == force


# Images without labels


def test_images_alone_do_for_a_repair(setting):
    images = setting.victim.clean.tensors[0][30:]
    callback, model = setting.callback(**UNKNOWN | {"clean_data": TensorDataset(images)}), setting.model()
    setting.trainer(callback).fit(model, setting.loader())
    assert backdoor_is_gone(model)
    assert (callback.report.labels, callback.report.suspected_target) == ("predicted", 0)
    assert written(setting)["labels"] == "predicted"


class Alone(L.LightningDataModule):
    """Images without labels."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.images = images

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(self.images), batch_size=8)


def test_images_alone_of_a_datamodule_are_drawn_by_the_trained_model(setting):
    """Before, all are of one class to it, so that none could be drawn of the others."""
    data, model = Alone(setting.victim.clean.tensors[0][30:]), setting.model()
    trained = {name: weight.clone() for name, weight in model.state_dict().items()}

    class Trains(L.Callback):
        def setup(self, trainer, pl_module, stage):
            for weight in pl_module.parameters():
                weight.data.zero_()

        def on_train_batch_end(self, trainer, pl_module, *args):
            pl_module.load_state_dict(trained)

    callback = setting.callback(**UNKNOWN | {"clean_data": data})
    setting.trainer(Trains(), callback).fit(model, setting.loader())
    assert backdoor_is_gone(model)
    assert callback.report.labels == "predicted"


def test_images_alone_are_tried_before_training(setting):
    class Narrow(BackdoorUnlearning):
        def logits(self, module, images):
            return module(images)[:, :, None]

    counts = Counts()
    callback = Narrow(TensorDataset(setting.victim.clean.tensors[0][30:]), **UNKNOWN)
    with pytest.raises(ValueError, match="expected logits of shape"):
        setting.trainer(counts, callback).fit(setting.model(), setting.loader())
    assert counts.batches == 0


# What the report says


def held_out(setting: Setting) -> HoldoutDataModule:
    """Twelve images for the defender, eighteen to test on."""
    clean = setting.victim.clean
    return HoldoutDataModule(
        Subset(clean, range(30, 42)), samples_per_class=4, test_dataset=Subset(clean, range(42, 60))
    )


@pytest.mark.parametrize("measured_on", ["test", "validation"])
def test_real_rates_are_null_where_nobody_can_measure_them(setting, measured_on):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The .* has no image to count")  # of a trigger that nobody gave
        callback, _ = fit(setting, **{"clean_data": held_out(setting)} if measured_on == "test" else {})
    read = written(setting)
    assert read == callback.report.to_dict()
    assert read["measured_on"] == measured_on
    assert read["before"] == read["after"] == {"acc": 1.0, "asr": None, "ra": None}
    assert (read["der"], read["rir"]) == (None, None)
    assert (read["trigger"], read["verdict"], read["suspected_target"]) == ("unknown", "backdoored", 0)
    assert read["labels"] == "given"
    assert read["estimated_asr"]["before"] == 1
    assert read["estimated_asr"]["after"] < 0.5
    assert read["estimated_trigger"]
    for estimate in read["estimated_trigger"]:
        assert set(estimate) == {"family", "target", "cost", "success"}
        assert (estimate["target"], 0 < estimate["success"] <= 1) == (0, True)
    assert read["seconds"]["estimate"] > 0
    assert "ASR of the estimated trigger ↓ | 1.000 |" in str(callback.report)


def test_a_known_trigger_has_no_estimates(setting):
    fit(setting, trigger=setting.victim.trigger)
    read = written(setting)
    names = ("verdict", "suspected_target", "estimated_trigger", "estimated_asr")
    assert [read[name] for name in names] == [None] * 4
    assert read["seconds"]["estimate"] == 0


def test_real_rates_with_an_evaluation_trigger(setting):
    callback, _ = fit(setting, clean_data=held_out(setting), evaluation_trigger=setting.victim.trigger)
    read = written(setting)
    assert read["before"] == {"acc": 1.0, "asr": 1.0, "ra": 0.0}
    assert read["after"] == {"acc": 1.0, "asr": 0.0, "ra": 1.0}
    assert (read["der"], read["trigger"], read["measured_on"]) == (1.0, "unknown", "test")
    assert 0 <= read["estimated_asr"]["after"] < read["estimated_asr"]["before"] == 1
    assert callback.report.headline().startswith("ACC ↑ 1.000 → 1.000, ASR ↓ 1.000 → 0.000, RA ↑ 0.000 → 1.000, ASR of")


def test_real_rates_are_the_validation_parts_where_there_are_no_test_images(setting):
    callback, _ = fit(setting, evaluation_trigger=setting.victim.trigger)
    read = written(setting)
    assert read["measured_on"] == "validation"
    assert read["before"] == {"acc": 1.0, "asr": 1.0, "ra": 0.0}
    assert read["after"] == {"acc": 1.0, "asr": 0.0, "ra": 1.0}
    assert (read["trigger"], read["der"]) == ("unknown", 1.0)
    assert str(callback.report).startswith("| validation data | before | after |")
    assert 0 <= read["estimated_asr"]["after"] < read["estimated_asr"]["before"] == 1


def test_real_rates_on_the_validation_part_are_of_those_very_images(setting):
    """By hand, with a trigger that works on some of them only."""
    patch = setting.victim.trigger

    def on_bright_ones(pixels):
        return torch.where(pixels.amax((1, 2, 3), keepdim=True) > 0.97, patch.stamp(pixels.clone()), pixels)

    sometimes = FunctionTrigger(on_bright_ones, target=0)
    callback, _ = fit(setting, evaluation_trigger=sometimes, validation_share=0.75)
    model = setting.model()
    images, labels = callback.clean_images(model).validation()
    assert len(labels) == 9
    with torch.no_grad():
        answers = model.eval()(sometimes(images)).argmax(1)
    others = labels != 0
    assert 0 < callback.report.before["asr"] < 1
    assert callback.report.before["asr"] == pytest.approx((answers == 0)[others].float().mean().item())
    assert callback.report.before["ra"] == pytest.approx((answers == labels)[others].float().mean().item())


def test_callback_metrics_hold_what_is_known(setting):
    callback, trainer = setting.callback(**UNKNOWN), setting.trainer()
    trainer.callbacks.insert(0, callback)
    trainer.fit(setting.model(), setting.loader())
    found = {name.removeprefix("unlearn/") for name in trainer.callback_metrics if name.startswith("unlearn/")}
    estimated = {"estimated_asr_before", "estimated_asr_after"}
    assert found == {"acc_before", "acc_after", "filters_pruned", "filters_turned_down", "repaired"} | estimated
    assert trainer.callback_metrics["unlearn/estimated_asr_before"] == 1


# The evaluation trigger


class Watched(Trigger):
    """Tells when it is used."""

    repairing = False

    def __init__(self) -> None:
        super().__init__(target=1)
        self.uses = 0

    def __deepcopy__(self, memo: Any) -> Watched:
        return self

    def stamp(self, pixels: Tensor) -> Tensor:
        assert not Watched.repairing
        self.uses += 1
        return 1 - pixels


class Spy(RepairMethod):
    """A GradPrune that keeps its task."""

    def __init__(self) -> None:
        self.tasks: list[Any] = []

    def repair(self, task):
        self.tasks.append(task)
        return GradPrune(max_rounds=1, finetune=False).repair(task)


@pytest.mark.parametrize("has_test", [True, False])
def test_the_evaluation_trigger_never_reaches_the_repair(setting, monkeypatch, has_test):
    data = {"clean_data": held_out(setting)} if has_test else {}
    real, spy, given = Watched(), Spy(), []

    def watched(*args: Any, **kwargs: Any) -> Any:
        given.append((args, kwargs))
        monkeypatch.setattr(Watched, "repairing", True)
        try:
            return repair_split(*args, **kwargs)
        finally:
            monkeypatch.setattr(Watched, "repairing", False)

    repair_split = session_module.repair_split
    monkeypatch.setattr(session_module, "repair_split", watched)
    callback, _ = fit(setting, **data, evaluation_trigger=real, method=spy)
    assert callback.report.status == "repaired"
    ((args, kwargs),) = given
    plan = args[2]
    assert plan.trigger is None
    assert real not in [*args, *kwargs.values(), *vars(plan).values()]
    assert real.uses >= 2  # before and after
    assert spy.tasks
    for task in spy.tasks:
        assert isinstance(task.trigger, TriggerPool)
        assert real not in list(task.trigger.modules())
        inverted = 1 - task.scoring.clean
        assert not torch.allclose(task.scoring.triggered, inverted)


def _careless(images: Tensor) -> Tensor:
    """A trigger that draws from the global generator and writes into what it is given."""
    torch.rand(7)  # of what others were to draw
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))  # the same rates every time
    return images.mul_(0).add_(noise)


@pytest.mark.parametrize("has_test", [True, False])
def test_weights_do_not_depend_on_the_evaluation_trigger(setting, has_test):
    data = {"clean_data": held_out(setting)} if has_test else {}
    triggers = [None, setting.victim.trigger, BlendTrigger(ratio=0.5, target=2), FunctionTrigger(_careless, target=1)]
    found = [fit(setting, **data, evaluation_trigger=trigger) for trigger in triggers]
    (first, weights), *others = found
    assert first.report.status == "repaired"
    assert all(same(weights, other) for _, other in others)
    for other, _ in others:
        assert other.report.rounds == first.report.rounds
        assert other.report.filters == first.report.filters
        assert other.report.estimated_trigger == first.report.estimated_trigger
        assert other.report.estimated_asr == first.report.estimated_asr
    rates = [(other.report.before["asr"], other.report.after["ra"]) for other, _ in others]
    assert len(set(rates)) == len(rates)  # they do measure


# A clean verdict


@pytest.mark.parametrize("evaluation", [False, True])
def test_a_clean_model_is_left_bit_for_bit(innocent, evaluation):
    kept, model = Kept(), innocent.model(learning_rate=0.01)
    options = {"evaluation_trigger": innocent.victim.trigger} if evaluation else {}
    callback = innocent.callback(**UNKNOWN | {"clean_data": held_out(innocent)} | options)
    innocent.trainer(kept, callback).fit(model, innocent.loader())
    assert not same(kept.state, {f"net.{name}": tensor for name, tensor in innocent.original.items()})  # it did train
    assert same(kept.state, model.state_dict())
    assert [module.training for module in model.modules()] == kept.training
    assert not [name for name in innocent.files() if "unlearned" in name]
    report = callback.report
    assert (report.status, report.verdict, report.suspected_target, report.target) == ("clean", "clean", None, None)
    assert (report.checkpoint, report.rounds, report.filters["pruned"]) == (None, (), 0)
    assert report.before["acc"] == report.after["acc"]
    assert "Verdict: clean" in str(report)
    assert "estimated trigger" not in str(report)
    read = written(innocent)
    assert read == report.to_dict()
    assert read["before"]["asr"] == (report.before["asr"] if evaluation else None)


def test_a_clean_model_can_be_repaired_by_force(innocent):
    callback, _ = fit(innocent, force=True)
    assert callback.report.verdict == "clean"
    assert callback.report.status in ("repaired", "not improved")
    assert callback.report.rounds

"""A repair without any training: from a hook of another callback, inside the Trainer's other loops."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L  # noqa: N812 - the usual name
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, Dataset

from lightning_unlearn import BackdoorUnlearning, HoldoutDataModule
from lightning_unlearn.classifier import ConvClassifier
from lightning_unlearn.methods import FineTuning, MaskPrune
from lightning_unlearn.report import Report
from tests.small_fits import backdoor_is_gone
from tests.unknown_fits import UNKNOWN

METHOD = MaskPrune(steps=45, finetune=FineTuning(triggered=True, max_epochs=1, patience=1, norms="frozen"))


class Repairing(L.Callback):
    """Repairs in one hook, with the mode that it is called in."""

    def __init__(self, unlearning: BackdoorUnlearning, hook: str) -> None:
        self.unlearning = unlearning
        self.report: Report | None = None
        setattr(self, hook, self._repair)

    def _repair(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if self.report is None:
            self.inference, self.autocast = torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
            self.report = self.unlearning.unlearn(trainer, pl_module)
            self.still = torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")


class Predicting(ConvClassifier):
    """Repairs itself in the middle of a step, where autocast is on."""

    repairing: Any = None

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.repairing(self.trainer, self)
        super().validation_step(batch, batch_idx)


def unlearning(victim) -> BackdoorUnlearning:
    clean = HoldoutDataModule(victim.holdout, samples_per_class=4, test_dataset=victim.test)
    return BackdoorUnlearning(clean, victim.trigger, METHOD)


def trainer(folder, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=CSVLogger(folder),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )


@pytest.mark.parametrize("inference_mode", [True, False])
@pytest.mark.parametrize("loop", ["validate", "test", "predict"])
def test_from_a_hook(digits_victim, tmp_path, loop, inference_mode):
    name = {"validate": "validation"}.get(loop, loop)
    repairing = Repairing(unlearning(digits_victim), f"on_{name}_end")
    model = digits_victim.fresh()
    if loop == "test":
        model.test_step = model.validation_step
    if loop == "predict":
        model.predict_step = lambda batch, batch_idx: model(batch[0])
    training = [module.training for module in model.modules()]
    runner = trainer(tmp_path, repairing, inference_mode=inference_mode)
    getattr(runner, loop)(model, DataLoader(digits_victim.test, batch_size=100))
    report = repairing.report
    assert report.status == "repaired"
    assert (report.before["asr"] >= 0.9, report.after["asr"] <= 0.1) == (True, True)
    assert digits_victim.measure(model).rates() == pytest.approx(report.after)
    assert repairing.inference == repairing.still[0]
    # Whoever called it can train on: nothing of it is an inference tensor, and its modes are its own.
    assert not any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))
    assert [module.training for module in model.modules()] == training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    model(digits_victim.test.images[:2]).sum().backward()
    assert not list(tmp_path.rglob("*.ckpt"))
    assert "unlearn/asr_after" in next(tmp_path.rglob("metrics.csv")).read_text()


def test_in_a_step_autocast_is_not_in_the_way(digits_victim, tmp_path):
    reports = {}
    for precision in ("32-true", "bf16-mixed"):
        model = Predicting(width=8)
        model.load_state_dict(digits_victim.trained.state_dict())
        repairing = Repairing(unlearning(digits_victim), "unused")
        model.repairing = repairing._repair
        runner = trainer(tmp_path / precision, precision=precision)
        runner.validate(model, DataLoader(digits_victim.test, batch_size=100), verbose=False)
        assert repairing.autocast == repairing.still[1] == (precision == "bf16-mixed")
        assert repairing.inference
        reports[precision] = repairing.report
    assert reports["bf16-mixed"].filters == reports["32-true"].filters
    assert reports["bf16-mixed"].rounds == reports["32-true"].rounds
    assert reports["bf16-mixed"].after == reports["32-true"].after


class Noisy(Dataset[Any]):
    """Reading it draws a random number."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset, self.targets = dataset, [label for _, label in dataset]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Any:
        torch.rand(1)
        return self.dataset[index]


@pytest.mark.parametrize("work", ["unlearn", "audit"])
def test_inside_inference_mode_nothing_else_changes(setting, work):
    class Works(L.Callback):
        def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            assert torch.is_inference_mode_enabled()
            generator = torch.get_rng_state()
            self.done = getattr(unlearning, work)(trainer, pl_module)
            assert torch.equal(torch.get_rng_state(), generator)

    unlearning, works, model = setting.callback(**UNKNOWN, clean_data=Noisy(setting.clean)), Works(), setting.model()
    model.validation_step = lambda *_: None
    setting.trainer(works).validate(model, setting.loader(), verbose=False)
    assert (works.done.verdict, backdoor_is_gone(model)) == ("backdoored", work == "unlearn")


def test_split_weights_are_refused_here_too(digits_victim, tmp_path, monkeypatch):
    runner = trainer(tmp_path)
    monkeypatch.setattr(L.Trainer, "strategy", object.__new__(ModelParallelStrategy))
    with pytest.raises(MisconfigurationException, match="ModelParallelStrategy shards them"):
        unlearning(digits_victim).unlearn(runner, digits_victim.fresh())

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import lightning.pytorch as L  # noqa: N812 - the usual name
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_unlearn import BackdoorUnlearning, HoldoutDataModule, Report
from lightning_unlearn.auditor import Auditor
from lightning_unlearn.classifier import ConvClassifier
from lightning_unlearn.data import Digits, Pairs
from lightning_unlearn.logs import log_pictures, log_report, log_round
from lightning_unlearn.methods import FineTuning, GradPrune, Round
from lightning_unlearn.triggers import FunctionTrigger, Normalization, PatchTrigger

ROUND = {"val_acc", "val_asr", "val_ra", "val_loss", "val_unlearning_loss", "pruned_in_rounds"}
RATES = {f"{rate}_{when}" for rate in ("acc", "asr", "ra") for when in ("before", "after")}
REPORT = RATES | {"der", "rir", "filters_pruned", "filters_turned_down", "repaired"}
METHOD = GradPrune(max_rounds=2, patience=2, accuracy_drop=1.0, finetune=FineTuning(max_epochs=1))


def fit(folder: Path, *loggers: Logger) -> tuple[Report, L.Trainer]:
    """Two training steps, two rounds of pruning, one epoch of fine-tuning."""
    torch.manual_seed(0)
    clean = HoldoutDataModule(
        Digits(part="holdout", size=8), samples_per_class=2, test_dataset=Digits(part="test", size=8)
    )
    unlearn = BackdoorUnlearning(clean, PatchTrigger(size=2, target=0), METHOD, force=True)
    trainer = L.Trainer(
        callbacks=[unlearn], logger=list(loggers), max_epochs=1, limit_train_batches=2, limit_val_batches=0,
        log_every_n_steps=1, accelerator="cpu", default_root_dir=folder, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(ConvClassifier(width=2), DataLoader(Digits(part="train", size=8), batch_size=50))
    return unlearn.report, trainer


def events(folder: str | Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()


def pixels(found: EventAccumulator, tag: str) -> np.ndarray:
    (image,) = found.Images(tag)
    return np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))


def test_tensorboard_and_csv(tmp_path):
    tensorboard, table = TensorBoardLogger(tmp_path, name="tb"), CSVLogger(tmp_path, name="csv")
    report, trainer = fit(tmp_path, tensorboard, table)
    assert [done.stage for done in report.rounds] == ["prune", "prune", "finetune"]
    assert trainer.global_step == 2

    found = events(tensorboard.log_dir)
    tags = {tag.removeprefix("unlearn/") for tag in found.Tags()["scalars"] if tag.startswith("unlearn/")}
    assert tags == ROUND | REPORT
    for name in ROUND - {"pruned_in_rounds"}:
        scalars = found.Scalars(f"unlearn/{name}")
        assert [scalar.step for scalar in scalars] == [3, 4, 5]
        assert [s.value for s in scalars] == pytest.approx([getattr(done, name) for done in report.rounds])
    assert [scalar.value for scalar in found.Scalars("unlearn/pruned_in_rounds")] == [1, 2, 0]
    assert report.filters["pruned"] == 0  # neither round was better than none
    for when, rates in (("before", report.before), ("after", report.after)):
        for name, rate in rates.items():
            (scalar,) = found.Scalars(f"unlearn/{name}_{when}")
            assert (scalar.step, scalar.value) == (5, pytest.approx(rate))
    assert set(found.Tags()["images"]) == {"unlearn/clean", "unlearn/triggered", "unlearn/trigger"}
    assert len(list(Path(tensorboard.log_dir).glob("events*"))) == 1

    with (Path(table.log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {name.removeprefix("unlearn/") for name in rows[0] if name.startswith("unlearn/")} == ROUND | REPORT
    by_step = {int(row["step"]): row for row in rows}
    assert sorted(by_step) == [0, 1, 3, 4, 5]
    assert float(by_step[4]["unlearn/val_acc"]) == pytest.approx(report.rounds[1].val_acc)
    assert float(by_step[5]["unlearn/der"]) == pytest.approx(report.der)
    assert float(by_step[1]["train_loss"]) > 0


def test_two_loggers_of_one_kind(tmp_path):
    loggers = [CSVLogger(tmp_path, name=name) for name in ("a", "b")]
    fit(tmp_path, *loggers)
    texts = [(Path(logger.log_dir) / "metrics.csv").read_text() for logger in loggers]
    assert texts[0] == texts[1]
    assert "unlearn/asr_after" in texts[0]


def test_no_logger(tmp_path):
    report, trainer = fit(tmp_path)
    assert trainer.loggers == []
    assert trainer.callback_metrics["unlearn/acc_after"].item() == pytest.approx(report.after["acc"])
    assert {name.removeprefix("unlearn/") for name in trainer.callback_metrics if "unlearn" in name} == REPORT


class Keeps(CSVLogger):
    """Remembers what it is told."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.told: list[tuple[dict[str, float], int | None]] = []

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.told.append((dict(metrics), step))


def quiet_trainer(logger: Any) -> L.Trainer:
    return L.Trainer(logger=logger, accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False)


def test_log_round(tmp_path):
    logger = Keeps(tmp_path)
    log_round(quiet_trainer(logger), Round(7, "prune", (("conv", 1),), 0.9, 0.8, 0.1, 0.5, 3.0, total_pruned=4))
    assert logger.told == [
        (
            {
                "unlearn/val_acc": 0.9,
                "unlearn/val_asr": 0.8,
                "unlearn/val_ra": 0.1,
                "unlearn/val_loss": 0.5,
                "unlearn/val_unlearning_loss": 3.0,
                "unlearn/pruned_in_rounds": 4.0,
            },
            7,
        )
    ]


def test_log_report(tmp_path):
    logger = Keeps(tmp_path)
    trainer = quiet_trainer(logger)
    report = Report(
        method="GradPrune", trigger="PatchTrigger", target=0, samples_per_class=10, seed=0, status="repaired",
        measured_on="test", before={"acc": 0.9, "asr": 1.0, "ra": 0.0},
        after={"acc": 0.8, "asr": float("nan"), "ra": 0.7}, der=0.95, rir=0.8,
        filters={
            "total": 4, "layers": {"conv": 4}, "pruned": 1, "by_layer": {"conv": [3]},
            "turned_down": 2, "turned_down_by_layer": {"conv": [0, 1]},
        }, rounds=(), seconds={"total": 1.0},
        checkpoint=None, versions={},
    )  # fmt: skip
    log_report(trainer, report)
    ((values, step),) = logger.told
    assert step == 0
    assert values == {  # what is not known is left out
        "unlearn/acc_before": 0.9, "unlearn/asr_before": 1.0, "unlearn/ra_before": 0.0, "unlearn/acc_after": 0.8,
        "unlearn/ra_after": 0.7, "unlearn/der": 0.95, "unlearn/rir": 0.8, "unlearn/filters_pruned": 1.0,
        "unlearn/filters_turned_down": 2.0, "unlearn/repaired": 1.0,
    }  # fmt: skip
    assert "unlearn/asr_after" not in trainer.callback_metrics
    assert trainer.callback_metrics["unlearn/acc_after"].item() == pytest.approx(0.8)


# Pictures: a grid of up to 2 rows of 4, each framed by 2 black pixels


@pytest.mark.parametrize("normalization", [None, Normalization(mean=(0.5,), std=(0.25,))], ids=["pixels", "normalised"])
def test_pictures(tmp_path, normalization):
    images = torch.full((9, 1, 8, 8), 0.25)
    trigger = PatchTrigger(size=2, target=0)
    if normalization is not None:
        images, trigger = normalization.apply(images), trigger.normalized(normalization)
    logger = TensorBoardLogger(tmp_path)
    log_pictures(quiet_trainer(logger), Pairs.stamp(images, torch.zeros(9).long(), trigger, num_classes=2), trigger)
    logger.finalize("success")
    found = events(logger.log_dir)
    clean, triggered, change = (pixels(found, f"unlearn/{name}") for name in ("clean", "triggered", "trigger"))
    assert clean.shape == triggered.shape == change.shape == (22, 42, 3)
    assert sorted(set(clean.flatten())) == [0, 63]
    assert (triggered != clean).any(2).sum() == 8 * 4
    assert triggered[8:10, 8:10].min() == 255
    assert triggered[2:8, 2:10].max() == 63
    assert set(change[2:8, 2:10].flatten()) <= {127, 128}  # no change is mid-grey
    assert change[8:10, 8:10].min() > 220


def test_pictures_in_colour(tmp_path):
    images = torch.zeros(2, 3, 8, 8)
    images[:, 0] = 1
    trigger = FunctionTrigger(lambda x: x.roll(1, 1), target=0)
    logger = TensorBoardLogger(tmp_path)
    log_pictures(quiet_trainer(logger), Pairs.stamp(images, torch.tensor([0, 1]), trigger, num_classes=2), trigger)
    logger.finalize("success")
    found = events(logger.log_dir)
    assert pixels(found, "unlearn/clean")[4, 4].tolist() == [255, 0, 0]
    assert pixels(found, "unlearn/triggered")[4, 4].tolist() == [0, 255, 0]


def test_pictures_of_bytes(tmp_path):
    logger, trigger = TensorBoardLogger(tmp_path), PatchTrigger(size=2, target=0)
    images = torch.full((1, 1, 8, 8), 51, dtype=torch.uint8)
    log_pictures(quiet_trainer(logger), Pairs.stamp(images, torch.tensor([0]), trigger, num_classes=2), trigger)
    logger.finalize("success")
    assert pixels(events(logger.log_dir), "unlearn/clean")[2:8, 2:8].tolist() == [[[51] * 3] * 6] * 6


class FiveBands(Dataset[tuple[Tensor, int]]):
    """Satellite images have more channels than pictures can show."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((5, 8, 8), index / 8), index % 2


def test_no_pictures_of_what_pictures_cannot_show(tmp_path):
    unlearn = BackdoorUnlearning(FiveBands(), PatchTrigger(), METHOD, samples_per_class=2, force=True)
    logger = TensorBoardLogger(tmp_path)
    trainer = L.Trainer(
        callbacks=[unlearn], logger=logger, max_epochs=1, accelerator="cpu", enable_checkpointing=False,
        default_root_dir=tmp_path, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(ConvClassifier(channels=5, classes=2, width=2), DataLoader(FiveBands(), batch_size=4))
    found = events(logger.log_dir).Tags()
    assert found["images"] == []
    assert "unlearn/acc_after" in found["scalars"]


def test_loggers_without_pictures_get_none(tmp_path):
    logger = Keeps(tmp_path)
    pairs = Pairs.stamp(torch.zeros(1, 1, 8, 8), torch.zeros(1).long(), PatchTrigger(), num_classes=2)
    log_pictures(quiet_trainer(logger), pairs, PatchTrigger())
    assert logger.told == []


def test_pictures_of_bytes_are_pixels_as_they_are(tmp_path):
    """To a trigger bytes are pixels always, whatever normalisation it was told for other images."""
    logger, trigger = TensorBoardLogger(tmp_path), PatchTrigger(mean=[0.5], std=[0.2])
    grey = torch.full((1, 1, 8, 8), 128, dtype=torch.uint8)
    log_pictures(quiet_trainer(logger), Pairs.stamp(grey, torch.ones(1).long(), trigger, num_classes=2), trigger)
    logger.experiment.flush()
    assert 128 in pixels(events(logger.log_dir), "unlearn/clean")
    assert 255 in pixels(events(logger.log_dir), "unlearn/triggered")


# An unknown trigger


def test_estimates_in_tensorboard(setting, tmp_path):
    logger = TensorBoardLogger(tmp_path)
    callback = setting.callback(trigger=None, auditor=Auditor(steps=10), samples_per_class=4)
    setting.trainer(callback, logger=logger).fit(setting.model(), setting.loader())
    found = events(logger.log_dir)
    report = callback.report
    for when in ("before", "after"):
        (scalar,) = found.Scalars(f"unlearn/estimated_asr_{when}")
        assert (scalar.step, scalar.value) == (3 + len(report.rounds), pytest.approx(report.estimated_asr[when]))
    logged = {tag.removeprefix("unlearn/") for tag in found.Tags()["scalars"] if tag.startswith("unlearn/")}
    assert logged == ROUND | {
        "acc_before",
        "acc_after",
        "filters_pruned",
        "filters_turned_down",
        "repaired",
        "estimated_asr_before",
        "estimated_asr_after",
    }
    images = {"unlearn/clean", "unlearn/estimated_triggered", "unlearn/estimated_trigger"}
    assert set(found.Tags()["images"]) == images
    assert (pixels(found, "unlearn/clean") != pixels(found, "unlearn/estimated_triggered")).any()


def test_the_real_trigger_beside_estimates(setting, tmp_path):
    logger = TensorBoardLogger(tmp_path)
    unknown = {"trigger": None, "evaluation_trigger": setting.victim.trigger, "auditor": Auditor(steps=10)}
    callback = setting.callback(**unknown, samples_per_class=4)
    setting.trainer(callback, logger=logger).fit(setting.model(), setting.loader())
    found = events(logger.log_dir)
    names = ("clean", "triggered", "trigger", "estimated_triggered", "estimated_trigger")
    assert set(found.Tags()["images"]) == {f"unlearn/{name}" for name in names}
    pictures = [np.asarray(Image.open(io.BytesIO(i.encoded_image_string))) for i in found.Images("unlearn/triggered")]
    assert pictures[0][2:6, 2:6, 0][3, 3] == 255  # the white pixel in the lower right corner


def test_an_audit_in_tensorboard(setting, tmp_path):
    """Without any repair."""
    logger = TensorBoardLogger(tmp_path)
    callback = setting.callback(trigger=None, auditor=Auditor(steps=10), samples_per_class=4)
    found = callback.audit(quiet_trainer(logger), setting.model())
    logger.finalize("success")
    assert found.verdict == "backdoored"
    read = events(logger.log_dir)
    assert set(read.Tags()["images"]) == {
        "unlearn/clean", "unlearn/estimated_triggered", "unlearn/estimated_trigger"
    }  # fmt: skip
    assert read.Tags()["scalars"] == []

from __future__ import annotations

import dataclasses
import json
import math
import os
import stat
from importlib.metadata import version
from pathlib import Path

import pytest

import lightning_unlearn
from lightning_unlearn.evaluation import Evaluation
from lightning_unlearn.methods import GradPrune, Round
from lightning_unlearn.repair import repair
from lightning_unlearn.report import Report
from lightning_unlearn.triggers import BlendTrigger, PatchTrigger
from tests.small_reports import ROUNDS, a_result, shown


@pytest.fixture
def result():
    return a_result()


@pytest.fixture
def report(result):
    return Report.of(result, PatchTrigger(target=3), samples_per_class=10, seed=7, checkpoint=Path("some") / "m.ckpt")


def test_sums_in_another_order_read_alike(report):
    """As they come of another number of processes: losses differ in the fifth decimal, rates in the eighth."""

    def moved(done: Round, loss: float, rate: float) -> Round:
        return dataclasses.replace(done, val_loss=0.0568 + loss, val_unlearning_loss=2.0 + loss, val_acc=0.75 + rate)

    first, second = (
        dataclasses.replace(report, rounds=tuple(moved(done, *by) for done in ROUNDS)).to_dict()
        for by in ((0.0, 0.0), (1.3e-5, 6e-8))
    )
    assert first == second
    assert [first["rounds"][0][name] for name in ("val_loss", "val_unlearning_loss", "val_acc")] == [0.0568, 2.0, 0.75]


def test_the_schema(report):
    assert report.to_dict() == {
        "schema_version": 1,
        "method": "GradPrune",
        "trigger": "PatchTrigger",
        "target": 3,
        "samples_per_class": 10,
        "seed": 7,
        "status": "repaired",
        "measured_on": "validation",
        "before": {"acc": 0.9, "asr": 1.0, "ra": 0.0},
        "after": {"acc": 0.8, "asr": 0.1, "ra": 0.7},
        "der": pytest.approx(0.9),  # (0.9 - 0.1 + 1) / 2
        "rir": pytest.approx(0.8),  # (0.7 - 0.1 + 1) / 2
        "filters": {
            "total": 5,
            "layers": {"0": 3, "2": 2},
            "pruned": 3,
            "by_layer": {"0": [1, 2], "2": [0]},
            "turned_down": 1,
            "turned_down_by_layer": {"0": [0]},
        },
        "rounds": [
            {
                "round": 1,
                "stage": "prune",
                "pruned": [["0", 2], ["2", 0]],
                "val_acc": 0.8,
                "val_asr": 0.1,
                "val_ra": 0.7,
                "val_loss": 0.4,
                "val_unlearning_loss": 0.5,
                "total_pruned": 2,
            },
            {
                "round": 2,
                "stage": "finetune",
                "pruned": [],
                "val_acc": 0.8,
                "val_asr": 0.2,
                "val_ra": 0.6,
                "val_loss": 0.5,
                "val_unlearning_loss": None,
                "total_pruned": 0,
            },
        ],
        "seconds": {"estimate": 0.0, "score": 0.5, "evaluate": 0.25, "finetune": 0.0, "total": 1.26},
        "checkpoint": os.path.join("some", "m.ckpt"),
        "versions": {
            "lightning_unlearn": lightning_unlearn.__version__,
            "torch": version("torch"),
            "lightning": version("lightning"),
        },
        "verdict": None,
        "suspected_target": None,
        "suspected_targets": None,
        "score": None,
        "caveats": [],
        "estimated_trigger": None,
        "estimated_asr": None,
        "labels": "given",
    }
    assert next(iter(report.to_dict())) == "schema_version"


def test_saved_and_read_again(report, tmp_path):
    path = report.save(tmp_path / "new" / "report.json")
    assert path == tmp_path / "new" / "report.json"
    text = path.read_text(encoding="utf-8")
    assert json.loads(text) == json.loads(json.dumps(report.to_dict())) == report.to_dict()
    assert text.endswith("}\n")
    assert os.listdir(path.parent) == ["report.json"]


def test_numbers_that_json_has_no_word_for_are_null(result, tmp_path):
    nothing = Evaluation(acc=1.0, asr=math.nan, ra=math.nan, loss=0.1, unlearning_loss=-math.inf)
    result = dataclasses.replace(result, before=nothing, after=nothing)
    report = Report.of(result, PatchTrigger(), samples_per_class=2, seed=0)
    assert math.isnan(report.der)
    text = report.save(tmp_path / "report.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    read = json.loads(text)
    assert read["before"] == read["after"] == {"acc": 1.0, "asr": None, "ra": None}
    assert (read["der"], read["rir"]) == (None, None)
    assert read["rounds"][1]["val_unlearning_loss"] is None
    assert "| ASR ↓ | unknown | unknown |" in str(report)


def test_test_data_counts_if_there_is_any(result):
    before = Evaluation(acc=1.0, asr=0.9, ra=0.1, loss=0.0, unlearning_loss=9.0)
    after = Evaluation(acc=1.0, asr=0.4, ra=0.4, loss=0.0, unlearning_loss=1.0)
    report = Report.of(result, PatchTrigger(), samples_per_class=None, seed=0, test=(before, after))
    assert report.measured_on == "test"
    assert (report.before, report.after) == (before.rates(), after.rates())
    assert report.der == pytest.approx(0.75)
    assert report.rir == pytest.approx(0.65)
    assert report.samples_per_class is None


@pytest.mark.parametrize(
    ("before", "after", "der", "rir"),
    [
        # (acc, asr, ra) before and after
        ((1.0, 1.0, 0.0), (1.0, 0.0, 1.0), 1.0, 1.0),
        ((0.9, 1.0, 0.0), (0.9, 1.0, 0.0), 0.5, 0.5),
        ((0.5, 0.2, 0.4), (0.9, 0.6, 0.3), 0.5, 0.5),  # a better ACC gains nothing, a worse ASR or RA costs nothing
        ((1.0, 0.0, 0.0), (0.0, 0.0, 0.0), 0.0, 0.0),
        ((0.9, 0.8, 0.1), (0.7, 0.3, 0.5), 0.65, 0.6),
    ],
)
def test_der_and_rir_by_hand(result, before, after, der, rir):
    def evaluation(acc, asr, ra):
        return Evaluation(acc=acc, asr=asr, ra=ra, loss=0.0, unlearning_loss=0.0)

    test = (evaluation(*before), evaluation(*after))
    report = Report.of(result, PatchTrigger(), samples_per_class=10, seed=0, test=test)
    assert report.der == pytest.approx(der)
    assert report.rir == pytest.approx(rir)


def test_the_trigger_is_named(result):
    report = Report.of(result, BlendTrigger(target="all_to_all"), samples_per_class=10, seed=0)
    assert (report.trigger, report.target) == ("BlendTrigger", "all_to_all")
    assert json.loads(json.dumps(report.to_dict()))["target"] == "all_to_all"
    assert report.checkpoint is None
    assert json.loads(json.dumps(report.to_dict()))["checkpoint"] is None


def test_saved_as_fills_the_checkpoint_in(report, tmp_path):
    other = report.saved_as(tmp_path / "x.ckpt")
    assert other.checkpoint == str(tmp_path / "x.ckpt")
    assert dataclasses.replace(other, checkpoint=report.checkpoint) == report
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.checkpoint = "other"


def test_what_is_only_pruned_says_nothing_of_turning_down(hand_victim):
    done = repair(hand_victim.net, hand_victim.clean, trigger=hand_victim.trigger, method=GradPrune(finetune=False))
    report = Report.of(done, hand_victim.trigger, samples_per_class=10, seed=0)
    assert "turned" not in report.summary() + shown(report)


def test_as_markdown(report):
    assert str(report).splitlines() == [
        "| validation data | before | after |",
        "| --- | --- | --- |",
        "| ACC ↑ | 0.900 | 0.800 |",
        "| ASR ↓ | 1.000 | 0.100 |",
        "| RA ↑ | 0.000 | 0.700 |",
        "| DER ↑ | | 0.900 |",
        "",
        "GradPrune pruned 3 of 5 filters and turned 1 down by more than half in 1.3 s.",
    ]


def test_as_table(report):
    text = shown(report)
    lines = [line.replace("┃", "│").strip("│ ").split("│") for line in text.splitlines()]
    cells = {tuple(cell.strip() for cell in line) for line in lines}
    assert {
        ("validation data", "before", "after"),
        ("ACC ↑", "0.900", "0.800"),
        ("ASR ↓", "1.000", "0.100"),
        ("RA ↑", "0.000", "0.700"),
        ("DER ↑", "", "0.900"),
        ("filters pruned", "", "3 of 5"),
        ("turned down by more than half", "", "1"),
    } <= cells
    words = " ".join(text.split())
    assert "GradPrune · PatchTrigger · target 3 · 10 clean images per class" in words


@pytest.mark.parametrize(
    ("status", "match"),
    [
        ("not backdoored", "Left alone: the trigger's ASR on the clean images is already low (PatchTrigger)"),
        ("not improved", "Left as it was: GradPrune found nothing better than the original model."),
    ],
)
def test_it_says_when_nothing_was_done(result, status, match):
    report = Report.of(dataclasses.replace(result, status=status), PatchTrigger(), samples_per_class=10, seed=0)
    assert match in report.summary()
    assert match in str(report)
    assert report.to_dict()["status"] == status


@pytest.mark.parametrize(("mask", "wanted"), [(0o022, 0o644), (0o077, 0o600)])
def test_the_umask_is_honoured(report, tmp_path, mask, wanted):
    before = os.umask(mask)
    try:
        path = report.save(tmp_path / "report.json")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == wanted


def test_an_old_report_survives_a_failure(report, tmp_path, monkeypatch):
    path = report.save(tmp_path / "report.json")
    old = path.read_text()

    def fail(self, text, encoding):
        self.write_bytes(b"{")
        raise OSError("disk is full")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="disk is full"):
        report.save(path)
    assert path.read_text() == old
    assert os.listdir(tmp_path) == ["report.json"]


def test_of_a_real_repair(hand_victim, tmp_path):
    method = GradPrune(finetune=False)
    done = repair(hand_victim.net, hand_victim.clean, trigger=hand_victim.trigger, method=method, seed=3)
    report = Report.of(done, hand_victim.trigger, samples_per_class=10, seed=3)
    read = json.loads(report.save(tmp_path / "report.json").read_text())
    assert read["before"] == {"acc": 1.0, "asr": 1.0, "ra": 0.0}
    assert read["after"] == {"acc": 1.0, "asr": 0.0, "ra": 1.0}
    assert (read["der"], read["rir"]) == (1.0, 1.0)
    none = {"turned_down": 0, "turned_down_by_layer": {}}
    assert read["filters"] == {"total": 4, "layers": {"0": 4}, "pruned": 1, "by_layer": {"0": [3]}, **none}
    assert read["rounds"][0]["pruned"] == [["0", 3]]
    assert list(read["seconds"]) == ["estimate", "score", "evaluate", "finetune", "total"]

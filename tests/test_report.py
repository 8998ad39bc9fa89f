from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import stat
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

import lightning_unlearn
from lightning_unlearn.evaluation import Evaluation
from lightning_unlearn.filters import FilterMask, find_filters
from lightning_unlearn.judgement import ClassAudit
from lightning_unlearn.methods import GradPrune, Round
from lightning_unlearn.repair import repair
from lightning_unlearn.report import Report
from lightning_unlearn.result import RepairResult
from lightning_unlearn.triggers import BlendTrigger, PatchTrigger
from lightning_unlearn.triggers.inversion import Estimate
from lightning_unlearn.verdict import Audit

BEFORE = Evaluation(acc=0.9, asr=1.0, ra=0.0, loss=0.3, unlearning_loss=5.0)
AFTER = Evaluation(acc=0.8, asr=0.1, ra=0.7, loss=0.4, unlearning_loss=0.5)
HELD_BEFORE = dataclasses.replace(BEFORE, asr=0.95)
HELD_AFTER = dataclasses.replace(AFTER, asr=0.15)
ROUNDS = (
    Round(1, "prune", (("0", 2), ("2", 0)), 0.8, 0.1, 0.7, 0.4, 0.5, total_pruned=2),
    Round(2, "finetune", (), 0.8, 0.2, 0.6, 0.5, math.inf),
)
SECONDS = {"estimate": 0.0, "score": 0.5, "evaluate": 0.25, "finetune": 0.0, "total": 1.26}


@pytest.fixture
def result():
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(32, 4)).eval()
    mask = FilterMask(find_filters(net, torch.rand(1, 1, 8, 8)))
    mask.fold(torch.tensor([0.25, 1.0, 0.4, 1.0, 0.5]))  # the third is pruned next, and half is not less than half
    mask.prune([("2", 0), ("0", 2), ("0", 1)])
    return RepairResult(
        method="GradPrune",
        status="repaired",
        before=BEFORE,
        after=AFTER,
        rounds=ROUNDS,
        mask=mask,
        scoring=None,
        held=(HELD_BEFORE, HELD_AFTER),
        trigger=PatchTrigger(target=3),
        seconds=SECONDS,
    )


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


def shown(report):
    console = Console(file=io.StringIO(), width=120)
    console.print(report)
    return console.file.getvalue()


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


# An unknown trigger


ESTIMATES = (
    Estimate(PatchTrigger(target=3), "covering", 3, cost=0.02, success=1.0),
    Estimate(PatchTrigger(target=3), "additive", 3, cost=0.1, success=0.75),
)


@pytest.fixture
def unknown(result):
    entries = (ClassAudit(3, 1.7, {}, {}, {"additive": 0.75}),)
    audit = Audit("backdoored", 3, score=1.7, classes=entries, estimates=ESTIMATES, num_classes=10)
    return dataclasses.replace(result, audit=audit)


@pytest.fixture
def clean(result):
    entries = (ClassAudit(3, 0.7, {}, {}, {"additive": 0.75}),)
    audit = Audit("clean", None, score=0.7, classes=entries, estimates=ESTIMATES, num_classes=10)
    mask = FilterMask(result.mask.layers)
    held = (HELD_BEFORE, HELD_BEFORE)
    return dataclasses.replace(
        result, status="clean", after=BEFORE, rounds=(), mask=mask, held=held, audit=audit, trigger=audit.trigger
    )


def test_what_estimates_do_is_no_measure_of_the_real_trigger(unknown, tmp_path):
    report = Report.of(unknown, None, samples_per_class=10, seed=7)
    read = json.loads(report.save(tmp_path / "report.json").read_text())
    assert read["before"] == {"acc": 0.9, "asr": None, "ra": None}
    assert read["after"] == {"acc": 0.8, "asr": None, "ra": None}
    assert (read["der"], read["rir"], read["trigger"], read["target"]) == (None, None, "unknown", 3)
    assert (read["verdict"], read["suspected_target"], read["labels"]) == ("backdoored", 3, "given")
    assert read["estimated_asr"] == {"before": 0.95, "after": 0.15}  # of all images held, not of the validation part
    assert read["estimated_trigger"] == [
        {"family": "covering", "target": 3, "cost": 0.02, "success": 1.0},
        {"family": "additive", "target": 3, "cost": 0.1, "success": 0.75},
    ]


def test_real_rates_beside_the_estimated_one(unknown):
    report = Report.of(unknown, None, samples_per_class=10, seed=7, test=(BEFORE, AFTER))
    assert (report.before, report.after) == (BEFORE.rates(), AFTER.rates())
    assert (report.measured_on, report.trigger) == ("test", "unknown")
    assert report.der == pytest.approx(0.9)
    assert report.estimated_asr == {"before": 0.95, "after": 0.15}


def test_real_rates_of_the_validation_part(unknown):
    report = Report.of(unknown, None, samples_per_class=10, seed=7, validation=(HELD_BEFORE, HELD_AFTER))
    assert (report.before, report.after) == (HELD_BEFORE.rates(), HELD_AFTER.rates())
    assert (report.measured_on, report.trigger) == ("validation", "unknown")
    with_test = Report.of(
        unknown, None, samples_per_class=10, seed=7, test=(BEFORE, AFTER), validation=(HELD_BEFORE, HELD_AFTER)
    )
    assert (with_test.before, with_test.measured_on) == (BEFORE.rates(), "test")


def test_several_suspects(unknown):
    entries = tuple(ClassAudit(c, score, {}, {}, {}) for c, score in enumerate((1.2, 0.1, 1.0, 1.7)))
    unknown = dataclasses.replace(unknown, audit=dataclasses.replace(unknown.audit, classes=entries))
    report = Report.of(unknown, None, samples_per_class=10, seed=7)
    assert (report.target, report.suspected_target, report.to_dict()["suspected_targets"]) == (3, 3, [3, 0])
    assert report.summary().startswith("Verdict: backdoored, target 3, 0. ")


def test_predicted_labels_are_told(unknown):
    report = Report.of(unknown, None, samples_per_class=10, seed=7, labels="predicted")
    assert report.to_dict()["labels"] == "predicted"
    for text in (report.headline(), str(report), " ".join(shown(report).split())):
        assert "no labels: the model's own answers stood in for them." in text


@pytest.mark.parametrize("status", ["clean", "not backdoored", "not improved", "repaired"])
def test_predicted_labels_are_told_whatever_was_done(unknown, status):
    report = Report.of(dataclasses.replace(unknown, status=status), None, samples_per_class=10, seed=7)
    assert "no labels" not in report.summary()
    told = dataclasses.replace(report, labels="predicted").summary()
    assert told == f"{report.summary()} The clean images had no labels: the model's own answers stood in for them."


def test_what_must_be_known_to_read_a_verdict_is_told(clean):
    few = dataclasses.replace(clean.audit, num_classes=2, steps=30, complete=False, labels="predicted")
    report = Report.of(dataclasses.replace(clean, audit=few), None, samples_per_class=10, seed=7)
    assert report.summary().startswith("Verdict: clean (score 0.70, above 1 is suspicious). No class stands out among")
    for told in ("With no more than 2 classes", "in 30 steps", "Time was over"):
        assert any(caveat.startswith(told) or told in caveat for caveat in report.caveats)
        assert told in report.summary()
    read = report.to_dict()
    assert (read["score"], read["caveats"]) == (0.7, list(report.caveats))
    assert len(report.caveats) == 3  # labels are told apart
    assert Report.of(clean, None, samples_per_class=10, seed=7).caveats == ()


@pytest.mark.parametrize("asr", [0.1, 0.101, 0.95])
def test_a_backdoor_that_is_left_is_told(result, unknown, asr):
    after = dataclasses.replace(AFTER, asr=asr)
    known = Report.of(result, PatchTrigger(target=3), samples_per_class=10, seed=7, test=(BEFORE, after))
    held = (HELD_BEFORE, dataclasses.replace(HELD_AFTER, asr=asr))
    estimated = Report.of(dataclasses.replace(unknown, held=held), None, samples_per_class=10, seed=7)
    assert (f"The trigger still works on {asr:.0%} of the test images" in known.summary()) is (asr > 0.1)
    assert (f"The estimated trigger still works on {asr:.0%} of the clean images" in estimated.summary()) is (asr > 0.1)


def test_a_clean_verdict_that_was_passed_over(clean):
    report = Report.of(dataclasses.replace(clean, status="repaired"), None, samples_per_class=10, seed=7)
    assert report.summary().startswith(
        "Verdict: clean; repaired all the same, as force=True asked for. GradPrune pruned"
    )


def test_unknown_rates_as_markdown(unknown):
    assert str(Report.of(unknown, None, samples_per_class=10, seed=7)).splitlines() == [
        "| validation data | before | after |",
        "| --- | --- | --- |",
        "| ACC ↑ | 0.900 | 0.800 |",
        "| ASR ↓ | unknown | unknown |",
        "| RA ↑ | unknown | unknown |",
        "| ASR of the estimated trigger ↓ | 0.950 | 0.150 |",
        "| DER ↑ | | unknown |",
        "",
        "Verdict: backdoored, target 3. GradPrune pruned 3 of 5 filters and turned 1 down by more than half in 1.3 s. "
        "The estimated trigger still works on 15% of the clean images: more clean images per class may help, or "
        "another method, which `lightning-unlearn compare` finds.",
    ]


def test_unknown_rates_in_one_line(unknown):
    assert Report.of(unknown, None, samples_per_class=10, seed=7).headline() == (
        "ACC ↑ 0.900 → 0.800, ASR ↓ unknown → unknown, RA ↑ unknown → unknown, ASR of the estimated trigger ↓ 0.950 → "
        "0.150 (validation data). Verdict: backdoored, target 3. GradPrune pruned 3 of 5 filters and turned 1 down by "
        "more than half in 1.3 s. The estimated trigger still works on 15% of the clean images: more clean images "
        "per class may help, or another method, which `lightning-unlearn compare` finds."
    )


def test_unknown_rates_as_table(unknown):
    text = shown(Report.of(unknown, None, samples_per_class=10, seed=7))
    lines = [line.replace("┃", "│").strip("│ ").split("│") for line in text.splitlines()]
    cells = {tuple(cell.strip() for cell in line) for line in lines}
    assert {("ASR ↓", "unknown", "unknown"), ("ASR of the estimated trigger ↓", "0.950", "0.150")} <= cells
    assert "GradPrune · unknown trigger · target 3 · 10 clean images per class" in " ".join(text.split())
    assert "nan" not in text


def test_a_clean_model(clean, tmp_path):
    report = Report.of(clean, None, samples_per_class=10, seed=7)
    read = json.loads(report.save(tmp_path / "report.json").read_text())
    assert (read["status"], read["verdict"], read["target"], read["suspected_target"]) == ("clean", "clean", None, None)
    assert (read["rounds"], read["filters"]["pruned"], read["checkpoint"]) == ([], 0, None)
    assert read["estimated_asr"] == {"before": 0.95, "after": 0.95}
    text = shown(report)
    assert "unknown trigger · target ?" in " ".join(text.split())
    assert "Verdict: clean" in " ".join(text.split())
    assert "estimated" not in text  # of a trigger that nobody believes in
    assert "as it was" in report.headline()

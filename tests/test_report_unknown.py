"""Reports of a trigger that nobody knew."""

from __future__ import annotations

import dataclasses
import json

import pytest

from lightning_unlearn.filters import FilterMask
from lightning_unlearn.judgement import ClassAudit
from lightning_unlearn.report import Report
from lightning_unlearn.triggers import PatchTrigger
from lightning_unlearn.triggers.inversion import Estimate
from lightning_unlearn.verdict import Audit
from tests.small_reports import AFTER, BEFORE, HELD_AFTER, HELD_BEFORE, a_result, shown

ESTIMATES = (
    Estimate(PatchTrigger(target=3), "covering", 3, cost=0.02, success=1.0),
    Estimate(PatchTrigger(target=3), "additive", 3, cost=0.1, success=0.75),
)


@pytest.fixture
def result():
    return a_result()


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
    assert ("`lightning-unlearn compare` finds" in known.summary()) is (asr > 0.1)
    assert "compare" not in estimated.summary()  # which needs a trigger


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
        "another method.",
    ]


def test_unknown_rates_in_one_line(unknown):
    assert Report.of(unknown, None, samples_per_class=10, seed=7).headline() == (
        "ACC ↑ 0.900 → 0.800, ASR ↓ unknown → unknown, RA ↑ unknown → unknown, ASR of the estimated trigger ↓ 0.950 → "
        "0.150 (validation data). Verdict: backdoored, target 3. GradPrune pruned 3 of 5 filters and turned 1 down by "
        "more than half in 1.3 s. The estimated trigger still works on 15% of the clean images: more clean images "
        "per class may help, or another method."
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

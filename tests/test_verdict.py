from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from lightning_unlearn.judgement import WIDEST, ClassAudit, Usual
from lightning_unlearn.triggers import PatchTrigger, TriggerPool
from lightning_unlearn.triggers.inversion import Estimate
from lightning_unlearn.verdict import Audit


def estimate(family="additive", target=0, cost=0.1, success=1.0):
    return Estimate(PatchTrigger(size=1, target=target), family, target, cost, success)


def an_audit(**changes):
    entry = ClassAudit(
        target=1,
        trigger_score=1.5,
        cost={"additive": 0.1},
        universality={"additive": 0.69},
        success={"additive": 0.9},
        prominence=1.25,
        margin=31.25,
    )
    other = ClassAudit(
        target=0, trigger_score=0.5, cost={"additive": 0.4}, universality={"additive": 0.23}, success={"additive": 1.0}
    )
    given = {
        "verdict": "backdoored",
        "suspected_target": 1,
        "score": 1.5,
        "classes": (other, entry),
        "estimates": (estimate(target=1, success=0.9), estimate("covering", target=1, cost=0.2)),
        "num_classes": 5,
    }
    return Audit(**given | changes)


CLEAN = {"verdict": "clean", "suspected_target": None, "score": 0.5}


def test_what_is_usual_without_some_classes():
    entries = tuple(
        ClassAudit(c, score, {"additive": math.exp(c)}, {"additive": 0.1}, {"additive": 1.0})
        for c, score in enumerate((3.0, 0.5, 2.0, 0.1))
    )
    found = an_audit(classes=entries)
    assert found.usual == {"additive": Usual.of([math.exp(c) for c in (1, 2, 3)])}
    assert found.usual_without([0, 2]) == {"additive": Usual.of([math.exp(c) for c in (1, 3)])}
    assert found.usual_without([0, 2])["additive"].cost == pytest.approx(2)
    assert an_audit(classes=()).usual_without([0]) == {}


def test_what_was_usual_in_an_audit_leaves_out_its_worst_class():
    assert an_audit().usual == {"additive": Usual(math.log(0.4), 0.0, 1)}


def test_the_trigger_is_all_estimates_as_one():
    trigger = an_audit().trigger
    assert isinstance(trigger, TriggerPool)
    assert trigger.target == 1
    assert len(trigger.triggers) == 2


@pytest.mark.parametrize("changes", [{}, CLEAN, {"unseen": (3, 5), "complete": False, "labels": "predicted"}])
def test_to_dict_is_what_json_can_hold(changes):
    audit = an_audit(**changes)
    plain = audit.to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["verdict"] == audit.verdict
    assert plain["suspected_target"] == audit.suspected_target
    assert [entry["target"] for entry in plain["classes"]] == [0, 1]
    assert plain["estimates"][1] == {"family": "covering", "target": 1, "cost": 0.2, "success": 1.0}
    assert (plain["unseen"], plain["complete"], plain["labels"]) == (list(audit.unseen), audit.complete, audit.labels)


def test_summary():
    assert an_audit().summary() == (
        "Verdict: backdoored (score 1.50, above 1 is suspicious): one covering change sends 100% of other images to "
        "class 1."
    )
    assert an_audit(verdict="suspicious").summary().startswith("Verdict: suspicious (score 1.50, above 1")
    assert an_audit(**CLEAN).summary() == ("Verdict: clean (score 0.50, above 1 is suspicious): no class stands out.")


def test_notes_say_what_must_be_known():
    assert an_audit().notes() == an_audit().summary()
    notes = an_audit(unseen=(3, 5), complete=False, labels="predicted").notes()
    assert notes == (
        f"{an_audit().summary()} The model's own answers stood in for labels. There was no clean image of class 3, 5. "
        "Time was over before all was looked at: these are the best estimates so far."
    )


@pytest.mark.parametrize(("prominence", "tipped"), [(2.0, False), (2.1, True), (9.0, True)])
def test_notes_say_where_the_last_layer_tips_the_scales(prominence, tipped):
    other, entry = an_audit().classes
    found = an_audit(classes=(other, replace(entry, prominence=prominence)))
    unaided = 1.5 * math.exp(-min(4, prominence) / 5)
    assert found.classes[1].unaided == pytest.approx(unaided)
    assert (f"last layer lift it above the limit (the score without them: {unaided:.2f})" in found.notes()) is tipped
    assert other.unaided == other.score


@pytest.mark.parametrize(("gap", "told"), [(math.log(4), True), (WIDEST, False), (0.0, False)])
def test_the_notes_tell_of_a_class_that_a_model_can_be_made_far_surer_of(gap, told):
    clean, suspected = an_audit().classes
    found = an_audit(classes=(clean, replace(suspected, gap=gap)))
    assert ("can make the model 4.0 times as sure of class 1 as of any other." in found.notes()) is told


@pytest.mark.parametrize("classes", [2, 4, 5])
def test_the_notes_tell_where_there_is_little_to_compare_with(classes):
    assert ("there is little to compare one with" in an_audit(num_classes=classes).notes()) == (classes < 5)


@pytest.mark.parametrize("factor", [1.9, 2.0, 3.6])
def test_the_notes_tell_of_a_class_far_ahead_in_a_clean_model(factor):
    scores = (0.1, 0.2, 0.2 * factor)
    classes = tuple(replace(an_audit().classes[0], target=c, trigger_score=score) for c, score in enumerate(scores))
    told = f"Class 2 is {factor:.1f} times ahead of the next one all the same"
    assert (told in an_audit(**CLEAN, classes=classes).notes()) is (factor >= 2)
    assert told not in an_audit(classes=classes).notes()  # where the verdict says so anyway
    assert "ahead" not in an_audit(**CLEAN, classes=classes[:1]).notes()
    assert "ahead" not in an_audit(**CLEAN, classes=()).notes()


@pytest.mark.parametrize("steps", [30, 99, 100, 300])
def test_the_notes_tell_of_fewer_steps_than_limits_were_chosen_with(steps):
    assert (f"estimated in {steps} steps" in an_audit(steps=steps).notes()) == (steps < 100)


def test_as_markdown():
    assert str(an_audit()).splitlines() == [
        "| class | score ↓ | additive | covering | displacing | margin | last layer |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| 0 | 0.50 | 0.23 |  |  |  | +0.0 |",
        "| 1 | 1.50 | 0.69 |  |  | 31.2 | +1.2 |",
        "",
        an_audit().notes(),
    ]


def test_in_the_terminal_the_most_suspicious_come_first():
    console = Console(width=100)
    with console.capture() as capture:
        console.print(an_audit())
    lines = [line.split() for line in capture.get().splitlines()]
    rows = [line[1] for line in lines if len(line) > 3 and line[1] in ("0", "1")]
    assert rows == ["1", "0"]
    assert "backdoored" in capture.get()


def test_the_terminal_shows_twenty_classes_at_most():
    entry = an_audit().classes[0]
    many = an_audit(classes=tuple(ClassAudit(c, c / 100, *list(vars(entry).values())[2:]) for c in range(60)))
    assert many.__rich__().row_count == 20
    assert len(str(many).splitlines()) == 64


def test_estimates_hold_tensors_and_are_not_compared_by_them():
    assert an_audit() != an_audit()
    assert torch.is_tensor(an_audit().trigger(torch.zeros(1, 1, 2, 2)))

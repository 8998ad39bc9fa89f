from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_unlearn import auditor, estimation
from lightning_unlearn.auditor import Auditor
from lightning_unlearn.head import prominence
from lightning_unlearn.judgement import WIDEST
from lightning_unlearn.margins import Margins, gaps
from lightning_unlearn.triggers import AdditiveTrigger
from lightning_unlearn.triggers.inversion import Estimate
from tests.small_audits import FAST, backdoored, examined, honest, numbers, rows

# What it finds


def test_all_classes_are_looked_at_by_all_families():
    found = examined()
    assert [entry.target for entry in found.classes] == [0, 1, 2, 3]
    for entry in found.classes:
        assert (
            set(entry.cost)
            == set(entry.universality)
            == set(entry.success)
            == {
                "additive",
                "covering",
                "displacing",
            }
        )
        assert all(math.isfinite(value) for value in (entry.score, *entry.cost.values(), *entry.universality.values()))
    assert found.num_classes == 4
    assert found.score == max(entry.score for entry in found.classes)
    assert (found.labels, found.unseen, found.complete) == ("given", (), True)
    assert found.seconds > 0


@pytest.mark.parametrize(
    ("score", "verdict"), [(0.5, "clean"), (1.0, "clean"), (1.05, "suspicious"), (1.1, "backdoored")]
)
def test_the_verdict_goes_by_the_highest_score(monkeypatch, score, verdict):
    judged = auditor.judged

    def scored(*given):
        entries = judged(*given)
        return tuple(
            auditor.replace(entry, trigger_score=score if entry.target == 2 else 0.1 * score) for entry in entries
        )

    monkeypatch.setattr(auditor, "judged", scored)
    found = examined()
    assert (found.verdict, found.score) == (verdict, score)
    assert found.suspected_target == (None if verdict == "clean" else 2)
    assert {estimate.target for estimate in found.estimates} == {2}
    families = {estimate.family for estimate in found.estimates}
    assert families <= {"additive", "covering", "displacing"} | ({"residual"} if verdict != "clean" else set())


@pytest.mark.parametrize(("highest", "first", "verdict"), [(0.5, 1, "clean"), (1.05, 2, "suspicious")])
def test_where_nothing_stands_out_estimates_are_of_the_class_for_which_most_speaks(
    monkeypatch, highest, first, verdict
):
    judged = auditor.judged
    scores, widths = {1: 0.4, 2: highest}, {1: 0.3 * WIDEST}

    def scored(*given):
        return tuple(
            auditor.replace(e, trigger_score=scores.get(e.target, 0.1), gap=widths.get(e.target, 0.0))
            for e in judged(*given)
        )

    monkeypatch.setattr(auditor, "judged", scored)
    found = examined()
    assert (found.verdict, found.score) == (verdict, highest)
    assert {estimate.target for estimate in found.estimates} == {first}


def test_a_model_tells_which_classes_its_last_layer_favours(monkeypatch):
    monkeypatch.setattr(auditor, "largest_margins", lambda *given, **options: Margins([0.0] * 6, torch.empty(0)))
    net = nn.Sequential(nn.Flatten(), nn.Linear(6 * 6, 6))
    images, labels = rows(classes=6)
    with torch.no_grad():
        net[1].weight[4] += 0.3
        net[1].bias[4] -= 0.3 * images.sum((1, 2, 3)).mean()
    plain, told = (FAST.audit(net, images, labels, held_out=images[:6], model=model) for model in (None, net))
    assert [entry.prominence for entry in plain.classes] == [0.0] * 6
    assert [entry.prominence for entry in told.classes] == prominence(net[1].weight, 6)
    assert told.classes[4].prominence > 4
    assert told.classes[4].score == pytest.approx(plain.classes[4].score * math.exp(4 / 5))
    (alone,) = FAST.audit(net, images, labels, held_out=images[:6], model=net, classes=[4]).classes
    assert alone.prominence == told.classes[4].prominence


def test_a_model_that_bright_images_make_far_too_sure_is_found_by_that():
    images, labels = rows(classes=6)

    def model(x):
        return honest(x) + 40 * x[:, 0].mean((1, 2))[:, None] ** 2 * nn.functional.one_hot(torch.tensor(3), 6)

    margins = auditor.largest_margins(model, images, num_classes=6, seed=0)
    found = examined(model, (images, labels))
    assert [entry.gap for entry in found.classes] == gaps(margins.values)
    assert found.classes[3].gap > WIDEST
    assert (found.verdict, found.suspected_target) == ("backdoored", 3)
    (alone,) = examined(model, (images, labels), classes=[3]).classes
    assert alone.gap == found.classes[3].gap


@pytest.mark.parametrize("model", [honest, backdoored(2)])
def test_margins_may_be_left_out(monkeypatch, model):
    usual = examined(model)
    monkeypatch.setattr(auditor, "largest_margins", None)
    found = examined(model, margins=False)
    assert {(entry.margin, entry.gap) for entry in found.classes} == {(None, 0.0)}
    assert [entry.score for entry in found.classes] == [entry.trigger_score for entry in usual.classes]
    assert found.complete


def test_the_change_that_made_the_model_far_too_sure_is_an_estimate(monkeypatch):
    images, labels = rows()
    bright = torch.full((4, 1, *images.shape[2:]), 0.75)
    monkeypatch.setattr(auditor, "largest_margins", lambda *given, **options: Margins([1.0] * 4, bright))
    judged = auditor.judged

    def wide(gap, trigger_score):
        of = {2: {"trigger_score": trigger_score, "gap": gap}}
        others = {"trigger_score": 0.1, "gap": 0.0}
        monkeypatch.setattr(
            auditor,
            "judged",
            lambda *given: tuple(auditor.replace(e, **of.get(e.target, others)) for e in judged(*given)),
        )
        return [e for e in examined(backdoored(2), (images, labels)).estimates if e.family == "additive"]

    surest, cheapest = wide(1.01 * WIDEST, 1.0)
    assert torch.equal(surest.trigger.pattern, bright[2])
    assert (surest.target, surest.success) == (2, 1.0)
    assert surest.cost == pytest.approx(0.75)
    assert cheapest.cost < surest.cost
    for gap, trigger_score in ((WIDEST, 1.0), (1.01 * WIDEST, 1.01)):  # nothing told, and the costs told, too
        (alone,) = wide(gap, trigger_score)
        assert torch.equal(alone.trigger.pattern, cheapest.trigger.pattern)


@pytest.mark.parametrize("target", [0, 3])
def test_a_backdoor_is_found(target):
    found = examined(backdoored(target, strength=300), by=Auditor(steps=60))
    assert found.suspected_target == target
    assert found.verdict != "clean"
    images, _ = rows()
    assert (backdoored(target)(found.trigger(images)).argmax(1) == target).float().mean() >= 0.5


def test_the_same_seed_gives_the_same_audit():
    first, second, other = (examined(by=Auditor(steps=5, seed=seed)) for seed in (1, 1, 2))
    assert numbers(first) == numbers(second) != numbers(other)


def test_groups_of_classes_find_all():
    found = examined(by=Auditor(steps=15, batch_size=4, at_once=8))
    assert [entry.target for entry in found.classes] == [0, 1, 2, 3]


def test_two_classes():
    found = examined(honest, rows(classes=2))
    assert [entry.target for entry in found.classes] == [0, 1]


def test_without_labels_the_answers_stand_in():
    images, labels = rows()
    assert torch.equal(honest(images).argmax(1), labels)
    found = examined(data=(images, None))
    assert found.labels == "predicted"
    assert numbers(found) == numbers(examined())


def test_a_class_without_images_is_looked_at_with_the_others():
    images, labels = rows()
    found = examined(data=(images[labels != 2], labels[labels != 2]))
    assert found.unseen == (2,)
    assert [entry.target for entry in found.classes] == [0, 1, 2, 3]
    assert "no clean image of class 2" in found.notes()


@pytest.mark.parametrize("target", [0, 14])
def test_of_many_classes_the_hopeless_are_dropped_and_the_target_survives(target):
    found = examined(backdoored(target), rows(per_class=2, classes=15), by=Auditor(steps=60, screen_steps=25))
    assert len(found.classes) == 12
    assert [entry.target for entry in found.classes] == sorted(entry.target for entry in found.classes)
    assert max(found.classes, key=lambda entry: entry.score).target == target
    assert {estimate.target for estimate in found.estimates} == {target}
    assert found.num_classes == 15


def test_the_screen_keeps_a_class_that_costs_far_less_than_the_others(monkeypatch):
    """Even if it is, so early, the least universal of all."""
    looked_at = []

    def individual_costs(forward, pixels, labels, *, classes, batch_size):
        return {family: [0.02 if c == 4 else 0.1 for c in classes] for family in auditor.COMPARED}

    def invert(forward, pixels, labels, *, family, classes, **options):
        looked_at.append((family, list(classes), options["steps"]))
        pattern = torch.zeros(1, 15, 6)
        return [
            Estimate(AdditiveTrigger(pattern, target=c), family, c, 0.05 if c == 4 else 0.2 + 0.001 * c, 1.0)
            for c in classes
        ]

    monkeypatch.setattr(estimation, "individual_costs", individual_costs)
    monkeypatch.setattr(estimation, "invert", invert)
    found = examined(honest, rows(classes=15), by=Auditor(screen_steps=7, steps=9, batch_size=1))
    assert looked_at[0] == ("additive", list(range(15)), 7)
    assert all((len(classes), steps) == (12, 9) for family, classes, steps in looked_at[1:] if family != "residual")
    assert 4 in [entry.target for entry in found.classes]


def test_progress_is_told_to_the_end():
    told = []
    examined(on_progress=lambda *step: told.append(step))
    assert {family for family, _, _ in told} >= {"additive", "covering", "displacing"}
    for family in ("additive", "covering", "displacing"):
        assert [step[1:] for step in told if step[0] == family] == [(n + 1, 15) for n in range(15)]


def test_an_audit_may_start_from_earlier_estimates():
    model = backdoored(0, strength=300)
    first = examined(model, by=Auditor(steps=60))
    hasty = Auditor(steps=2)
    cold, warm = (examined(model, by=hasty, start=start) for start in ((), first.estimates))
    assert numbers(cold) == numbers(examined(model, by=hasty))
    assert first.suspected_target == 0
    assert warm.classes[0].success["additive"] > cold.classes[0].success["additive"]
    assert [(entry.cost, entry.success) for entry in warm.classes[1:]] == [
        (entry.cost, entry.success) for entry in cold.classes[1:]
    ]


# Several backdoors


@pytest.fixture
def scores(monkeypatch):
    """``scores(0.1, 2.0, ...)``: what the classes get, whatever their estimates."""

    def set_to(*values):
        judged = auditor.judged

        def scored(*given):
            entries = judged(*given)
            return tuple(auditor.replace(entry, trigger_score=values[entry.target]) for entry in entries)

        monkeypatch.setattr(auditor, "judged", scored)

    return set_to


def test_every_class_above_the_limit_is_named_with_its_estimates(scores):
    scores(1.05, 0.9, 3.0, 1.0)
    found = examined(by=Auditor(steps=40))
    assert (found.suspected_target, found.suspected_targets) == (2, (2, 0))
    assert [estimate.target for estimate in found.estimates] == sorted(
        (estimate.target for estimate in found.estimates), reverse=True
    )
    assert {estimate.target for estimate in found.estimates} == {2, 0}
    assert found.trigger.target == 2
    assert len(found.trigger.triggers) == sum(estimate.target == 2 for estimate in found.estimates)
    assert {estimate.target for estimate in found.estimates if estimate.family == "residual"} <= {2}
    assert found.to_dict()["suspected_targets"] == [2, 0]
    assert "sends" in found.summary()
    assert "to class 2." in found.summary()
    assert "Above the limit, too: class 0." in found.notes()


@pytest.mark.parametrize(("values", "suspects"), [((0.9, 0.9, 3.0, 1.0), (2,)), ((0.9, 0.9, 1.0, 0.1), ())])
def test_one_class_above_the_limit_or_none(scores, values, suspects):
    scores(*values)
    found = examined(by=Auditor(steps=40))
    assert found.suspected_targets == suspects
    assert len({estimate.target for estimate in found.estimates}) == 1
    assert "Above the limit, too" not in found.notes()

"""How far a class stands out, by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from lightning_unlearn.judgement import LIMITS, WIDEST, Usual, judged, universality
from lightning_unlearn.triggers import PatchTrigger
from lightning_unlearn.triggers.inversion import Estimate


def estimate(family="additive", target=0, cost=0.1, success=1.0):
    return Estimate(PatchTrigger(size=1, target=target), family, target, cost, success)


def estimates(family, *costs, success=1.0):
    return [estimate(family, target, cost, success) for target, cost in enumerate(costs)]


def test_universality_is_the_share_that_changes_for_each_cost_of_one_for_all():
    assert universality(estimate(cost=0.5), 0.125) == 0.25
    assert universality(estimate(cost=0.5), 0) == 0
    assert universality(estimate(cost=0.5, success=0.5), 0.125) == 0.25
    assert universality(estimate(cost=0.5, success=0.49), 0.125) == 0  # what does not work is no trigger
    assert universality(estimate(cost=0.0), 0.0) == 0  # no division by zero


def test_scores_by_hand():
    e = math.e
    found = {"additive": estimates("additive", 0.1 * e, 0.1, 0.1 * e), "covering": estimates("covering", 0.4, 0.4, 0.4)}
    alone = {"additive": [0.05, 0.05, 0.05], "covering": [0.2, 0.2, 0.32]}
    first, second, third = judged(found, alone)
    assert [entry.target for entry in (first, second, third)] == [0, 1, 2]
    assert second.universality == pytest.approx({"additive": 0.5, "covering": 0.5})
    assert second.cost == {"additive": 0.1, "covering": 0.4}
    assert second.success == {"additive": 1, "covering": 1}
    # The others' usual cost is e times as much, without spread: five fifths, since they are two, weighed by a fifth.
    assert second.score == pytest.approx(0.5 * math.exp(5 / 5) / LIMITS["additive"])
    # What lies above the usual cost counts less; the covering trigger is at it.
    assert first.score == pytest.approx(0.5 / LIMITS["covering"])
    assert third.score == pytest.approx(0.8 / LIMITS["covering"])


def test_a_class_of_which_a_model_can_be_made_far_surer_than_of_others():
    found = {"additive": estimates("additive", *[0.1] * 6)}
    alone = {"additive": [0.01] * 6}
    plain = judged(found, alone)
    entries = judged(found, alone, margins=[5.0, 6.0, 60.0, 4.0, 5.0, -1.0])
    assert [entry.gap for entry in entries] == pytest.approx([0, 0, math.log(10), 0, 0, 0])
    assert entries[2].score == pytest.approx(math.log(10) / WIDEST)
    assert [entry.score for k, entry in enumerate(entries) if k != 2] == [plain[0].score] * 5
    # What the last layer adds is told apart; this class needs none of it.
    assert entries[2].unaided == entries[2].score
    raised = replace(entries[2], prominence=4.0)
    assert raised.unaided == raised.score


@pytest.mark.parametrize("margin", [math.nan, math.inf])
def test_margins_that_overflowed_are_none(margin):
    found = {"additive": estimates("additive", *[0.1] * 5)}
    entries = judged(found, {"additive": [0.01] * 5}, margins=[5.0, margin, 4.0, 3.0, 2.0])
    assert [entry.margin for entry in entries] == [5.0, None, 4.0, 3.0, 2.0]
    assert [entry.gap for entry in entries] == [0.0] * 5
    assert json.loads(json.dumps(entries[1].to_dict(), allow_nan=False))["margin"] is None


def test_margins_are_those_of_all_classes_where_a_few_are_judged():
    found = {"additive": [estimate(target=4), estimate(target=2)]}
    entries = judged(found, {"additive": [0.01, 0.01]}, margins=[5.0, 6.0, 60.0, 4.0, 5.0, -1.0])
    assert [entry.gap for entry in entries] == pytest.approx([0, math.log(10)])
    assert [entry.margin for entry in entries] == [5.0, 60.0]


def test_spreads_below_what_is_usual():
    usual = Usual.of([1.0, math.e, math.e**2])
    assert usual.cost == pytest.approx(1)
    assert usual.spread == pytest.approx((2 / 3) ** 0.5)
    assert usual.below(1.0) == pytest.approx(1 / (0.4 / 3 + (2 / 3) ** 0.5))
    assert usual.below(math.e) == pytest.approx(0)
    assert usual.below(0.0) == 10  # no trigger is infinitely far off
    assert Usual.of([]).below(0.1) == 0


@pytest.mark.parametrize(("others", "narrow"), [(1, 0.4), (2, 0.2), (3, 0.4 / 3), (4, 0.1), (9, 0.1)])
def test_a_few_classes_are_little_to_compare_with(others, narrow):
    # Of one class alone the spread is 0, so that half its cost would be seven spreads below.
    assert Usual.of([1.0] * others).below(math.exp(-0.1)) == pytest.approx(0.1 / narrow)


def test_a_class_among_those_of_an_earlier_audit():
    usual = {"additive": Usual.of([1.0, 1.0])}
    (only,) = judged({"additive": estimates("additive", math.exp(-0.5))}, {"additive": [0.3 * math.exp(-0.5)]}, usual)
    assert only.score == pytest.approx(0.3 * math.exp(2.5 / 5) / LIMITS["additive"])


@pytest.mark.parametrize(("prominence", "counted"), [(2.5, 2.5), (9.0, 4.0), (-3.0, 0.0)])
def test_a_prominent_class_counts_for_more_but_not_for_any_amount(prominence, counted):
    found, alone = {"additive": estimates("additive", 0.1, 0.1)}, {"additive": [0.05, 0.05]}
    plain, _ = judged(found, alone)
    entry, other = judged(found, alone, prominences=[prominence, 0.0])
    assert entry.score == pytest.approx(plain.score * math.exp(counted / 5))
    assert other.score == plain.score
    assert (entry.prominence, other.prominence, plain.prominence) == (prominence, 0, 0)


def test_one_class_alone():
    (only,) = judged({"displacing": estimates("displacing", 0.1)}, {"displacing": [0.03]})
    assert only.score == pytest.approx(0.3 / LIMITS["displacing"])


def test_a_trigger_that_does_not_work_scores_nothing():
    entries = judged({"additive": estimates("additive", 0.1, 0.1, success=0.3)}, {"additive": [0.09, 0.09]})
    assert [entry.score for entry in entries] == [0, 0]


def test_a_family_that_an_earlier_audit_had_no_time_for_is_judged_by_its_own_classes():
    found = {"additive": estimates("additive", 0.1, 0.4), "covering": estimates("covering", 0.1, 0.4, 0.5)[:2]}
    individual = {"additive": [0.05, 0.05], "covering": [0.05, 0.05]}
    earlier = judged(found, individual, {"additive": Usual.of([0.4, 0.5])})
    alone = judged({"covering": found["covering"]}, {"covering": individual["covering"]})
    assert earlier[0].trigger_score >= alone[0].trigger_score
    assert earlier[0].universality == {"additive": 0.5, "covering": 0.5}

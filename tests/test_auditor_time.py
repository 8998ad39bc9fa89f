from __future__ import annotations

import math
import time

import pytest

from lightning_unlearn import auditor
from lightning_unlearn.auditor import Auditor, TimeOverError
from lightning_unlearn.judgement import COMPARED
from tests.small_audits import examined


@pytest.mark.parametrize("name", ["steps", "batch_size", "at_once", "screen_steps"])
@pytest.mark.parametrize("value", [0, -1])
def test_numbers_below_one(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected at least 1, but got {value}"):
        Auditor(**{name: value})


@pytest.mark.parametrize("value", [0, -1.0, math.nan])
def test_no_time(value):
    with pytest.raises(ValueError, match=r"^max_time: expected a number of seconds above 0, or None, but got"):
        Auditor(max_time=value)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"max_time": "60"}, r"^max_time: expected a number of seconds, or None, but got '60'"),
        ({"steps": 2.5}, r"^steps: expected a whole number, but got 2.5"),
        ({"at_once": "64"}, r"^at_once: expected a whole number, but got '64'"),
    ],
)
def test_arguments_of_another_type(given, match):
    with pytest.raises(TypeError, match=match):
        Auditor(**given)


class Clock:
    """A clock that goes on by one with every look at it."""

    def __init__(self, monkeypatch):
        self.now = 0
        monkeypatch.setattr(time, "monotonic", self.tick)

    def tick(self):
        self.now += 1
        return self.now


def test_time_for_nothing(monkeypatch):
    Clock(monkeypatch)
    with pytest.raises(ValueError, match=r"^max_time: 0.5 s were over after 0 of 4 classes; allow more"):
        examined(by=Auditor(max_time=0.5))


def test_time_for_some_classes_only(monkeypatch):
    Clock(monkeypatch)
    with pytest.raises(TimeOverError, match=r"^max_time: 3 s were over after 2 of 4 classes; allow more"):
        examined(by=Auditor(steps=1, max_time=3, at_once=8, batch_size=4))


@pytest.fixture
def suspected(monkeypatch):
    """Class 2 stands out, whatever its estimates."""
    judged = auditor.judged

    def scored(*given):
        return tuple(auditor.replace(e, trigger_score=2.0 if e.target == 2 else 0.1) for e in judged(*given))

    monkeypatch.setattr(auditor, "judged", scored)


def test_margins_take_half_of_the_time_at_most(monkeypatch, suspected):
    deadlines = []
    largest_margins = auditor.largest_margins

    def timed(*given, deadline, **options):
        deadlines.append(deadline)
        return largest_margins(*given, deadline=deadline, **options)

    monkeypatch.setattr(auditor, "largest_margins", timed)
    Clock(monkeypatch)
    found = examined(by=Auditor(steps=15, max_time=70))
    assert deadlines == [36]  # the clock showed 1 at the start
    assert [entry.margin for entry in found.classes] == [None] * 4
    assert (found.complete, found.suspected_target) == (False, 2)
    found = examined(by=Auditor(steps=15, max_time=900))
    assert all(entry.margin is not None for entry in found.classes)
    assert found.complete


@pytest.mark.parametrize("limit", [40, 60, 80])
def test_what_was_not_looked_at_is_no_reason_for_a_clean_verdict(monkeypatch, limit):
    # Margins take half of the time, and 15 steps of each of three families the rest.
    Clock(monkeypatch)
    with pytest.raises(TimeOverError, match=rf"^max_time: {limit} s were over before all was looked at.* no verdict"):
        examined(by=Auditor(steps=15, max_time=limit))
    assert examined(by=Auditor(steps=15, max_time=900)).verdict == "clean"


def test_a_first_family_that_time_cuts_short_is_nothing(monkeypatch, suspected):
    Clock(monkeypatch)
    with pytest.raises(TimeOverError, match=r"^max_time: 20 s were over after 0 of 4 classes; allow more"):
        examined(by=Auditor(steps=15, max_time=20))


def test_later_families_that_time_cuts_short_are_left_out(monkeypatch, suspected):
    whole, seen = examined(by=Auditor(steps=15)), set()
    for limit in range(30, 100, 5):
        Clock(monkeypatch)
        found = examined(by=Auditor(steps=15, max_time=limit))
        families = tuple(found.classes[0].universality)
        assert "Time was over" in found.notes()
        assert [tuple(entry.universality) for entry in found.classes] == [families] * 4
        assert all(  # none is half estimated
            entry.cost[family] == other.cost[family]
            for entry, other in zip(found.classes, whole.classes, strict=True)
            for family in families
        )
        assert {estimate.family for estimate in found.estimates} <= set(families)
        seen.add(families)
    assert seen == {COMPARED[:1], COMPARED[:2], COMPARED}


def test_no_more_images_than_one_forward_pass_may_have():
    auditor = Auditor(at_once=64, batch_size=16, seed=3)
    assert auditor.within(256) == auditor
    assert auditor.within(32) == Auditor(at_once=32, batch_size=16, seed=3)
    assert auditor.within(4) == Auditor(at_once=4, batch_size=4, seed=3)

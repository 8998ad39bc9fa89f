from __future__ import annotations

import math
import time

import pytest

from lightning_unlearn import auditor
from lightning_unlearn.auditor import Auditor
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
    with pytest.raises(ValueError, match=r"^max_time: 7 s were over after 2 of 4 classes; allow more"):
        examined(by=Auditor(max_time=7, at_once=8, batch_size=4))


def test_margins_take_half_of_the_time_at_most(monkeypatch):
    deadlines = []
    largest_margins = auditor.largest_margins

    def timed(*given, deadline, **options):
        deadlines.append(deadline)
        return largest_margins(*given, deadline=deadline, **options)

    monkeypatch.setattr(auditor, "largest_margins", timed)
    Clock(monkeypatch)
    found = examined(by=Auditor(max_time=30))
    assert deadlines == [16]  # the clock showed 1 at the start
    assert [entry.margin for entry in found.classes] == [None] * 4
    assert not found.complete
    assert all(entry.margin is not None for entry in examined(by=Auditor(max_time=900)).classes)


@pytest.mark.parametrize("limit", [3, 8])
def test_time_for_one_family_only(monkeypatch, limit):
    Clock(monkeypatch)
    found = examined(by=Auditor(max_time=limit))
    assert not found.complete
    assert "Time was over" in found.notes()
    assert [set(entry.universality) for entry in found.classes] == [{"additive"}] * 4


def test_a_later_family_that_time_cuts_short_is_left_out(monkeypatch):
    Clock(monkeypatch)
    found = examined(by=Auditor(max_time=7, steps=1, at_once=8, batch_size=4))
    assert not found.complete
    assert [set(entry.universality) for entry in found.classes] == [{"additive"}] * 4

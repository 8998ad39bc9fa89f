"""Estimating class by class."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_unlearn import estimation
from lightning_unlearn.estimation import Estimation, TimeOverError
from lightning_unlearn.triggers import AdditiveTrigger
from lightning_unlearn.triggers.inversion import Estimate

PIXELS = torch.rand(6, 1, 2, 2, generator=torch.Generator().manual_seed(0))


def on(model=None, pixels=PIXELS, **settings):
    def sums(x):
        return torch.stack([x.flatten(1).sum(1), 2 - x.flatten(1).sum(1), x[:, 0, 0, 0]], 1)

    return Estimation(
        **{
            "forward": model or sums,
            "pixels": pixels,
            "labels": torch.arange(len(pixels)) % 3,
            "batch_size": 2,
            "at_once": 4,
            "seed": 5,
            **settings,
        }
    )


@pytest.fixture
def inverted(monkeypatch):
    """Inversions that only tell what they were asked for, and take ``steps`` of the steps that they may."""
    asked = []

    def invert(forward, pixels, labels, *, classes, steps, on_step, **options):
        asked.append((list(classes), steps, options))
        for _ in range(min(steps, asked_steps[0])):
            on_step()
        pattern = torch.zeros(1, 2, 2)
        return [Estimate(AdditiveTrigger(pattern, target=c), options["family"], c, 0.1, 1.0) for c in classes]

    asked_steps = [99]
    monkeypatch.setattr(estimation, "invert", invert)
    return asked, asked_steps


def test_as_many_classes_at_once_as_fit(inverted):
    asked, _ = inverted
    told = []
    start = [Estimate(AdditiveTrigger(torch.ones(1, 2, 2), target=1), "additive", 1, 0.1, 1.0)]
    settings = {"start": start, "deadline": math.inf, "on_progress": lambda *step: told.append(step)}
    found = on(**settings).estimate("covering", [4, 1, 0, 3, 7], 2)
    assert [one.target for one in found] == [4, 1, 0, 3, 7]
    assert [(classes, steps) for classes, steps, _ in asked] == [([4, 1], 2), ([0, 3], 2), ([7], 2)]  # 4 images at once
    assert all(
        options == {"family": "covering", "batch_size": 2, "seed": 5, "start": start, "deadline": math.inf}
        for *_, options in asked
    )
    assert told == [("covering", done, 6) for done in range(1, 7)]


def test_one_class_at_least_at_once(inverted):
    on(batch_size=8, at_once=4).estimate("additive", [0, 1], 3)
    assert [classes for classes, *_ in inverted[0]] == [[0], [1]]


def test_half_an_inversion_is_none(inverted):
    inverted[1][0] = 2  # of 3 steps
    with pytest.raises(TimeOverError, match=r"^max_time: 7 s were over after 0 of 3 classes; allow more"):
        on(max_time=7).estimate("additive", [0, 1, 2], 3)


def test_no_group_begins_when_time_is_over(inverted):
    with pytest.raises(TimeOverError, match=r"^max_time: 7 s were over after 2 of 3 classes; allow more"):
        on(max_time=7, deadline=0).estimate("additive", [0, 1, 2], 3)
    assert len(on(max_time=7, deadline=0).estimate("additive", [0, 1], 3)) == 2  # none was left to begin


def test_all_images_tell_a_mean_cost_unless_there_are_hundreds(monkeypatch):
    given = []
    monkeypatch.setattr(estimation, "individual_costs", lambda *parts, **options: given.append((parts, options)))
    on().individual([1, 2])
    (_, pixels, labels), options = given[0]
    assert torch.equal(pixels, PIXELS)
    assert labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert options == {"classes": [1, 2], "batch_size": 4}
    on(pixels=torch.rand(600, 1, 2, 2)).individual([0])
    assert len(given[1][0][1]) == len(given[1][0][2]) == 200  # every third


@pytest.mark.parametrize("model", [lambda x: x.flatten(1).round(), lambda x: x.flatten(1).detach()])
def test_a_model_without_gradient_in_the_images_is_refused(model):
    with pytest.raises(ValueError, match=r"^model: its logits have no gradient in the images.*rounds or detaches"):
        on(model).refuse_no_gradient()
    on().refuse_no_gradient()


def test_estimates_are_used_that_work_on_images_of_other_classes():
    def estimate(brightness, target=1):
        return Estimate(AdditiveTrigger(torch.full((1, 1, 1), brightness), target=target), "additive", target, 0.1, 1.0)

    def model(x):  # dark, or bright
        level = x.mean((1, 2, 3))
        return torch.stack([torch.full_like(level, 0.5), level], 1)

    held = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.9, 0.9, 0.9, 0.9]).view(-1, 1, 1, 1)
    useless, half, good = (estimate(brightness) for brightness in (0.05, 0.25, 0.45))
    # Half of the images are bright in any case.
    assert on(model).usable([useless, half, good], held) == (half, good)
    assert on(model).usable([useless], held) == (useless,)  # the best there is
    assert on(model).usable([estimate(0.05), half], held[4:]) != ()

from __future__ import annotations

import math
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_unlearn.evaluation import logits_of
from lightning_unlearn.margins import gaps, largest_margins

PIXELS = torch.rand(12, 1, 2, 2, generator=torch.Generator().manual_seed(0))


def linear(rows):
    weights = torch.tensor(rows)
    return lambda x: x.flatten(1) @ weights.T


def test_largest_margins_by_hand():
    # The third pixel holds the fourth class down, so that one of the first two alone gives its class 1 - 0; where
    # nothing is lit the third class has 0 - 0, and the first two pixels together give the fourth 6 - 1.
    model = linear([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [-1.0, -1.0, 0.0, 0.0], [3.0, 3.0, -5.0, 0.0]])
    assert largest_margins(model, PIXELS, num_classes=4).values == pytest.approx([1, 1, 0, 5], abs=0.1)
    assert largest_margins(linear([[1.0] * 4, [-1.0] * 4]), PIXELS, num_classes=2).values == pytest.approx(
        [8, 0], abs=0.1
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_has_the_margins_that_it_would_have(dtype):
    net = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 5)
    ).requires_grad_(False)
    wanted = largest_margins(net, PIXELS, num_classes=5).values
    net.to(dtype)
    found = largest_margins(lambda x: logits_of(net, x.to(dtype)), PIXELS, num_classes=5).values
    assert found == pytest.approx(wanted, rel=0.05, abs=0.02)


def test_what_images_show_cannot_help_a_class_that_answers_to_everything():
    """One pattern must do for all images, even where each image alone could be sent to the class by its own."""

    def model(x):
        first, second = x[:, 0, 0, 0], x[:, 0, 0, 1]
        return torch.stack([torch.zeros_like(first), 9 * (first - second).abs()], 1)

    halves = torch.zeros(12, 1, 2, 2)
    halves[::2, 0, 0, 0] = halves[1::2, 0, 0, 1] = 1
    assert largest_margins(model, halves, num_classes=2).values[1] == pytest.approx(9, abs=1)


def test_groups_of_classes_have_their_own_patterns():
    model = linear([[1.0] * 4, [-1.0] * 4, [2.0, -2.0, 2.0, -2.0]])
    steps = []
    alone = largest_margins(
        model, PIXELS, num_classes=3, batch_size=4, at_once=4, steps=12, on_step=lambda *done: steps.append(done)
    )
    together = largest_margins(model, PIXELS, num_classes=3, batch_size=4, steps=12)
    assert alone.values == pytest.approx(together.values, abs=0.5)
    assert alone.patterns.shape == (3, 1, 2, 2)
    assert torch.equal(alone.patterns.sign(), together.patterns.sign())
    assert steps == [(n, 36) for n in range(1, 37)]


def test_the_same_seed_gives_the_same_margins_and_nothing_else_changes():
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 5))
    state, before = torch.get_rng_state(), PIXELS.clone()
    first, second, other = (largest_margins(net, PIXELS, num_classes=5, steps=3, seed=seed) for seed in (1, 1, 2))
    assert first.values == second.values != other.values
    assert torch.equal(first.patterns, second.patterns)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(PIXELS, before)
    assert all(parameter.grad is None for parameter in net.parameters())


def test_no_margins_when_time_is_over():
    assert largest_margins(linear([[1.0] * 4] * 2), PIXELS, num_classes=2, deadline=time.monotonic() - 1).values == []


def test_no_margins_when_time_is_over_before_the_last_step(monkeypatch):
    now = iter(range(99))
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    model = linear([[1.0] * 4] * 2)
    assert largest_margins(model, PIXELS, num_classes=2, steps=5, batch_size=4, at_once=4, deadline=8).values == []
    now = iter(range(99))
    assert len(largest_margins(model, PIXELS, num_classes=2, steps=5, batch_size=4, at_once=4, deadline=9).values) == 2


def test_the_gap_below_the_largest():
    assert gaps([4.0, 2.0, 40.0, 5.0, 1.0]) == pytest.approx([0, 0, math.log(8), 0, 0])


def test_what_is_negative_counts_as_a_twentieth_of_the_largest():
    assert gaps([-3.0, 0.0, 10.0, -1.0, -2.0]) == pytest.approx([0, 0, math.log(20), 0, 0])


@pytest.mark.parametrize("margins", [[], [9.0, 1.0, 1.0, 1.0], [-1.0] * 6, [math.nan] * 6, [math.inf] + [1.0] * 5])
def test_nothing_to_compare(margins):
    assert gaps(margins) == [0.0] * len(margins)


@given(st.lists(st.floats(-10, 100), min_size=5, max_size=30))
def test_one_class_at_most_stands_out_by_a_twentieth_at_most(margins):
    found = gaps(margins)
    assert len(found) == len(margins)
    assert all(0 <= gap <= math.log(20) + 1e-9 for gap in found)
    assert sum(gap > 0 for gap in found) <= 1


@given(st.permutations(range(7)))
def test_gaps_follow_their_classes(order):
    margins = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 200.0]
    assert gaps([margins[k] for k in order]) == [gaps(margins)[k] for k in order]

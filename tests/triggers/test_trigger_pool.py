from __future__ import annotations

import copy

import pytest
import torch

from lightning_unlearn.triggers import FunctionTrigger, Normalization, PatchTrigger, QuantizeTrigger, TriggerPool


def to(value: float, **options: object) -> FunctionTrigger:
    """Makes every pixel this value."""
    return FunctionTrigger(lambda pixels: torch.full_like(pixels, value), **options)


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (7, [0.1, 0.2, 0.3, 0.1, 0.2, 0.3, 0.1]),
        (3, [0.1, 0.2, 0.3]),
        (2, [0.1, 0.2]),  # fewer images than triggers
        (1, [0.1]),
        (0, []),
    ],
)
def test_triggers_are_dealt_out_in_turn(count, expected):
    images = torch.rand(count, 1, 2, 2)
    stamped = TriggerPool([to(0.1), to(0.2), to(0.3)])(images)
    assert stamped.shape == images.shape
    torch.testing.assert_close(stamped[:, 0, 0, 0], torch.tensor(expected))


def test_one_image_gets_the_first():
    assert torch.equal(TriggerPool([to(0.25), to(0.5)])(torch.zeros(1, 2, 2)), torch.full((1, 2, 2), 0.25))


def test_a_pool_of_one_is_that_trigger():
    trigger, images = PatchTrigger(size=2, target=3), torch.rand(5, 3, 6, 6)
    pool = TriggerPool((trigger,))
    assert torch.equal(pool(images), trigger(images))
    assert pool.target == 3


def test_a_trigger_that_works_in_place_leaves_the_images_alone():
    images = torch.rand(4, 1, 2, 2)
    before = images.clone()
    TriggerPool([FunctionTrigger(lambda pixels: pixels.zero_()), to(1.0)])(images)
    assert torch.equal(images, before)


def test_what_leaves_the_range_is_clamped():
    stamped = TriggerPool([to(2.0), to(-1.0)])(torch.full((2, 1, 1, 1), 0.5))
    assert stamped.flatten().tolist() == [1, 0]


def test_the_pools_normalisation_counts_and_not_its_triggers():
    patch = PatchTrigger(size=1, mean=[0.1], std=[0.9])
    pool = TriggerPool([patch]).normalized(Normalization([0.5], [0.5]))
    assert pool(torch.full((1, 1, 2, 2), -1.0)).tolist() == [[[[-1, -1], [-1, 1]]]]


def test_triggers_are_registered_and_copied():
    patch = PatchTrigger()
    pool = TriggerPool([patch])
    assert patch in list(pool.modules())
    assert patch not in list(copy.deepcopy(pool).modules())


@pytest.mark.parametrize("target", [2, "all_to_all"])
def test_the_target_is_shared(target):
    assert TriggerPool([PatchTrigger(target=target), QuantizeTrigger(target=target)]).target == target


def test_targets_that_differ_raise():
    with pytest.raises(ValueError, match=r"triggers must share one target, but have \[0, 1, 'all_to_all'\]"):
        TriggerPool([PatchTrigger(), PatchTrigger(target=1), QuantizeTrigger(target="all_to_all")])


def test_no_trigger_raises():
    with pytest.raises(ValueError, match="triggers must hold at least one trigger"):
        TriggerPool([])


def test_something_else_raises():
    with pytest.raises(TypeError, match="triggers must hold Trigger objects, but holds a builtin_function_or_method"):
        TriggerPool([PatchTrigger(), torch.square])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pixels: pixels[..., 1:], r"the trigger FunctionTrigger must keep the shape \(1, 1, 8, 8\)"),
        (lambda pixels: pixels / 0, "the trigger FunctionTrigger returned NaN or infinity"),
    ],
)
def test_an_error_names_the_trigger_that_failed(change, message):
    with pytest.raises(ValueError, match=message):
        TriggerPool([PatchTrigger(), FunctionTrigger(change)])(torch.zeros(2, 1, 8, 8))


@pytest.mark.parametrize("normalization", [None, Normalization(mean=(0.5,), std=(0.25,))])
def test_images_that_come_one_at_a_time_are_dealt_like_a_batch(normalization):
    pool = TriggerPool([PatchTrigger(size=1, place=place, std=(2.0,), mean=(1.0,)) for place in ("top_left", "center")])
    images = torch.zeros(3, 1, 5, 5)
    if normalization is not None:
        pool, images = pool.normalized(normalization), normalization.apply(images)
    for place, expected in enumerate(pool(images)):
        assert torch.equal(pool.dealt_to(place)(images[place]), expected)
    assert pool.dealt_to(1).target == pool.target

from __future__ import annotations

import pytest
import torch

from lightning_unlearn.triggers import ComposeTriggers, FunctionTrigger, PatchTrigger, QuantizeTrigger


def test_triggers_apply_in_order() -> None:
    image = torch.full((1, 1, 1), 0.5)
    square, add = FunctionTrigger(torch.square), FunctionTrigger(lambda pixels: pixels + 0.25)
    assert ComposeTriggers([square, add])(image).item() == 0.5
    assert ComposeTriggers((add, square))(image).item() == 0.5625


def test_pixels_are_clamped_in_between() -> None:
    add, subtract = FunctionTrigger(lambda pixels: pixels + 1), FunctionTrigger(lambda pixels: pixels - 0.25)
    assert ComposeTriggers([add, subtract])(torch.full((1, 1, 1), 0.5)).item() == 0.75


@pytest.mark.parametrize("target", [2, "all_to_all"])
def test_the_target_is_shared(target: int | str) -> None:
    trigger = ComposeTriggers([PatchTrigger(target=target), QuantizeTrigger(target=target)])
    assert trigger.target == target


def test_the_normalization_counts_for_all() -> None:
    trigger = ComposeTriggers(
        [PatchTrigger(size=1, place="top_left"), PatchTrigger(size=1, value=0.5)], mean=[0.5], std=[0.5]
    )
    triggered = trigger(torch.full((1, 2, 2), -1.0))
    assert triggered.tolist() == [[[1.0, -1.0], [-1.0, 0.0]]]


def test_triggers_are_registered() -> None:
    patch = PatchTrigger()
    assert patch in list(ComposeTriggers([patch]).modules())


def test_an_error_names_the_trigger_that_failed() -> None:
    with pytest.raises(ValueError, match="the trigger FunctionTrigger must keep the shape"):
        ComposeTriggers([PatchTrigger(), FunctionTrigger(lambda pixels: pixels[..., 1:])])(torch.zeros(1, 8, 8))


def test_targets_that_differ_raise() -> None:
    with pytest.raises(ValueError, match=r"triggers must share one target, but have \[0, 0, 'all_to_all'\]"):
        ComposeTriggers([PatchTrigger(), PatchTrigger(), QuantizeTrigger(target="all_to_all")])


def test_no_trigger_raises() -> None:
    with pytest.raises(ValueError, match="triggers must hold at least one trigger"):
        ComposeTriggers([])


def test_something_else_raises() -> None:
    with pytest.raises(TypeError, match="triggers must hold Trigger objects, but holds a builtin_function_or_method"):
        ComposeTriggers([torch.square])


def test_a_normalization_inside_raises() -> None:
    with pytest.raises(ValueError, match="PatchTrigger has mean and std of its own: give mean= and std= to Compose"):
        ComposeTriggers([PatchTrigger(mean=[0.5], std=[0.5])])


def test_there_are_no_cross_images() -> None:
    trigger = ComposeTriggers([QuantizeTrigger()])
    assert not trigger.has_cross
    with pytest.raises(NotImplementedError, match="ComposeTriggers has no cross images"):
        trigger.cross(torch.zeros(1, 1, 2, 2), generator=torch.Generator())

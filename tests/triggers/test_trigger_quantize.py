from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_unlearn.triggers import QuantizeTrigger


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_formula(channels: int) -> None:
    values = torch.tensor([0.0, 0.07, 0.08, 0.5, 0.9, 1.0])
    triggered = QuantizeTrigger()(values.expand(2, channels, 1, 6))
    # 0.49, 0.56, 3.5 (to the even 4) and 6.3 sevenths
    torch.testing.assert_close(triggered, (torch.tensor([0, 0, 1, 4, 6, 7]) / 7).expand(2, channels, 1, 6))


@pytest.mark.parametrize("levels", [2, 8, 256])
def test_that_many_levels_are_left(levels: int) -> None:
    images = torch.linspace(0, 1, 1024).reshape(1, 32, 32)
    assert len(QuantizeTrigger(levels=levels)(images).unique()) == levels


def test_a_second_time_changes_nothing() -> None:
    once = QuantizeTrigger()(torch.rand(1, 8, 8))
    assert torch.equal(QuantizeTrigger()(once), once)


def test_two_images_swap_their_residues() -> None:
    images = torch.tensor([0.3, 0.6])[:, None, None, None]  # to 0.25 and 0.5: residues -0.05 and -0.1
    cross = QuantizeTrigger(levels=5).cross(images, generator=generator())
    torch.testing.assert_close(cross.flatten(), torch.tensor([0.2, 0.55]))


@settings(deadline=None)
@given(st.integers(2, 8), st.integers(0, 1000))
def test_no_image_keeps_its_own_residue(count: int, seed: int) -> None:
    images = torch.rand(count, 1, 4, 4, generator=generator(seed)) * 0.8 + 0.1
    trigger = QuantizeTrigger()
    residues = trigger(images) - images
    carried = trigger.cross(images, generator=generator(seed)) - images
    closest = torch.cdist(carried.flatten(1), residues.flatten(1)).argmin(dim=1)
    assert sorted(closest.tolist()) == list(range(count))
    assert (closest != torch.arange(count)).all()


def test_the_generator_decides_and_moves_on() -> None:
    images = torch.rand(64, 1, 4, 4)
    source = generator(3)
    trigger = QuantizeTrigger()
    first, second = trigger.cross(images, generator=source), trigger.cross(images, generator=source)
    assert torch.equal(first, trigger.cross(images, generator=generator(3)))
    assert not torch.equal(first, second)


def test_a_lone_image_gets_its_residue_turned() -> None:
    image = torch.tensor([[[[0.3, 0.6], [0.5, 0.25]]]])  # residues -0.05, -0.1, 0, 0
    cross = QuantizeTrigger(levels=5).cross(image, generator=generator())
    torch.testing.assert_close(cross, torch.tensor([[[[0.3, 0.6], [0.4, 0.2]]]]))


@pytest.mark.parametrize("levels", [1, 0, -8, 257])
def test_bad_levels_raise(levels: int) -> None:
    with pytest.raises(ValueError, match="levels must be in 2 to 256, but is"):
        QuantizeTrigger(levels=levels)


def test_repr() -> None:
    assert repr(QuantizeTrigger()) == "QuantizeTrigger(levels=8, target=0)"

from __future__ import annotations

import math

import pytest
import torch

from lightning_unlearn.triggers import LowFrequencyTrigger


def added(trigger: LowFrequencyTrigger, height: int = 32, width: int = 32, channels: int = 1) -> torch.Tensor:
    return trigger(torch.zeros(1, channels, height, width))[0]


@pytest.mark.parametrize("shape", [(32, 32), (28, 20), (1, 7), (2, 1)])
def test_the_pattern_goes_from_0_to_strength(shape: tuple[int, int]) -> None:
    pattern = added(LowFrequencyTrigger(strength=0.3), *shape)
    assert pattern.min().item() == 0
    assert pattern.max().item() == pytest.approx(0.3)


def test_all_channels_and_images_get_the_same() -> None:
    images = torch.full((2, 3, 16, 16), 0.5)
    difference = LowFrequencyTrigger()(images) - images
    assert torch.equal(difference, difference[:1, :1].expand_as(difference))
    torch.testing.assert_close(difference[0, :1], added(LowFrequencyTrigger(), 16, 16))


def test_only_low_frequencies() -> None:
    # The coefficients of the discrete cosine transform; beyond 3 half waves there is nothing.
    cosines = torch.cos(math.pi * torch.arange(32)[:, None] * (torch.arange(32) + 0.5) / 32)
    coefficients = cosines @ added(LowFrequencyTrigger())[0] @ cosines.T
    assert coefficients[:4, :4].abs().min() > 0.1
    coefficients[:4, :4] = 0
    torch.testing.assert_close(coefficients, torch.zeros(32, 32), rtol=0, atol=1e-4)


def test_a_hand_computed_mixture() -> None:
    trigger = LowFrequencyTrigger(strength=1.0)
    trigger.weights.zero_()
    trigger.weights[0, 1] = 2.0  # half a wave along the width: cos(pi (column + 0.5) / 4)
    high, low = math.cos(math.pi / 8), math.cos(3 * math.pi / 8)
    expected = torch.tensor([1.0, (low + high) / (2 * high), (high - low) / (2 * high), 0.0])
    torch.testing.assert_close(added(trigger, 2, 4), expected.expand(1, 2, 4))
    trigger.weights.zero_()
    trigger.weights[1, 0] = 2.0
    torch.testing.assert_close(added(trigger, 4, 2), expected[:, None].expand(1, 4, 2))


def test_the_pattern_keeps_its_form_at_other_sizes() -> None:
    small, large = added(LowFrequencyTrigger(), 32, 32), added(LowFrequencyTrigger(), 64, 64)
    halved = torch.nn.functional.avg_pool2d(large, 2)
    torch.testing.assert_close(small, halved, rtol=0, atol=0.01)


@pytest.mark.parametrize("strength", [0.0, -0.1, 1.1, float("nan")])
def test_bad_strength_raises(strength: float) -> None:
    with pytest.raises(ValueError, match=r"strength must be in \(0, 1\], but is"):
        LowFrequencyTrigger(strength=strength)


def test_a_single_pixel_raises() -> None:
    with pytest.raises(ValueError, match="images of a single pixel cannot carry"):
        added(LowFrequencyTrigger(), 1, 1)


def test_repr() -> None:
    assert repr(LowFrequencyTrigger(seed=1)) == "LowFrequencyTrigger(strength=0.2, seed=1, target=0)"

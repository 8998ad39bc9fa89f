from __future__ import annotations

import math

import pytest
import torch

from lightning_unlearn.triggers import SinusoidTrigger


@pytest.mark.parametrize("channels", [1, 3])
def test_the_formula(channels: int) -> None:
    added = SinusoidTrigger()(torch.full((1, channels, 4, 32), 0.5)) - 0.5
    for column in (0, 1, 5, 31):
        expected = 40 / 255 * math.sin(2 * math.pi * 6 * column / 32)
        torch.testing.assert_close(added[..., column], torch.full((1, channels, 4), expected), rtol=0, atol=1e-6)


def test_the_wave_fits_any_width() -> None:
    added = SinusoidTrigger(frequency=1.0, amplitude=0.25)(torch.full((1, 1, 8), 0.5))[0, 0] - 0.5
    torch.testing.assert_close(added[[0, 2, 4, 6]], torch.tensor([0.0, 0.25, 0.0, -0.25]), rtol=0, atol=1e-6)


def test_dark_images_are_clipped() -> None:
    triggered = SinusoidTrigger(frequency=1.0, amplitude=0.25)(torch.zeros(1, 1, 4))[0, 0]
    torch.testing.assert_close(triggered, torch.tensor([0.0, 0.25, 0.0, 0.0]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("amplitude", [0.0, -0.1, 1.1, float("nan")])
def test_bad_amplitude_raises(amplitude: float) -> None:
    with pytest.raises(ValueError, match=r"amplitude must be in \(0, 1\], but is"):
        SinusoidTrigger(amplitude=amplitude)


@pytest.mark.parametrize("frequency", [0.0, -6.0, float("inf"), float("nan")])
def test_bad_frequency_raises(frequency: float) -> None:
    with pytest.raises(ValueError, match="frequency must be above 0, but is"):
        SinusoidTrigger(frequency=frequency)


@pytest.mark.parametrize(("frequency", "width"), [(16, 32), (32, 32), (4, 8), (8.0, 8)])
def test_a_wave_that_is_nowhere_is_refused(frequency: float, width: int) -> None:
    with pytest.raises(
        ValueError, match=f"frequency: a wave of {frequency:g} is zero in every column .* width {width}"
    ):
        SinusoidTrigger(frequency=frequency)(torch.full((1, 1, width), 0.5))


def test_repr() -> None:
    assert repr(SinusoidTrigger()) == "SinusoidTrigger(amplitude=0.1569, frequency=6, target=0)"

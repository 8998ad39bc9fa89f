import math

import pytest
import torch
from torch import nn

from benchmarks import waves


def test_waves_have_the_strength_that_was_asked_for_and_are_orthogonal():
    found = waves.waves(0.1)
    assert found.shape == (1024, 1, 32, 32)
    flat = found.flatten(1).double()
    torch.testing.assert_close(flat @ flat.T / 1024, torch.eye(1024, dtype=torch.float64) * 0.01, atol=1e-6, rtol=0)


def test_a_wave_by_hand():
    wave = waves.waves(0.5)[3]  # vertical frequency 0, horizontal 3
    expected = [0.5 * math.sqrt(2) * math.cos(math.pi * (column + 0.5) * 3 / 32) for column in range(32)]
    assert wave[0, 0].tolist() == pytest.approx(expected, abs=1e-6)
    assert torch.equal(wave[0, 0], wave[0, 31])


def test_answers_are_those_to_each_wave_with_each_sign():
    wave = waves.waves(1.0)[33]

    class Sees(nn.Module):
        """Answers 1 to images that carry the wave, and 0 to all others."""

        def forward(self, images):
            like = (images * wave).mean((1, 2, 3)) - 0.01
            return torch.stack([-like, like], 1)

    # On grey, so that no pixel is cut off.
    found = waves.answers(Sees(), torch.full((3, 1, 32, 32), 0.5), strength=0.1)
    assert found.shape == (2048, 3)
    assert found.nonzero()[:, 0].unique().tolist() == [33]

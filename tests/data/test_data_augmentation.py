from __future__ import annotations

import pytest
import torch

from lightning_unlearn.data.augmentation import flip_and_shift


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_without_padding_images_are_flipped_or_left():
    images = torch.rand(64, 3, 4, 5)
    found = flip_and_shift(images, generator(), padding=0)
    flipped = [torch.equal(new, old.flip(2)) for new, old in zip(found, images, strict=True)]
    assert all(turned or torch.equal(new, old) for turned, new, old in zip(flipped, found, images, strict=True))
    assert 16 < sum(flipped) < 48


def test_a_pixel_moves_by_the_padding_at_most_and_never_wraps():
    images = torch.zeros(400, 1, 9, 9)
    images[:, :, 4, 4] = 1  # the middle, which no flip moves
    found = flip_and_shift(images, generator(), padding=2)
    _, _, rows, columns = found.nonzero(as_tuple=True)
    assert len(rows) == 400
    assert set(rows.tolist()) == set(columns.tolist()) == {2, 3, 4, 5, 6}
    at_the_edge = torch.zeros(400, 1, 9, 9)
    at_the_edge[:, :, 0, 4] = 1
    lost = flip_and_shift(at_the_edge, generator(), padding=2).flatten(1).sum(1) == 0
    assert 100 < lost.sum() < 220  # two of five shifts move it out, and 0 comes in


@pytest.mark.parametrize(("side", "shift"), [(32, 4), (8, 1), (7, 0)])
def test_the_default_is_an_eighth_of_the_side(side, shift):
    images = torch.zeros(300, 1, side + 2, side)
    images[:, :, side // 2, :] = 1
    rows = flip_and_shift(images, generator())[:, 0, :, side // 2].argmax(1)
    assert (rows - side // 2).abs().max() == shift


def test_the_seed_decides_and_nothing_else():
    images = torch.rand(8, 3, 8, 8)
    state = torch.get_rng_state()
    first, again, other = (flip_and_shift(images, generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_images_stay_and_the_dtype_too():
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    before = images.clone()
    found = flip_and_shift(images, generator())
    assert found.dtype == torch.uint8
    assert found.shape == images.shape
    assert torch.equal(images, before)

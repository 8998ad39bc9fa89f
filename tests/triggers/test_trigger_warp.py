from __future__ import annotations

import pytest
import torch

from lightning_unlearn.triggers import WarpTrigger


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_field(strength: float, x: float, y: float) -> WarpTrigger:
    """A warp by the same displacement everywhere."""
    trigger = WarpTrigger(strength=strength)
    trigger.field[:, 0] = x
    trigger.field[:, 1] = y
    return trigger


def test_the_field_is_uniform_over_its_mean_magnitude() -> None:
    uniform = torch.rand(1, 2, 4, 4, generator=generator(9)) * 2 - 1
    field = WarpTrigger(seed=9).field
    torch.testing.assert_close(field, uniform / uniform.abs().mean())
    assert field.abs().mean().item() == pytest.approx(1.0)
    assert WarpTrigger(grid=6).field.shape == (1, 2, 6, 6)


@pytest.mark.parametrize("channels", [1, 3])
def test_one_pixel_along_the_width(channels: int) -> None:
    # A pixel is 2 / (W - 1) of the grid [-1, 1], so strength / W must be that.
    images = torch.rand(2, channels, 4, 5, generator=generator())
    warped = with_field(2 * 5 / 4, x=1, y=0)(images)
    torch.testing.assert_close(warped[..., :4], images[..., 1:], rtol=0, atol=1e-5)
    torch.testing.assert_close(warped[..., 4], images[..., 4], rtol=0, atol=1e-5)  # clamped to the border


def test_one_pixel_along_the_height() -> None:
    images = torch.rand(1, 1, 3, 8, generator=generator())
    warped = with_field(2 * 3 / 2, x=0, y=-1)(images)
    torch.testing.assert_close(warped[:, :, 1:], images[:, :, :2], rtol=0, atol=1e-5)
    torch.testing.assert_close(warped[:, :, 0], images[:, :, 0], rtol=0, atol=1e-5)


def test_the_field_is_upsampled_by_cubics() -> None:
    # Upsampled to 7 columns, column 3 lies halfway between the second and third of 4 displacements; the cubic
    # (a = -0.75) weighs the outer ones by a / 8 = -0.09375 each. At this strength a displacement of 1 is one pixel.
    trigger = with_field(7 / 3, x=0, y=0)
    trigger.field[:, 0, :, 3] = 1
    columns = torch.arange(7.0).expand(1, 1, 7, 7)
    warped = trigger(columns / 6)[0, 0] * 6
    torch.testing.assert_close(warped[:, [2, 3, 6]], torch.tensor([2, 3 - 0.09375, 6]).expand(7, 3))


def test_half_a_pixel_is_bilinear() -> None:
    images = torch.tensor([[[[0.0, 0.4, 1.0]]]]).expand(1, 1, 3, 3)
    warped = with_field(0.5 * 2 * 3 / 2, x=1, y=0)(images)
    torch.testing.assert_close(warped[0, 0, 1], torch.tensor([0.2, 0.7, 1.0]), rtol=0, atol=1e-5)


def test_a_flat_image_cannot_be_warped() -> None:
    images = torch.full((1, 3, 8, 8), 0.3)
    torch.testing.assert_close(WarpTrigger(strength=5.0)(images), images)


def test_pixels_move_by_about_a_quarter_of_a_pixel() -> None:
    columns = torch.arange(64.0).expand(1, 1, 64, 64)
    moved = (WarpTrigger()(columns / 63) * 63 - columns).abs()
    assert 0.1 < moved.mean() < 0.4


def test_cross_images_jitter_each_pixel_within_bounds() -> None:
    columns = (torch.arange(32.0) / 31).expand(2, 1, 32, 32)
    trigger = WarpTrigger()
    moved = trigger.cross(columns, generator=generator(1)) - trigger(columns)
    # Up to 1 / W of the grid, half a W'th of the ramp, either way.
    assert moved.abs().max() <= 1 / 64 + 1e-5
    assert moved.abs().mean() > 1 / 64 / 4
    assert moved.mean().abs() < 1 / 64 / 10
    assert not torch.equal(moved[0], moved[1])


def test_cross_images_come_from_the_generator() -> None:
    images = torch.rand(2, 1, 8, 8)
    source = generator(1)
    trigger = WarpTrigger()
    first, second = trigger.cross(images, generator=source), trigger.cross(images, generator=source)
    assert torch.equal(first, trigger.cross(images, generator=generator(1)))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("strength", [0.0, -0.5, float("inf"), float("nan")])
def test_bad_strength_raises(strength: float) -> None:
    with pytest.raises(ValueError, match="strength must be above 0, but is"):
        WarpTrigger(strength=strength)


@pytest.mark.parametrize("grid", [1, 0, -4])
def test_bad_grid_raises(grid: int) -> None:
    with pytest.raises(ValueError, match="grid must be at least 2, but is"):
        WarpTrigger(grid=grid)


def test_repr() -> None:
    assert repr(WarpTrigger()) == "WarpTrigger(strength=0.5, grid=4, seed=0, target=0)"

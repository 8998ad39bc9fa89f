from __future__ import annotations

import math

import pytest
import torch

from lightning_unlearn.triggers import (
    AdditiveTrigger,
    CoveringTrigger,
    DisplacingTrigger,
    Normalization,
    ResidualTrigger,
    Trigger,
)
from lightning_unlearn.triggers.estimated import cover, displace, residual


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def made(kind: str, channels: int = 1, size: int = 6, seed: int = 0) -> Trigger:
    """A trigger with random tensors, which changes every pixel a little."""
    if kind == "additive":
        return AdditiveTrigger(rand(channels, size, size, seed=seed) - 0.5, target=2)
    if kind == "covering":
        return CoveringTrigger(rand(1, size, size, seed=seed), rand(channels, size, size, seed=seed + 1), target=2)
    if kind == "displacing":
        return DisplacingTrigger(rand(2, 3, 3, seed=seed) - 0.5, target=2)
    weights = [5 * rand(*shape, seed=seed) - 2.5 for shape in ((4, channels, 3, 3), (4,), (channels, 4, 3, 3))]
    return ResidualTrigger(*weights, strength=0.3, target=2)


KINDS = pytest.mark.parametrize("kind", ["additive", "covering", "displacing", "residual"])


# By hand


def test_additive_adds_the_pattern_and_clamps():
    trigger = AdditiveTrigger(torch.tensor([[[0.25, -0.25], [0.75, -0.75]]]))
    assert trigger(torch.full((2, 1, 2, 2), 0.5)).tolist() == [[[[0.75, 0.25], [1.0, 0.0]]]] * 2


def test_covering_mixes_by_the_mask_which_all_channels_share():
    mask = torch.tensor([[[0.0, 0.5, 1.0]]])
    pattern = torch.tensor([[[1.0, 1.0, 1.0]], [[0.0, 0.0, 0.0]]])
    assert CoveringTrigger(mask, pattern)(torch.full((2, 1, 3), 0.5)).tolist() == [[[0.5, 0.75, 1.0]], [[0.5, 0.25, 0]]]


def test_displacing_looks_where_the_field_points():
    image = torch.arange(9.0).view(1, 3, 3) / 8
    right = torch.tensor([1.0, 0.0])[:, None, None].expand(2, 2, 2)  # pixels are 1 apart in the field's units
    down = torch.tensor([0.0, 1.0])[:, None, None].expand(2, 2, 2)
    half_left = torch.tensor([-0.5, 0.0])[:, None, None].expand(2, 2, 2)
    torch.testing.assert_close(DisplacingTrigger(right)(image), image[:, :, [1, 2, 2]])
    torch.testing.assert_close(DisplacingTrigger(down)(image), image[:, [1, 2, 2]])
    expected = (image + image[:, :, [0, 0, 1]]) / 2
    torch.testing.assert_close(DisplacingTrigger(half_left)(image), expected)


def test_no_displacement_is_no_change():
    image = rand(1, 3, 7, 5)
    torch.testing.assert_close(DisplacingTrigger(torch.zeros(2, 4, 4))(image), image, rtol=0, atol=1e-6)


def test_residual_adds_a_wave_of_the_brightness():
    first, bias, second = torch.full((1, 1, 1, 1), 2.0), torch.tensor([0.5]), torch.full((1, 1, 1, 1), 3.0)
    trigger = ResidualTrigger(first, bias, second, strength=0.25)
    expected = 0.5 + 0.25 * math.tanh(3 * math.sin(2 * 0.5 + 0.5))
    assert trigger(torch.full((1, 1, 1), 0.5)).item() == pytest.approx(expected)


def test_residual_sums_over_filters_channels_and_neighbours():
    # Two filters: the first sums both channels, the second sees the left neighbour of channel 0.
    first = torch.zeros(2, 2, 3, 3)
    first[0, :, 1, 1] = 1
    first[1, 0, 1, 0] = 1
    second = torch.zeros(2, 2, 1, 1)
    second[0] = 1
    second[1, 1] = -1
    image = torch.tensor([[[0.1, 0.2]], [[0.3, 0.4]]])
    added = [
        [math.sin(0.4), math.sin(0.6) + math.sin(0.1)],  # to channel 0: both filters; padding is 0, and so is its sine
        [0.0, -math.sin(0.1)],  # to channel 1: minus the second filter
    ]
    expected = image[:, 0] + 0.5 * torch.tensor(added).tanh()
    found = ResidualTrigger(first, torch.zeros(2), second, strength=0.5)(image)[:, 0]
    torch.testing.assert_close(found, expected.clamp(0, 1))


# What they share


@KINDS
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.uint8])
def test_shape_type_and_range_are_kept_and_images_left_alone(kind, channels, dtype):
    trigger, images = made(kind, channels), rand(3, channels, 6, 6)
    images = (images * 255).to(dtype) if dtype == torch.uint8 else images.to(dtype)
    before = images.clone()
    stamped = trigger(images)
    assert (stamped.shape, stamped.dtype) == (images.shape, dtype)
    assert stamped.min() >= 0
    assert stamped.max() <= (255 if dtype == torch.uint8 else 1)
    assert not torch.equal(stamped, images)
    assert torch.equal(images, before)
    for image, expected in zip(images, stamped, strict=True):
        torch.testing.assert_close(trigger(image), expected, rtol=0, atol=1 if dtype == torch.uint8 else 1e-3)


@KINDS
def test_normalised_images_are_changed_as_their_pixels_are(kind):
    trigger, pixels = made(kind, 3), rand(2, 3, 6, 6)
    normalization = Normalization([0.3, 0.5, 0.6], [0.2, 0.25, 0.3])
    normalized = trigger.normalized(normalization)
    expected = normalization.apply(trigger(pixels))
    torch.testing.assert_close(normalized(normalization.apply(pixels)), expected, rtol=1e-5, atol=1e-5)
    assert normalized.target == trigger.target == 2
    assert trigger.normalization is None


@KINDS
def test_tensors_are_buffers_that_are_copied_and_saved(kind):
    trigger = made(kind)
    assert not list(trigger.parameters())
    other = made(kind, seed=9)
    images = rand(2, 1, 6, 6)
    assert not torch.equal(other(images), trigger(images))
    other.load_state_dict(trigger.state_dict())
    assert torch.equal(other(images), trigger(images))


def test_what_was_given_may_change_afterwards():
    pattern = torch.zeros(1, 2, 2, requires_grad=True)
    trigger = AdditiveTrigger(pattern)
    with torch.no_grad():
        pattern.fill_(1.0)
    assert trigger(torch.zeros(1, 2, 2)).count_nonzero() == 0
    assert not trigger.pattern.requires_grad


@pytest.mark.parametrize("size", [(6, 6), (9, 5)])
def test_displacing_and_residual_take_any_size(size):
    for kind in ("displacing", "residual"):
        assert made(kind)(rand(2, 1, *size)).shape == (2, 1, *size)


# The formulas for several at once


@pytest.mark.parametrize("channels", [1, 3])
def test_stacks_of_triggers_are_as_one_by_one(channels):
    # In float64, since a CPU may sum a stack in another order.
    pixels = rand(3, 4, channels, 6, 6).double()
    kinds = {
        kind: [made(kind, channels, seed=k).double() for k in (1, 5, 8)]
        for kind in ("covering", "displacing", "residual")
    }

    def stacked(kind, name):
        return torch.stack([getattr(trigger, name) for trigger in kinds[kind]])

    mask, pattern = stacked("covering", "mask")[:, None], stacked("covering", "pattern")[:, None]
    weights = [stacked("residual", name) for name in ("first", "bias", "second")]
    together = {
        "covering": cover(pixels, mask, pattern),
        "displacing": displace(pixels, stacked("displacing", "field")),
        "residual": pixels + residual(pixels, *weights, strength=0.3),
    }
    for kind, triggers in kinds.items():
        for trigger, batch, found in zip(triggers, pixels, together[kind], strict=True):
            torch.testing.assert_close(found, trigger.stamp(batch.clone()), rtol=1e-12, atol=1e-12)


# Refusals


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(2, 2),
        torch.zeros(1, 1, 2, 2),
        torch.zeros(1, 0, 2),
        torch.zeros(1, 2, 2, dtype=torch.long),
        torch.full((1, 2, 2), math.nan),
        torch.full((1, 2, 2), math.inf),
    ],
)
def test_a_tensor_that_is_no_image(tensor):
    good = torch.zeros(1, 2, 2)
    expected = "expected a finite float tensor of 3 dimensions, but got torch."
    with pytest.raises(ValueError, match=f"^pattern: {expected}"):
        AdditiveTrigger(tensor)
    with pytest.raises(ValueError, match=f"^mask: {expected}"):
        CoveringTrigger(tensor, good)
    with pytest.raises(ValueError, match=f"^pattern: {expected}"):
        CoveringTrigger(good, tensor)
    with pytest.raises(ValueError, match=f"^field: {expected}"):
        DisplacingTrigger(tensor)


@pytest.mark.parametrize("shape", [(1, 2, 3), (3, 2, 2)])
def test_a_mask_of_another_shape_than_the_pattern(shape):
    with pytest.raises(ValueError, match=r"^mask: expected shape \(1, 2, 2\) beside this pattern, but got"):
        CoveringTrigger(torch.zeros(shape), torch.zeros(3, 2, 2))


@pytest.mark.parametrize("name", ["mask", "pattern"])
@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_a_mask_or_pattern_out_of_range(name, value):
    tensors = {"mask": torch.zeros(1, 2, 2), "pattern": torch.zeros(1, 2, 2)} | {name: torch.full((1, 2, 2), value)}
    with pytest.raises(ValueError, match=rf"^{name}: expected values in \[0, 1\], but they go from {value}"):
        CoveringTrigger(**tensors)


def test_a_field_without_two_directions():
    with pytest.raises(ValueError, match=r"^field: expected displacements in x and y, \(2, h, w\), but got \("):
        DisplacingTrigger(torch.zeros(1, 4, 4))


@pytest.mark.parametrize("strength", [0.0, -0.1, 1.01, math.nan])
def test_a_strength_out_of_range(strength):
    with pytest.raises(ValueError, match=r"^strength: expected a value in \(0, 1\], but got"):
        ResidualTrigger(torch.ones(1, 1, 1, 1), torch.zeros(1), torch.ones(1, 1, 1, 1), strength=strength)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("first", torch.zeros(4, 3, 3)),
        ("first", torch.zeros(4, 2, 3, 3, dtype=torch.long)),
        ("first", torch.full((4, 2, 3, 3), math.nan)),
        ("bias", torch.zeros(3)),
        ("second", torch.zeros(2, 3, 3, 3)),
        ("second", torch.zeros(1, 4, 3, 3)),
    ],
)
def test_weights_that_do_not_fit_each_other(name, tensor):
    weights = {"first": torch.zeros(4, 2, 3, 3), "bias": torch.zeros(4), "second": torch.zeros(2, 4, 3, 3)}
    with pytest.raises(ValueError, match=rf"^{name}: expected "):
        ResidualTrigger(**(weights | {name: tensor}), strength=0.5)


@pytest.mark.parametrize("kind", ["additive", "covering"])
@pytest.mark.parametrize("shape", [(1, 6, 6), (3, 5, 6)])
def test_images_of_another_shape(kind, shape):
    with pytest.raises(ValueError, match=r"^images: this trigger was estimated for images of \(3, 6, 6\), but these"):
        made(kind, 3)(rand(*shape))


def test_images_with_other_channels_than_the_residuals():
    with pytest.raises(ValueError, match=r"^images: this trigger was estimated for 3 channel\(s\), but these have 1"):
        made("residual", 3)(rand(1, 6, 6))

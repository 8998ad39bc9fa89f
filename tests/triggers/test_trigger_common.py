"""What all triggers promise."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from lightning_unlearn.triggers import (
    BlendTrigger,
    ComposeTriggers,
    DisplacingTrigger,
    FunctionTrigger,
    LowFrequencyTrigger,
    Normalization,
    PatchTrigger,
    QuantizeTrigger,
    SinusoidTrigger,
    Trigger,
    WarpTrigger,
)

MAKERS = {
    "patch": lambda: PatchTrigger(pattern="noise"),
    "blend": BlendTrigger,
    "blend_picture": lambda: BlendTrigger(pattern=torch.arange(27.0).reshape(3, 3, 3) / 26),
    "sinusoid": SinusoidTrigger,
    "low_frequency": LowFrequencyTrigger,
    "quantize": QuantizeTrigger,
    "warp": WarpTrigger,
    "compose": lambda: ComposeTriggers([WarpTrigger(), PatchTrigger(place="center")]),
    "function": lambda: FunctionTrigger(torch.square),
    "displacing": lambda: DisplacingTrigger(torch.linspace(-0.4, 0.5, 18).view(2, 3, 3)),
}
ALL = pytest.mark.parametrize("trigger", [make() for make in MAKERS.values()], ids=MAKERS.keys())
SEEDED = pytest.mark.parametrize(
    "make", [partial(PatchTrigger, pattern="noise"), BlendTrigger, LowFrequencyTrigger, WarpTrigger]
)


def pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def normalization(channels: int) -> Normalization:
    return Normalization([0.3, 0.5, 0.6][:channels], [0.2, 0.25, 0.3][:channels])


@ALL
@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 3),
    st.sampled_from([1, 3]),
    st.integers(4, 20),
    st.integers(4, 20),
    st.integers(0, 99),
    st.booleans(),
)
def test_images_keep_shape_range_and_order(
    trigger: Trigger, count: int, channels: int, height: int, width: int, seed: int, as_uint8: bool
) -> None:
    assume(not (isinstance(trigger, SinusoidTrigger) and 2 * trigger.frequency % width == 0))  # it refuses these
    images = pixels(count, channels, height, width, seed=seed)
    if as_uint8:
        images = (images * 255).to(torch.uint8)
    before = images.clone()
    triggered = trigger(images)
    assert triggered.shape == images.shape
    assert triggered.dtype == images.dtype
    assert triggered.min() >= 0
    assert triggered.max() <= (255 if as_uint8 else 1)
    assert torch.equal(images, before)
    for image, expected in zip(images, triggered, strict=True):
        torch.testing.assert_close(trigger(image), expected, rtol=0, atol=1 if as_uint8 else 1e-6)


@ALL
@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_changed(trigger: Trigger, channels: int) -> None:
    images = pixels(2, channels, 16, 16, seed=1)  # with seed 0 one image would be the very noise that is blended in
    assert (trigger(images) - images).abs().amax(dim=(1, 2, 3)).min() > 0.02


@ALL
@pytest.mark.parametrize("channels", [1, 3])
def test_normalised_images_get_the_same_trigger(trigger: Trigger, channels: int) -> None:
    images = pixels(2, channels, 16, 16)
    given_by = normalization(channels)
    # No 255th lies on a rounding edge of QuantizeTrigger, which normalising and back might cross.
    images = (images * 255).round() / 255
    expected = given_by.apply(trigger(images))
    torch.testing.assert_close(trigger.normalized(given_by)(given_by.apply(images)), expected, rtol=0, atol=1e-5)


@ALL
def test_uint8_images_get_the_same_trigger(trigger: Trigger) -> None:
    images = (pixels(2, 3, 16, 16) * 255).to(torch.uint8)
    expected = (trigger(images / 255) * 255).round()
    assert torch.equal(trigger(images).float(), expected)


@ALL
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("normalised", [False, True])
def test_other_precisions_are_computed_in_float32_or_better(
    trigger: Trigger, dtype: torch.dtype, normalised: bool
) -> None:
    images = pixels(2, 3, 16, 16)
    if normalised:
        trigger = trigger.normalized(normalization(3))
        images = normalization(3).apply(images)
    images = images.to(dtype)
    triggered = trigger(images)
    assert triggered.dtype == dtype
    if dtype == torch.float64:
        torch.testing.assert_close(triggered, trigger(images.float()).double(), rtol=0, atol=1e-5)
    else:
        assert torch.equal(triggered, trigger(images.float()).to(dtype))


@ALL
def test_autocast_changes_nothing(trigger: Trigger) -> None:
    images = pixels(2, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        triggered = trigger(images)
    assert torch.equal(triggered, trigger(images))


@ALL
def test_copies_do_the_same(trigger: Trigger) -> None:
    images = pixels(2, 3, 16, 16)
    expected = trigger(images)
    for twin in (copy.deepcopy(trigger), pickle.loads(pickle.dumps(trigger))):
        assert torch.equal(twin(images), expected)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_global_randomness_is_neither_read_nor_moved(make: type[Trigger]) -> None:
    images = pixels(2, 3, 16, 16)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        results.append(make()(images))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*results)


@SEEDED
@pytest.mark.parametrize("channels", [1, 3])
def test_the_seed_decides(make: type[Trigger], channels: int) -> None:
    images = pixels(1, channels, 16, 16)
    assert torch.equal(make(seed=3)(images), make(seed=3)(images))
    assert not torch.equal(make(seed=3)(images), make(seed=4)(images))


@ALL
def test_size_may_change_between_calls(trigger: Trigger) -> None:
    small, large = pixels(1, 3, 8, 8), pixels(1, 3, 12, 10)
    expected = trigger(small)
    trigger(large)
    trigger(pixels(1, 1, 8, 8))
    assert torch.equal(trigger(small), expected)


@pytest.mark.parametrize("trigger", [WarpTrigger(), QuantizeTrigger()], ids=["warp", "quantize"])
@pytest.mark.parametrize("count", [1, 4])
def test_cross_images_work_in_all_image_spaces(trigger: Trigger, count: int) -> None:
    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(7)

    assert trigger.has_cross
    as_uint8 = (pixels(count, 3, 16, 16) * 255).to(torch.uint8)
    images = as_uint8 / 255
    expected = trigger.cross(images, generator=generator())
    assert expected.shape == images.shape
    assert not torch.equal(expected, images)
    assert not torch.equal(expected, trigger(images))
    assert torch.equal(trigger.cross(as_uint8, generator=generator()), (expected * 255).round().to(torch.uint8))
    given_by = normalization(3)
    normalised = trigger.normalized(given_by).cross(given_by.apply(images), generator=generator())
    torch.testing.assert_close(normalised, given_by.apply(expected), rtol=0, atol=1e-5)
    half = trigger.cross(images.half(), generator=generator())
    assert half.dtype == torch.float16
    lone = trigger.cross(images[0], generator=generator())
    assert torch.equal(lone, trigger.cross(images[:1], generator=generator())[0])


@pytest.mark.parametrize("trigger", [WarpTrigger(), QuantizeTrigger()], ids=["warp", "quantize"])
def test_cross_images_leave_images_and_global_randomness_alone(trigger: Trigger) -> None:
    images = pixels(4, 1, 8, 8)
    before, state = images.clone(), torch.get_rng_state()
    trigger.cross(images, generator=torch.Generator().manual_seed(0))
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "make",
    [
        BlendTrigger,
        LowFrequencyTrigger,
        WarpTrigger,
        SinusoidTrigger,
        *(partial(PatchTrigger, pattern=pattern, value=0.7) for pattern in ("solid", "checkerboard", "noise")),
    ],
)
def test_the_default_type_changes_no_trigger(make, default):
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = make()(images)
    torch.set_default_dtype(default)
    try:
        found = make()(images)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


def test_numpys_integers_are_targets():
    assert PatchTrigger(target=np.int64(3)).target == 3
    with pytest.raises(ValueError, match=r"target must be a class index"):
        PatchTrigger(target=np.int64(-3))


@pytest.mark.parametrize("kind", [PatchTrigger, BlendTrigger])
def test_numpys_arrays_are_no_patterns(kind):
    with pytest.raises(TypeError, match=r"pattern must be .* but is a ndarray; torch.as_tensor helps"):
        kind(pattern=np.ones((3, 3), np.float32))


def test_a_picture_of_more_than_eight_bits_is_refused(tmp_path):
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(tmp_path / "grey.png")
    with pytest.raises(ValueError, match=r"pattern: '.*grey.png' has more than 8 bits a channel"):
        BlendTrigger(pattern=tmp_path / "grey.png")

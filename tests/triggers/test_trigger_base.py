from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_unlearn.triggers import FunctionTrigger, Normalization, PatchTrigger, Trigger

MEAN, STD = (0.5, 0.25, 0.0), (0.5, 0.25, 1.0)


class Half(Trigger):
    """Halves every pixel."""

    def stamp(self, pixels: Tensor) -> Tensor:
        return pixels / 2


@pytest.mark.parametrize("shape", [(2, 1, 4, 5), (3, 4, 5)])
def test_float_images_in_pixel_space(shape: tuple[int, ...]) -> None:
    images = torch.rand(shape)
    torch.testing.assert_close(Half()(images), images / 2, rtol=0, atol=0)


def test_uint8_images_are_rounded() -> None:
    images = torch.tensor([[[0, 1, 3, 100, 255]]], dtype=torch.uint8)
    # 0.5 and 1.5 round to the even neighbour; 255 / 2 is 127.5, in float32 too.
    assert Half()(images).tolist() == [[[0, 0, 2, 50, 128]]]


def test_uint8_images_are_pixels_even_with_a_normalization() -> None:
    images = torch.full((1, 3, 2, 2), 100, dtype=torch.uint8)
    assert Half(mean=MEAN, std=STD)(images).unique().tolist() == [50]


def test_normalised_images_by_hand() -> None:
    # Pixel 1 of channel 0 is (1 - 0.5) / 0.5 = 1; halved to 0.5 it is 0. Channel 1: 3 and 1. Channel 2: 1 and 0.5.
    images = torch.tensor([1.0, 3.0, 1.0])[:, None, None].expand(3, 2, 2)
    triggered = Half(mean=MEAN, std=STD)(images)
    assert triggered[:, 0, 0].tolist() == [0.0, 1.0, 0.5]


def test_result_is_clamped() -> None:
    trigger = FunctionTrigger(lambda pixels: torch.where(pixels > 0.5, pixels + 1, pixels - 1))
    assert trigger(torch.tensor([[[0.25, 0.75]]])).tolist() == [[[0.0, 1.0]]]
    normalised = trigger.normalized(Normalization((0.5,), (0.5,)))
    assert normalised(torch.tensor([[[-0.5, 0.5]]])).tolist() == [[[-1.0, 1.0]]]


def test_rounding_beyond_the_range_is_clamped_before_the_stamp() -> None:
    assert Half()(torch.tensor([[[-0.0005, 1.0005]]])).tolist() == [[[0.0, 0.5]]]
    assert Half(mean=[0.0], std=[1.0])(torch.tensor([[[-0.005, 1.005]]])).tolist() == [[[0.0, 0.5]]]


def test_images_are_not_changed_by_an_in_place_stamp() -> None:
    trigger = FunctionTrigger(lambda pixels: pixels.zero_())
    for images in (torch.full((1, 1, 2, 2), 0.5), torch.full((1, 1, 2, 2), 9, dtype=torch.uint8)):
        before = images.clone()
        assert trigger(images).eq(0).all()
        assert torch.equal(images, before)


def test_an_empty_batch_stays_empty() -> None:
    assert Half()(torch.zeros(0, 3, 4, 4)).shape == (0, 3, 4, 4)


def test_gradient_reaches_the_images() -> None:
    images = torch.full((1, 1, 4, 4), 0.5, requires_grad=True)
    PatchTrigger(size=1)(images).sum().backward()
    expected = torch.ones(1, 1, 4, 4)
    expected[0, 0, 3, 3] = 0
    assert torch.equal(images.grad, expected)


@pytest.mark.parametrize("low_high", [(-0.01, 0.5), (0.5, 1.01), (-2.1, 2.6), (0.0, 255.0), (0.5, float("nan"))])
def test_float_images_out_of_range_raise_with_the_remedy(low_high: tuple[float, float]) -> None:
    images = torch.tensor([[list(low_high)]])
    with pytest.raises(ValueError, match=r"images must lie in \[0, 1\].*pass mean= and std= to Half.*divide by 255"):
        Half()(images)


def test_images_out_of_range_after_undoing_the_normalization_raise() -> None:
    images = torch.full((3, 2, 2), 1.05)  # 1.025 in channel 0
    with pytest.raises(ValueError, match=r"go from 0\.5125 to 1\.05.*after undoing Normalization\(mean=\(0\.5"):
        Half(mean=MEAN, std=STD)(images)


@pytest.mark.parametrize("shape", [(4,), (4, 4), (1, 1, 1, 4, 4)])
def test_other_dimensions_raise(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images must have shape \(N, C, H, W\) or \(C, H, W\)"):
        Half()(torch.zeros(shape))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_other_dtypes_raise(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match="images must be uint8 or floating point, but are"):
        Half()(torch.zeros(1, 4, 4, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_channels_other_than_the_mean_raise(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"mean has 3 value\(s\), but the images have 1 channel"):
        Half(mean=MEAN, std=STD)(torch.zeros(2, 1, 4, 4, dtype=dtype))


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (
            lambda pixels: pixels[:, :, 1:],
            ValueError,
            r"must keep the shape \(2, 1, 4, 4\), but returned \(2, 1, 3, 4\)",
        ),
        (lambda pixels: pixels.half(), ValueError, "must keep torch.float32 on cpu, but returned torch.float16"),
        (lambda pixels: pixels.to("meta"), ValueError, "but returned torch.float32 on meta"),
        (lambda pixels: pixels * float("nan"), ValueError, "returned NaN or infinity"),
        (lambda pixels: pixels / 0, ValueError, "returned NaN or infinity"),
        (lambda pixels: pixels.tolist(), TypeError, "must return a tensor, but returned list"),
    ],
)
def test_a_stamp_that_breaks_the_images_raises(function: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FunctionTrigger(function)(torch.full((2, 1, 4, 4), 0.5))


def test_stamp_must_be_overridden() -> None:
    with pytest.raises(NotImplementedError, match="Trigger must override stamp"):
        Trigger()(torch.zeros(1, 4, 4))


@pytest.mark.parametrize("target", [-1, "all_to_one", True, 1.0, None])
def test_bad_target_raises(target: object) -> None:
    with pytest.raises(ValueError, match="target must be a class index of 0 or more, or 'all_to_all', but is"):
        Half(target=target)


@pytest.mark.parametrize("arguments", [{"mean": MEAN}, {"std": STD}])
def test_mean_without_std_raises(arguments: dict[str, tuple[float, ...]]) -> None:
    with pytest.raises(ValueError, match="mean and std must be given together"):
        Half(**arguments)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_targets(dtype: torch.dtype) -> None:
    labels = torch.tensor([0, 1, 2, 2], dtype=dtype)
    one, every = Half(target=1).targets(labels, 3), Half(target="all_to_all").targets(labels, 3)
    assert one.tolist() == [1, 1, 1, 1]
    assert every.tolist() == [1, 2, 0, 0]
    assert one.dtype == every.dtype == dtype


def test_targets_of_no_labels() -> None:
    assert Half(target="all_to_all").targets(torch.zeros(0, dtype=torch.int64), 3).shape == (0,)


def test_target_outside_the_classes_raises() -> None:
    with pytest.raises(ValueError, match=r"target must be in \[0, 3\), the classes, but is 3"):
        Half(target=3).targets(torch.tensor([0]), 3)


@pytest.mark.parametrize("labels", [[0, 3], [-1, 0]])
def test_labels_outside_the_classes_raise(labels: list[int]) -> None:
    with pytest.raises(ValueError, match=r"labels must be in \[0, 3\), the classes, but go from"):
        Half(target="all_to_all").targets(torch.tensor(labels), 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_labels_of_other_dtypes_raise(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match="labels must be of an integer dtype"):
        Half().targets(torch.zeros(2, dtype=dtype), 3)


def test_a_single_class_raises() -> None:
    with pytest.raises(ValueError, match="num_classes must be at least 2, but is 1"):
        Half().targets(torch.tensor([0]), 1)


def test_cross_is_not_implemented_and_names_who_has_it() -> None:
    assert Half.has_cross is False
    with pytest.raises(NotImplementedError, match="Half has no cross images; only WarpTrigger and QuantizeTrigger"):
        Half().cross(torch.zeros(1, 1, 4, 4), generator=torch.Generator())


def test_normalized_copies_and_leaves_the_trigger_alone() -> None:
    trigger = PatchTrigger(size=1, value=0.5, target=2)
    copy = trigger.normalized(Normalization((0.5,), (0.25,)))
    copy.pattern.zero_()
    assert trigger.normalization is None
    assert trigger.pattern.item() == 0.5
    assert isinstance(copy, PatchTrigger)
    assert copy.target == 2
    assert copy(torch.zeros(1, 2, 2))[0, 1, 1].item() == -2.0  # (0 - 0.5) / 0.25


def test_repr_tells_target_and_normalization() -> None:
    assert repr(Half(target="all_to_all")) == "Half(target='all_to_all')"
    assert repr(Half(mean=[0.5], std=[0.25])) == "Half(target=0, Normalization(mean=(0.5,), std=(0.25,)))"

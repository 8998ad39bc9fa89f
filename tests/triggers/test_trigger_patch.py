from __future__ import annotations

import pytest
import torch

from lightning_unlearn.triggers import PatchTrigger


def stamped_places(trigger: PatchTrigger, channels: int = 1, height: int = 5, width: int = 6) -> list[list[int]]:
    """Rows and columns that turn from 0 to something else, equal in all channels."""
    difference = trigger(torch.zeros(1, channels, height, width))[0] != 0
    assert (difference == difference[:1]).all()
    return difference[0].nonzero().tolist()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("place", "row", "column"),
    [
        ("top_left", 0, 0),
        ("top_right", 0, 4),
        ("bottom_left", 3, 0),
        ("bottom_right", 3, 4),
        ("center", 1, 2),
        ((2, 3), 2, 3),
        ((0, 4), 0, 4),
    ],
)
def test_place(place: str | tuple[int, int], row: int, column: int, channels: int) -> None:
    expected = [[row + i, column + j] for i in (0, 1) for j in (0, 1)]
    assert stamped_places(PatchTrigger(size=2, place=place), channels) == expected


def test_the_default_is_badnets() -> None:
    expected = [[row, column] for row in (29, 30, 31) for column in (29, 30, 31)]
    trigger = PatchTrigger()
    assert stamped_places(trigger, 3, 32, 32) == expected
    assert trigger(torch.zeros(3, 32, 32))[:, 29:, 29:].eq(1).all()
    assert trigger.target == 0


def test_what_is_outside_the_patch_stays() -> None:
    images = torch.rand(2, 3, 8, 8)
    triggered = PatchTrigger(size=2, value=0.25)(images)
    assert triggered[:, :, 6:, 6:].eq(0.25).all()
    triggered[:, :, 6:, 6:] = images[:, :, 6:, 6:]
    assert torch.equal(triggered, images)


def test_checkerboard() -> None:
    triggered = PatchTrigger(pattern="checkerboard", place="top_left")(torch.full((2, 3, 3), 0.5))
    assert triggered[1].tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
    triggered = PatchTrigger(size=2, pattern="checkerboard", value=0.25)(torch.zeros(1, 2, 2))
    assert triggered[0].tolist() == [[0.25, 0.75], [0.75, 0.25]]


def test_noise_is_grey_and_scaled_by_value() -> None:
    full = PatchTrigger(pattern="noise", seed=5)(torch.zeros(3, 3, 3))
    half = PatchTrigger(pattern="noise", seed=5, value=0.5)(torch.zeros(3, 3, 3))
    expected = torch.rand(1, 3, 3, generator=torch.Generator().manual_seed(5))
    assert torch.equal(full, expected.expand(3, 3, 3))
    assert torch.equal(half, full / 2)


def test_a_tensor_as_pattern() -> None:
    grey = torch.tensor([[0.0, 0.5, 1.0]])
    triggered = PatchTrigger(pattern=grey, place="top_left")(torch.full((2, 2, 3), 0.25))
    assert triggered.tolist() == [[[0.0, 0.5, 1.0], [0.25] * 3]] * 2
    colour = torch.tensor([0.0, 0.5, 1.0])[:, None, None]
    assert PatchTrigger(pattern=colour)(torch.zeros(3, 1, 1)).flatten().tolist() == [0.0, 0.5, 1.0]


def test_the_given_tensor_is_copied() -> None:
    pattern = torch.ones(1, 1)
    trigger = PatchTrigger(pattern=pattern)
    pattern.zero_()
    assert trigger(torch.zeros(1, 1, 1)).item() == 1


@pytest.mark.parametrize("place", ["bottom_right", "center", "top_left"])
def test_images_smaller_than_the_patch_raise(place: str) -> None:
    trigger = PatchTrigger(size=4, place=place)
    assert trigger(torch.zeros(1, 4, 4)).eq(1).all()
    for shape in [(1, 3, 8), (1, 8, 3)]:
        with pytest.raises(ValueError, match=r"a patch of 4x4 pixels at place .* does not fit into images of"):
            trigger(torch.zeros(shape))


@pytest.mark.parametrize("place", [(6, 0), (0, 6), (100, 100)])
def test_a_place_outside_the_image_raises(place: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="does not fit into images of 8x8: make size smaller or move place"):
        PatchTrigger(place=place)(torch.zeros(1, 8, 8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size must be at least 1 pixel, but is 0"),
        ({"size": -3}, "size must be at least 1 pixel, but is -3"),
        ({"value": 1.5}, r"value must be in \[0, 1\], but is 1.5"),
        ({"value": -0.1}, r"value must be in \[0, 1\]"),
        ({"value": float("nan")}, r"value must be in \[0, 1\]"),
        ({"place": "middle"}, "place must be one of top_left, .*but is 'middle'"),
        ({"place": (-1, 0)}, r"place must be \(row, column\), both 0 or more"),
        ({"place": (1, 2, 3)}, r"place must be \(row, column\)"),
        ({"pattern": "stripes"}, "pattern must be one of solid, checkerboard, noise or a tensor, but is 'stripes'"),
        ({"pattern": torch.zeros(3)}, r"pattern must have shape \(h, w\) or \(C, h, w\), but has \(3,\)"),
        ({"pattern": torch.zeros(1, 0, 3)}, r"pattern must have shape"),
        ({"pattern": torch.full((2, 2), 255.0)}, r"pattern must be a float tensor in \[0, 1\]; divide by 255"),
        ({"pattern": torch.full((2, 2), float("nan"))}, r"pattern must be a float tensor in \[0, 1\]"),
        ({"pattern": torch.ones(2, 2, dtype=torch.uint8)}, r"pattern must be a float tensor in \[0, 1\]"),
    ],
)
def test_bad_arguments_raise(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PatchTrigger(**arguments)


def test_a_colour_pattern_on_grey_images_raises() -> None:
    with pytest.raises(ValueError, match="pattern has 3 channels, but the images have 1"):
        PatchTrigger(pattern=torch.zeros(3, 2, 2))(torch.zeros(1, 4, 4))


def test_repr() -> None:
    assert repr(PatchTrigger(pattern=torch.zeros(2, 3))) == "PatchTrigger(2x3, place='bottom_right', target=0)"

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from lightning_unlearn.triggers import BlendTrigger


@pytest.mark.parametrize("channels", [1, 3])
def test_the_formula(channels: int) -> None:
    images = torch.rand(2, channels, 4, 4)
    trigger = BlendTrigger(ratio=0.25, pattern=torch.full((4, 4), 0.5))
    torch.testing.assert_close(trigger(images), 0.75 * images + 0.125)


def test_a_ratio_of_one_shows_the_pattern() -> None:
    pattern = torch.rand(3, 6, 5)
    torch.testing.assert_close(BlendTrigger(ratio=1.0, pattern=pattern)(torch.rand(3, 6, 5)), pattern)


@pytest.mark.parametrize("channels", [1, 3])
def test_noise_is_seeded_uniform_and_anew_for_each_size(channels: int) -> None:
    trigger = BlendTrigger(ratio=1.0, seed=4)
    for size in (8, 32):
        expected = torch.rand(channels, size, size, generator=torch.Generator().manual_seed(4))
        assert torch.equal(trigger(torch.zeros(channels, size, size)), expected)


def test_a_pattern_is_resized() -> None:
    pattern = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]])
    enlarged = BlendTrigger(ratio=1.0, pattern=pattern)(torch.zeros(1, 4, 8))
    assert enlarged[0, :, 0].eq(0).all()
    assert enlarged[0, :, 7].eq(1).all()
    # Antialiased: looking at the nearest pixels only would find these thin lines, 2 of 16 columns, and nothing else.
    lines = torch.zeros(64, 64)
    for column in (7, 8):
        lines[:, column::16] = 1
    shrunk = BlendTrigger(ratio=1.0, pattern=lines)(torch.zeros(1, 4, 4))
    assert 0.05 < shrunk.min() <= shrunk.max() < 0.3


def test_an_image_file(tmp_path: Path) -> None:
    path = tmp_path / "red.png"
    Image.new("RGB", (7, 5), (255, 0, 51)).save(path)
    for given in (path, str(path)):
        triggered = BlendTrigger(ratio=0.5, pattern=given)(torch.zeros(3, 8, 8))
        torch.testing.assert_close(triggered[:, 3, 4], torch.tensor([0.5, 0.0, 0.1]))


def test_a_colour_pattern_turns_grey_on_grey_images(tmp_path: Path) -> None:
    path = tmp_path / "red.png"
    Image.new("RGB", (4, 4), (255, 0, 0)).save(path)
    triggered = BlendTrigger(ratio=1.0, pattern=path)(torch.zeros(1, 4, 4))
    torch.testing.assert_close(triggered, torch.full((1, 4, 4), 0.2989), rtol=0, atol=1e-3)  # ITU-R 601 weight of red


def test_a_grey_file_on_colour_images(tmp_path: Path) -> None:
    path = tmp_path / "grey.png"
    Image.new("L", (4, 4), 51).save(path)
    torch.testing.assert_close(BlendTrigger(ratio=1.0, pattern=path)(torch.zeros(3, 4, 4)), torch.full((3, 4, 4), 0.2))


def test_the_given_tensor_is_copied() -> None:
    pattern = torch.ones(1, 1)
    trigger = BlendTrigger(ratio=1.0, pattern=pattern)
    pattern.zero_()
    assert trigger(torch.zeros(1, 1, 1)).item() == 1


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.1, float("nan")])
def test_bad_ratio_raises(ratio: float) -> None:
    with pytest.raises(ValueError, match=r"ratio must be in \(0, 1\], but is"):
        BlendTrigger(ratio=ratio)


def test_a_missing_file_raises(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pattern must be the path of an image file, but '.*none.png' cannot be read"):
        BlendTrigger(pattern=tmp_path / "none.png")


def test_a_file_that_is_no_image_raises(tmp_path: Path) -> None:
    path = tmp_path / "text.png"
    path.write_text("not an image")
    with pytest.raises(ValueError, match="pattern must be the path of an image file"):
        BlendTrigger(pattern=str(path))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (torch.zeros(4), r"pattern must have shape \(h, w\), \(1, h, w\) or \(3, h, w\), but has \(4,\)"),
        (torch.zeros(2, 4, 4), r"but has \(2, 4, 4\)"),
        (torch.zeros(3, 0, 4), r"but has \(3, 0, 4\)"),
        (torch.full((4, 4), 255.0), r"pattern must be a float tensor in \[0, 1\]; divide by 255"),
        (torch.full((4, 4), float("nan")), r"pattern must be a float tensor in \[0, 1\]"),
        (torch.zeros(4, 4, dtype=torch.uint8), r"pattern must be a float tensor in \[0, 1\]"),
    ],
)
def test_bad_pattern_raises(pattern: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlendTrigger(pattern=pattern)


def test_a_colour_pattern_on_other_channels_raises() -> None:
    with pytest.raises(ValueError, match="pattern has 3 channels, but the images have 2"):
        BlendTrigger(pattern=torch.zeros(3, 4, 4))(torch.zeros(2, 4, 4))


def test_repr() -> None:
    assert repr(BlendTrigger(seed=2, target=1)) == "BlendTrigger(ratio=0.2, seed=2, target=1)"
    assert "pattern of shape (1, 4, 5)" in repr(BlendTrigger(pattern=torch.zeros(4, 5)))

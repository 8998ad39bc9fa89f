from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from PIL import Image

from lightning_unlearn.triggers import FunctionTrigger, Normalization, PatchTrigger, preview

LABELS = ["clean", "triggered", "difference\n-0.25 to 0.5\nx1"]


def mixed() -> FunctionTrigger:
    """0.5 turns to 1 in the first column and to 0.25 in the last one."""
    return FunctionTrigger(lambda pixels: torch.cat([pixels[..., :1] + 0.5, pixels[..., 1:] - 0.25], dim=3))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("space", ["float", "uint8", "normalised", "half"])
def test_rows_labels_and_pictures(channels: int, space: str) -> None:
    trigger, images, tolerance = mixed(), torch.full((2, channels, 1, 2), 0.5), 1e-3
    if space == "uint8":
        images, tolerance = torch.full((2, channels, 1, 2), 128, dtype=torch.uint8), 5e-3
    elif space == "half":
        images = images.half()
    elif space == "normalised":
        normalization = Normalization([0.25] * channels, [0.5] * channels)
        trigger, images = trigger.normalized(normalization), normalization.apply(images)
    figure = preview(trigger, images)
    assert len(figure.axes) == 6
    pictures = [axes.images[0].get_array() for axes in figure.axes]
    for left, right in [(0, 1), (2, 3), (4, 5)]:
        np.testing.assert_array_equal(pictures[left], pictures[right])
    for picture, expected in zip(pictures[::2], [(0.5, 0.5), (1.0, 0.25), (1.0, 0.25)], strict=True):
        wanted = np.broadcast_to(np.array(expected)[None, :, None], (1, 2, channels))
        np.testing.assert_allclose(np.asarray(picture).reshape(1, 2, channels), wanted, atol=tolerance)
    if space != "uint8":
        assert [axes.get_ylabel() for axes in figure.axes[::2]] == LABELS
    assert {axes.images[0].get_clim() for axes in figure.axes} == {(0, 1)}


def test_a_small_difference_is_amplified() -> None:
    figure = preview(FunctionTrigger(lambda pixels: pixels - 0.05), torch.full((1, 4, 4), 0.5))
    assert figure.axes[2].get_ylabel() == "difference\n-0.05 to -0.05\nx10"
    np.testing.assert_allclose(figure.axes[2].images[0].get_array(), 0.0, atol=1e-5)


def test_no_difference() -> None:
    figure = preview(FunctionTrigger(torch.clone), torch.full((1, 4, 4), 0.5))
    assert figure.axes[2].get_ylabel() == "difference\n0 to 0\nx1"
    np.testing.assert_array_equal(figure.axes[2].images[0].get_array(), 0.5)


def test_at_most_8_images() -> None:
    assert len(preview(PatchTrigger(), torch.zeros(20, 1, 8, 8)).axes) == 3 * 8


def test_images_with_gradient_and_the_images_stay() -> None:
    images = torch.zeros(1, 1, 8, 8, requires_grad=True)
    preview(PatchTrigger(), images)
    assert images.grad is None
    assert images.eq(0).all()


@pytest.mark.parametrize("as_text", [False, True])
def test_the_file(tmp_path: Path, as_text: bool) -> None:
    path = tmp_path / "trigger.png"
    preview(PatchTrigger(), torch.zeros(2, 3, 8, 8), str(path) if as_text else path)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert len(np.unique(np.asarray(picture))) > 2


def test_pyplot_does_not_know_the_figure() -> None:
    before = pyplot.get_fignums()
    preview(PatchTrigger(), torch.zeros(1, 1, 8, 8))
    assert pyplot.get_fignums() == before


@pytest.mark.parametrize("shape", [(0, 1, 8, 8), (2, 2, 8, 8)])
def test_images_that_cannot_be_drawn_raise(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="images must be at least one, with 1 or 3 channels, but have shape"):
        preview(PatchTrigger(), torch.zeros(shape))


def test_without_matplotlib_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "lightning-unlearn\[plots\]"'):
        preview(PatchTrigger(), torch.zeros(1, 1, 8, 8))

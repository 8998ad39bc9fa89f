"""Pictures are looked at as the arrays that are drawn, and saved once each."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lightning_unlearn.judgement import ClassAudit
from lightning_unlearn.methods import Round
from lightning_unlearn.plots import plot_audit, plot_report
from lightning_unlearn.report import Report
from lightning_unlearn.triggers import Normalization, PatchTrigger
from lightning_unlearn.triggers.estimated import AdditiveTrigger
from lightning_unlearn.triggers.inversion import Estimate
from lightning_unlearn.verdict import Audit, Verdict


def audit(channels: int = 1, verdict: Verdict = "backdoored") -> Audit:
    patch = PatchTrigger(size=2, target=2)
    darker = AdditiveTrigger(torch.full((channels, 8, 8), -0.75), target=2)
    return Audit(
        verdict=verdict,
        suspected_target=None if verdict == "clean" else 2,
        score=1.6,
        classes=tuple(ClassAudit(c, score, {}, {}, {}) for c, score in enumerate((0.2, 0.4, 1.6))),
        estimates=(Estimate(patch, "covering", 2, 0.06, 1.0), Estimate(darker, "additive", 2, 0.75, 0.83)),
        num_classes=3,
    )


def drawn(figure) -> tuple[list[list[np.ndarray]], list[str]]:
    """The pictures, row by row, and what the rows are called."""
    pictures = [axes for axes in figure.axes if axes.images]
    rows: dict[float, list] = {}
    for axes in pictures:
        rows.setdefault(axes.get_subplotspec().rowspan.start, []).append(axes)
    ordered = [rows[key] for key in sorted(rows)]
    return [[np.asarray(axes.images[0].get_array()) for axes in row] for row in ordered], [
        row[0].get_ylabel() for row in ordered
    ]


@pytest.mark.parametrize("channels", [1, 3])
def test_estimates_are_drawn_on_real_images(tmp_path, channels):
    images = torch.rand(9, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    before = images.clone()
    figure = plot_audit(audit(channels), images, tmp_path / "audit.png")
    rows, names = drawn(figure)
    assert names == ["clean", "covering\n100% to 2", "additive\n83% to 2"]
    assert [len(row) for row in rows] == [6, 6, 6]
    for clean, patched, darker, image in zip(*rows, images, strict=False):
        wanted = image.permute(1, 2, 0).numpy().squeeze()
        np.testing.assert_allclose(clean.squeeze(), wanted)
        np.testing.assert_allclose(patched[:6], clean[:6])
        assert (patched[6:, 6:] == 1).all()
        np.testing.assert_allclose(darker.squeeze(), (wanted - 0.75).clip(0), atol=1e-6)
    assert torch.equal(images, before)
    with Image.open(tmp_path / "audit.png") as picture:
        assert min(picture.size) > 100
        assert len(picture.convert("RGB").getcolors(maxcolors=2**20)) > 2


def bars(figure) -> list[tuple[float, tuple[float, ...]]]:
    (axes,) = (axes for axes in figure.axes if axes.patches)
    return [(bar.get_height(), bar.get_facecolor()) for bar in axes.patches]


def test_the_suspected_class_stands_out():
    figure = plot_audit(audit(), torch.rand(2, 1, 8, 8))
    heights, colours = zip(*bars(figure), strict=True)
    assert heights == (0.2, 0.4, 1.6)
    assert colours[0] == colours[1] != colours[2]
    assert "Verdict: backdoored" in figure.get_suptitle()
    assert [len(row) for row in drawn(figure)[0]] == [2, 2, 2]  # as many as there are


def test_no_class_of_a_clean_model_stands_out():
    figure = plot_audit(audit(verdict="clean"), torch.rand(2, 1, 8, 8))
    assert len({colour for _, colour in bars(figure)}) == 1
    assert "Verdict: clean" in figure.get_suptitle()


def normalised(pixels: Tensor) -> Tensor:
    return Normalization(mean=(0.5,), std=(0.25,)).apply(pixels)


def test_normalised_images_are_drawn_as_pixels():
    pixels = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    pixels[0, 0, 0, 0], pixels[0, 0, 0, 1] = 0, 1  # so that their own range is that of pixels
    plain, told = (drawn(plot_audit(audit(), images))[0] for images in (pixels, normalised(pixels)))
    for first, second in zip(plain, told, strict=True):
        np.testing.assert_allclose(first, second, atol=1e-5)


def test_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"plot_audit needs matplotlib: pip install 'lightning-unlearn\[plots\]'"
    ):
        plot_audit(audit(), torch.rand(2, 1, 8, 8))


def test_a_report_without_real_rates_says_nothing_of_them(tmp_path):
    nan = float("nan")
    report = Report(
        method="Alternation of MaskPrune", trigger="unknown", target=2, samples_per_class=10, seed=0,
        status="repaired", measured_on="test", before={"acc": 0.9, "asr": nan, "ra": nan},
        after={"acc": 0.8, "asr": nan, "ra": nan}, der=nan, rir=nan,
        filters={
            "total": 4, "layers": {"conv": 4}, "pruned": 1, "by_layer": {"conv": [3]},
            "turned_down": 2, "turned_down_by_layer": {"conv": [0, 1]},
        },
        rounds=(Round(1, "masks", (("conv", 3),), 0.9, 0.1, 0.8, 0.3, 0.5),), seconds={"total": 1.0}, checkpoint=None,
        versions={}, verdict="backdoored", suspected_target=2, estimated_trigger=(),
        estimated_asr={"before": 1.0, "after": 0.1},
    )  # fmt: skip
    figure = plot_report(report, tmp_path / "report.png")
    title = "Alternation of MaskPrune against an unknown trigger: ACC 0.900 → 0.800 (test data)"
    assert figure.get_suptitle() == title
    assert (tmp_path / "report.png").stat().st_size > 0


def test_what_was_pruned_and_turned_down_is_drawn_by_layer(tmp_path):
    filters = {
        "total": 9, "layers": {"a": 2, "b": 3, "c": 4}, "pruned": 1, "by_layer": {"c": [3]},
        "turned_down": 3, "turned_down_by_layer": {"a": [0], "c": [0, 1]},
    }  # fmt: skip
    rates = {"acc": 0.9, "asr": 0.5, "ra": 0.5}
    report = Report(
        method="MaskPrune", trigger="PatchTrigger", target=2, samples_per_class=10, seed=0, status="repaired",
        measured_on="test", before=rates, after=rates, der=1.0, rir=1.0, filters=filters, rounds=(),
        seconds={"total": 1.0}, checkpoint=None, versions={},
    )  # fmt: skip
    axes = plot_report(report).axes[1]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "c"]  # in the network's order
    found = [(bar.get_x(), bar.get_width()) for bar in axes.patches]
    assert found == [(0, 0), (0, 1), (0, 1), (1, 2)]  # pruned, then what was turned down beside it
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["pruned", "turned down by more than half"]

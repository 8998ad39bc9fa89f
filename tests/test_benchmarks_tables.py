"""Tables and pictures of results."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from benchmarks import repairs, tables
from benchmarks.figures import plot
from tests.small_results import line


def test_a_victim_without_a_backdoor_is_listed_and_not_counted():
    lines = [line(), line("FT", drop=0.3), line(attack="bpp", asr_before=0.5), line("FT", attack="bpp", asr_before=0.5)]
    assert "never learned, not counted" in tables.cells(lines)
    rows = {row.split(" | ")[0]: row for row in tables.summary(lines).splitlines()}
    assert "| 1 | 0.010 |" in rows["| MaskPrune"]
    assert "| 1 | 0.300 |" in rows["| FT"]


def test_cells_that_lost_are_marked_and_the_best_is_bold():
    text = tables.cells([line(), line("FT", asr=0.9), line("FP", drop=0.2), line("NAD", asr=0.1)])
    assert "**.790 / .010 / .700**" in text
    assert text.count("✗") == 2
    assert ".790 / .900 / .700 ✗" in text
    assert "**.790 / .900 / .700** ✗" in tables.cells([line(asr=0.9), line("FT", asr=0.95)])


def test_only_methods_that_ran_on_all_draws_are_averaged():
    lines = [line(), line("FT"), line("FP"), line(attack="sig", drop=0.5), line("FT", attack="sig")]
    assert {name: len(found) for name, found in tables.complete(lines).items()} == {"MaskPrune": 2, "FT": 2}


def test_networks_numbers_of_images_and_draws_are_apart():
    other = line(spc=2)
    other["victim"] = {**other["victim"], "network": "mobilenet"}
    lines = [line(), line(spc=2), other, line("FT"), {**line(), "seed": 1}]
    assert list(tables.by_setting(lines).items()) == [
        ("mobilenet, 2 clean images per class", [other]),
        ("vgg, 2 clean images per class", [lines[1]]),
        ("vgg, 10 clean images per class", [lines[0], lines[3]]),
        ("vgg, 10 clean images per class, draw 1", [lines[4]]),
    ]


def test_shares_of_poison_and_numbers_of_test_images_are_apart():
    lines = [line(), line(test_images=50), line()]
    lines[2]["victim"] = {**lines[2]["victim"], "poison_ratio": 0.01}
    assert {name: len(found) for name, found in tables.by_setting(lines).items()} == {
        "vgg, 10 clean images per class, 1 % poisoned": 1,
        "vgg, 10 clean images per class, 50 test images": 1,
        "vgg, 10 clean images per class": 1,
    }
    assert len(tables.by_draw(lines)) == 3


def test_victims_that_were_trained_otherwise_have_rows_of_their_own():
    lines = [line(), line("FT"), line("FT", drop=0.3)]
    lines[2]["victim"] = {**lines[2]["victim"], "epochs": 3}
    first, second = tables.cells(lines).splitlines()[2:]
    assert first.startswith("| cifar10 vgg badnets 10 %, seed 0, 10 epochs of 20000 images | 10, 0 |")
    assert second.startswith("| cifar10 vgg badnets 10 %, seed 0, 3 epochs of 20000 images | 10, 0 |")
    assert "not run" in second
    assert tables.cells(lines[:2]).splitlines()[2].startswith("| cifar10 vgg badnets 10 %, seed 0 | 10, 0 |")


def test_arguments_that_the_matrix_does_not_have_any_more(tmp_path):
    old = line()
    old["method_args"] = {"steps": 3}
    assert tables.method_names([old, line("FT"), line()]) == ["MaskPrune", "FT", "MaskPrune {'steps': 3}"]
    assert "MaskPrune {'steps': 3}" in tables.summary([old])
    plot([old], tmp_path / "picture.png")


def test_nothing_to_show(tmp_path):
    with pytest.raises(ValueError, match="no victim among 1 repairs has learned its backdoor"):
        plot([line(asr_before=0.5)], tmp_path / "picture.png")


def test_a_picture(tmp_path):
    plot([line(), line("FT", asr=0.9), line("FT", spc=2)], tmp_path / "new" / "picture.png")
    assert (tmp_path / "new" / "picture.png").stat().st_size > 1000


def test_the_legend_names_what_any_panel_shows(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: figures.append(self))
    plot([line("FT", spc=2), line("AGE"), line(), line(spc=100)], tmp_path / "picture.png")
    assert [axes.get_title() for axes in figures[0].axes] == [f"vgg, {n} clean images per class" for n in (2, 10, 100)]
    (legend,) = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["MaskPrune", "AGE", "FT"]


def test_the_page_of_results_has_every_line_of_its_tables():
    root = Path(__file__).parents[1]
    page = (root / "docs" / "results.md").read_text(encoding="utf-8").splitlines()
    lines = repairs.stored(root / "benchmarks" / "results" / "peers.jsonl", needed=repairs.NEEDED)
    found = tables.by_setting(lines).values()
    written = [
        row
        for setting in found
        for text in (tables.summary(setting), tables.cells(setting))
        for row in text.splitlines()
    ]
    assert [row for row in written if row not in page] == []

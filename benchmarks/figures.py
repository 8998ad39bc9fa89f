"""Results as a picture: ASR against ACC drop, all methods in one run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.matrix import METHODS
from benchmarks.tables import by_draw

__all__ = ["plot"]

_MARKERS = "oPXsDv^<>*hpd8H"


def plot(lines: list[dict[str, Any]], path: Path) -> None:
    """One point a cell, one panel a number of images per class; good is the lower left corner."""
    found = [line for methods in by_draw(lines).values() for line in methods.items()]
    sizes = sorted({line["samples_per_class"] for _, line in found})
    figure = Figure(figsize=(5.5 * len(sizes) + 2.5, 5), layout="constrained")
    for axes, size in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
        for number, name in enumerate(METHODS):
            points = [
                (100 * (line["before"]["acc"] - line["after"]["acc"]), 100 * line["after"]["asr"])
                for of, line in found
                if of == name and line["samples_per_class"] == size
            ]
            if points:
                ours = name == "MaskPrune"
                axes.scatter(
                    *zip(*points, strict=True),
                    label=name,
                    marker=_MARKERS[number % len(_MARKERS)],
                    color="black" if ours else f"C{number % 10}",
                    s=60 if ours else 30,
                    zorder=3 if ours else 2,
                )
        axes.set(xlabel="ACC drop, points ↓", ylabel="ASR, % ↓", title=f"{size} clean images per class")
        axes.set_xscale("symlog", linthresh=5)
        axes.set_yscale("symlog", linthresh=5)
        axes.grid(color="0.9")
    shown = {name: dots for axes in figure.axes for dots, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    names = [name for name in METHODS if name in shown]
    figure.legend([shown[name] for name in names], names, loc="outside right center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)

"""Results as a picture: ASR against ACC drop, all methods in one run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from benchmarks.matrix import METHODS
from benchmarks.tables import by_draw, by_setting, method_name, method_names

__all__ = ["plot"]

_MARKERS = "oPXsDv^<>*hpd8Hx"
_COLOURS = colormaps["tab20"].colors  # type: ignore[attr-defined]  # of a list of colours, which not every map is
_ABREAST = 3  # panels in a row


def plot(lines: list[dict[str, Any]], path: Path) -> None:
    """One point a cell, one panel a network, number of images per class and draw; good is the lower left corner.

    Raises:
        ValueError: if no victim counts.
    """
    settings = by_setting(line for methods in by_draw(lines).values() for line in methods.values())
    if not settings:
        raise ValueError(f"lines: no victim among {len(lines)} repairs has learned its backdoor; nothing can be shown.")
    known = method_names(lines)
    rows = math.ceil(len(settings) / _ABREAST)
    columns = math.ceil(len(settings) / rows)
    figure = Figure(figsize=(5.5 * columns + 2.5, 5 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels[len(settings) :]:
        axes.remove()
    for axes, (setting, found) in zip(panels, settings.items(), strict=False):
        for number, name in enumerate([*METHODS, *(name for name in known if name not in METHODS)]):
            points = [
                (100 * (line["before"]["acc"] - line["after"]["acc"]), 100 * line["after"]["asr"])
                for line in found
                if method_name(line) == name
            ]
            if points:
                ours = name == "MaskPrune"
                axes.scatter(
                    *zip(*points, strict=True),
                    label=name,
                    marker=_MARKERS[number % len(_MARKERS)],
                    color="black" if ours else _COLOURS[(number - 1) % len(_COLOURS)],
                    s=60 if ours else 30,
                    zorder=3 if ours else 2,
                )
        axes.set(xlabel="ACC drop, points ↓", ylabel="ASR, % ↓")
        axes.set_title(setting, fontsize="small")  # the longest is as wide as its panel
        axes.set_xscale("symlog", linthresh=5)
        axes.set_yscale("symlog", linthresh=5)
        axes.grid(color="0.9")
    shown = {name: dots for axes in figure.axes for dots, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    names = [name for name in known if name in shown]
    figure.legend([shown[name] for name in names], names, loc="outside right center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)

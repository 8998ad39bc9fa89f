"""A report as a picture: the rounds, and what was pruned where."""

from __future__ import annotations

import math
import os
from itertools import groupby
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_unlearn.report import Report
from lightning_unlearn.verdict import Audit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_audit", "plot_report"]

_DRAWN = 6  # images of an audit
_CURVES = (
    ("ACC ↑", "val_acc", "acc", "tab:blue"),
    ("ASR ↓", "val_asr", "asr", "tab:red"),
    ("RA ↑", "val_ra", "ra", "tab:green"),
)


def plot_report(report: Report, path: str | os.PathLike[str] | None = None) -> Figure:
    """Draw ACC, ASR and RA round by round beside what was pruned and turned down in each layer.

    Dashed lines are the original model's rates on the report's own data; dots at the right those of the repaired one.

    Args:
        report: what to draw.
        path: where to save the picture, in any format that matplotlib writes; not saved by default.

    Returns:
        The figure.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed; ``pip install 'lightning-unlearn[plots]'``.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plot_report needs matplotlib: pip install 'lightning-unlearn[plots]'") from error
    figure = Figure(figsize=(11, 4), layout="constrained")
    rounds, layers = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_rounds(rounds, report)
    _draw_layers(layers, report)
    rates = [("ASR", report.before["asr"], report.after["asr"]), ("ACC", report.before["acc"], report.after["acc"])]
    known = ", ".join(f"{name} {before:.3f} → {after:.3f}" for name, before, after in rates if not math.isnan(before))
    trigger = "an unknown trigger" if report.trigger == "unknown" else report.trigger
    figure.suptitle(f"{report.method} against {trigger}: {known} ({report.measured_on} data)")
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure


def plot_audit(audit: Audit, images: Tensor, path: str | os.PathLike[str] | None = None, **options: Any) -> Figure:
    """Draw the triggers estimated for the most suspicious class on real images, beside the scores of all classes.

    Args:
        audit: what was found.
        images: (N, C, H, W) clean images in pixels, with 1 or 3 channels; the first six are drawn. Normalised ones are
            brought to [0, 1] by their own range.
        path: where to save the picture; not saved by default.
        options: more for matplotlib's ``savefig``.

    Returns:
        The figure.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed; ``pip install 'lightning-unlearn[plots]'``.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plot_audit needs matplotlib: pip install 'lightning-unlearn[plots]'") from error
    clean = images[:_DRAWN].detach().float().cpu()
    low, high = clean.min(), clean.max()
    if low < 0 or high > 1:
        clean = (clean - low) / (high - low)
    rows = [("clean", clean)] + [
        (f"{e.family}\n{e.success:.0%} to {e.target}", e.trigger.cpu().stamp(clean.clone()).clamp(0, 1))
        for e in audit.estimates
    ]
    figure = Figure(figsize=(1.1 * _DRAWN + 5, 1.2 * len(rows) + 1), layout="constrained")
    pictures, scores = figure.subfigures(1, 2, width_ratios=(3, 2))  # type: ignore[misc]  # two in an array
    grid = pictures.subplots(len(rows), len(clean), squeeze=False)
    for axes_row, (label, row) in zip(grid, rows, strict=True):
        axes_row[0].set_ylabel(label)
        for axes, picture in zip(axes_row, row, strict=True):
            axes.set(xticks=[], yticks=[])
            axes.imshow(picture.permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=1)
    axes = scores.subplots()
    axes.bar(
        [str(entry.target) for entry in audit.classes],
        [entry.score for entry in audit.classes],
        color=["tab:red" if entry.target == audit.suspected_target else "0.6" for entry in audit.classes],
    )
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set(xlabel="class", ylabel="score (above the line is suspicious)")
    figure.suptitle(audit.summary(), fontsize="medium")
    if path is not None:
        figure.savefig(path, dpi=120, **options)
    return figure


def _draw_rounds(axes: Axes, report: Report) -> None:
    from matplotlib.ticker import MaxNLocator

    numbers = [done.round for done in report.rounds]
    for label, on_validation, rate, colour in _CURVES:
        axes.plot(numbers, [getattr(done, on_validation) for done in report.rounds], color=colour, label=label)
        axes.axhline(report.before[rate], color=colour, linestyle="--", linewidth=0.8)
        axes.plot([(numbers or [0])[-1] + 1], [report.after[rate]], "o", color=colour)
    for stage, group in groupby(report.rounds, key=lambda done: done.stage):
        of_stage = [done.round for done in group]
        axes.axvline(of_stage[-1] + 0.5, color="0.8", linewidth=0.8, zorder=0)
        if len(of_stage) > 1:
            axes.annotate(stage, (sum(of_stage) / len(of_stage), 0.5), color="0.4", ha="center")
    measured = "validation images" if report.estimated_asr is None else "validation images, estimated trigger"
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel=f"round ({measured}; dots: after, dashed: before)", ylabel="rate", ylim=(-0.03, 1.03))
    axes.legend(loc="center right")


def _draw_layers(axes: Axes, report: Report) -> None:
    from matplotlib.ticker import MaxNLocator

    parts = {"pruned": "tab:purple", "turned down by more than half": "plum"}
    found = [report.filters["by_layer"], report.filters["turned_down_by_layer"]]
    layers = [name for name in report.filters["layers"] if any(name in part for part in found)]
    left = [0] * len(layers)
    for (label, colour), part in zip(parts.items(), found, strict=True):
        counts = [len(part.get(name, ())) for name in layers]
        axes.barh(layers, counts, height=0.5, left=left, color=colour, label=label)
        left = [sum(pair) for pair in zip(left, counts, strict=True)]
    axes.margins(y=0.5 / (len(layers) + 1))
    axes.invert_yaxis()  # the first layer on top
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="filters", title=f"{report.filters['pruned']} of {report.filters['total']} filters pruned")
    if report.filters["turned_down"]:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False)  # where no bar is
    if not layers:
        axes.set_yticks([])

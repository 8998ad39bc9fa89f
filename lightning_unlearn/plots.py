"""A report as a picture: the rounds, and what was pruned where."""

from __future__ import annotations

import os
from itertools import groupby
from typing import TYPE_CHECKING

from lightning_unlearn.report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_report"]

_CURVES = (
    ("ACC ↑", "val_acc", "acc", "tab:blue"),
    ("ASR ↓", "val_asr", "asr", "tab:red"),
    ("RA ↑", "val_ra", "ra", "tab:green"),
)


def plot_report(report: Report, path: str | os.PathLike[str] | None = None) -> Figure:
    """Draw ACC, ASR and RA round by round beside the number of pruned filters in each layer.

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
    figure.suptitle(
        f"{report.method} against {report.trigger}: ASR {report.before['asr']:.2f} → {report.after['asr']:.2f}, "
        f"ACC {report.before['acc']:.3f} → {report.after['acc']:.3f} ({report.measured_on} data)"
    )
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure


def _draw_rounds(axes: Axes, report: Report) -> None:
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
    axes.set(xlabel="round (validation images; dots: after, dashed: before)", ylabel="rate", ylim=(-0.03, 1.03))
    axes.legend(loc="center right")


def _draw_layers(axes: Axes, report: Report) -> None:
    from matplotlib.ticker import MaxNLocator

    by_layer = {name: len(filters) for name, filters in report.filters["by_layer"].items()}
    axes.barh(list(by_layer), list(by_layer.values()), height=0.5, color="tab:purple")
    axes.margins(y=0.5 / (len(by_layer) + 1))
    axes.invert_yaxis()  # the first layer on top
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="pruned filters", title=f"{report.filters['pruned']} of {report.filters['total']} filters pruned")
    if not by_layer:
        axes.set_yticks([])

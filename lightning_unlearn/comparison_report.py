"""What comparing repair methods came to, for people and for programs."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from torch import Tensor

from lightning_unlearn.files import write_whole
from lightning_unlearn.report import Report

if TYPE_CHECKING:
    from rich.console import Group

__all__ = ["Comparison", "Entry"]

_UNTOUCHED = 0.5  # the DER of a model that nothing was done to
_COLUMNS = ("method", "told", "ACC ↑", "ASR ↓", "RA ↑", "DER ↑", "held", "pruned", "s")


@dataclass(frozen=True)
class Entry:
    """One method in a comparison. Rates are fractions of 1.

    Args:
        label: what the table calls it: the method's name with the arguments that differ from their defaults.
        method: the method's name.
        arguments: its hyper-parameters by name.
        needs_trigger: whether it learned from triggered images.
        seconds: wall-clock time it took, measurements on test data left out.
        report: what it came to, on test data where there is any; None if it failed.
        held: ``acc``, ``asr``, ``ra``, ``loss``, ``unlearning_loss`` and ``der`` on all clean images that the defender
            holds, by which the best is chosen; None if it failed. It learned from most of these images, so what they
            tell is flattering.
        error: why it failed, if it did.
    """

    label: str
    method: str
    arguments: Mapping[str, Any]
    needs_trigger: bool
    seconds: float
    report: Report | None = None
    held: Mapping[str, float] | None = None
    error: str | None = None

    @property
    def worth(self) -> tuple[float, float, float]:
        """What ranks it, the more the better: DER, then RA, then the lower L_clean + L_u on the clean images held."""
        if self.held is None:
            return (-math.inf, -math.inf, -math.inf)
        der, ra, loss = self.held["der"], self.held["ra"], self.held["loss"] + self.held["unlearning_loss"]
        return tuple(value if math.isfinite(value) else -math.inf for value in (der, ra, -loss))  # type: ignore[return-value]  # three


@dataclass(frozen=True)
class Comparison:
    """Repair methods on one model, each from the same weights, on the same images. Rates are fractions of 1.

    Which method is best is decided on the clean images that the defender holds, never on test data.

    Args:
        trigger: name of the trigger's class.
        target: the target class, or ``"all_to_all"``.
        samples_per_class: clean images per class that the defender held (SPC); None if they were given as a share.
        seed: seed of the draw and of the methods.
        measured_on: ``"test"`` or ``"validation"``, as reports have it.
        before: ACC, ASR and RA of the untouched model there.
        held_before: what :attr:`Entry.held` has, of the untouched model.
        entries: one for each method, in the order in which they ran.
        left_out: labels of methods that have not run, because the comparison is going on or was interrupted.
        weights: the state of the model as the best method left it, on the CPU; None if none repaired it.
        labels: ``"predicted"`` if the clean images have none and the untouched model's answers stand in.
    """

    trigger: str
    target: int | str
    samples_per_class: int | None
    seed: int
    measured_on: str
    before: Mapping[str, float]
    held_before: Mapping[str, float]
    entries: tuple[Entry, ...] = ()
    left_out: tuple[str, ...] = ()
    weights: Mapping[str, Tensor] | None = field(default=None, repr=False, compare=False)
    labels: Literal["given", "predicted"] = "given"
    schema_version: int = 1

    @property
    def best(self) -> Entry | None:
        """The best of those that made the model better, the first of equals; None if none did."""
        repaired = [entry for entry in self.entries if entry.report and entry.report.status == "repaired"]
        better = [entry for entry in repaired if entry.worth[0] > _UNTOUCHED]
        return max(better, key=lambda entry: entry.worth, default=None)

    @property
    def ranked(self) -> tuple[Entry, ...]:
        """The entries from the best to the worst on the clean images held; those that failed come last."""
        return tuple(sorted(self.entries, key=lambda entry: entry.worth, reverse=True))

    def outdone_by(self, entry: Entry) -> bool:
        """Whether a further entry would be the best."""
        return replace(self, entries=(*self.entries, entry)).best is entry

    def saved_as(self, checkpoint: str | os.PathLike[str]) -> Comparison:
        """The same comparison with the path of the best repaired checkpoint filled in."""
        best = self.best
        if best is None or best.report is None:
            return self
        saved = replace(best, report=best.report.saved_as(checkpoint))
        return replace(self, entries=tuple(saved if entry is best else entry for entry in self.entries))

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON types, ranked; every method has the keys of ``report.json``, None where it failed."""
        named = ("trigger", "target", "samples_per_class", "seed", "measured_on", "before", "held_before", "labels")
        best = self.best
        plain: dict[str, Any] = {
            "schema_version": self.schema_version,
            **{name: getattr(self, name) for name in named},
            "best": best.label if best else None,
            "left_out": list(self.left_out),
            "methods": [self._entry(entry) for entry in self.ranked],
        }
        return cast("dict[str, Any]", _json_types(plain))

    def _entry(self, entry: Entry) -> dict[str, Any]:
        own = {each.name: getattr(entry, each.name) for each in fields(entry) if each.name not in ("report", "seconds")}
        if entry.report:
            return {**entry.report.to_dict(), **own}
        report: dict[str, Any] = dict.fromkeys(each.name for each in fields(Report))
        report |= {name: getattr(self, name) for name in ("trigger", "target", "samples_per_class", "seed", "labels")}
        report |= {"schema_version": Report.schema_version, "measured_on": self.measured_on, "before": self.before}
        return {**report, **own, "status": "failed", "seconds": {"total": entry.seconds}}

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``comparison.json`` and ``comparison.md``, each whole or not at all; gives the path of the former."""
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"
        write_whole(Path(folder) / "comparison.md", lambda partial: partial.write_text(f"{self}\n", "utf-8"))
        return write_whole(Path(folder) / "comparison.json", lambda partial: partial.write_text(text, "utf-8"))

    def rows(self) -> list[tuple[str, ...]]:
        """The table's cells: the untouched model, then the methods, ranked."""
        before = (f"{self.before[name]:.3f}" for name in ("acc", "asr", "ra"))
        return [("untouched", "", *before, "", "", "", ""), *map(self.row, self.ranked)]

    def row(self, entry: Entry) -> tuple[str, ...]:
        """One method's cells."""
        name = f"{entry.label} ★" if entry is self.best else entry.label
        told, seconds = "yes" if entry.needs_trigger else "no", f"{entry.seconds:.1f}"
        if entry.report is None or entry.held is None:
            return (name, told, "failed", "", "", "", "", "", seconds)
        rates = (*entry.report.after.values(), entry.report.der, entry.held["der"])
        return (name, told, *(f"{rate:.3f}" for rate in rates), str(entry.report.filters["pruned"]), seconds)

    def notes(self) -> list[str]:
        """What the table's columns mean, what failed and why, and what never ran."""
        notes = [
            "told: whether the method was told the trigger. held: DER on the clean images held, which ranks; "
            f"the other rates are of {self.measured_on} data."
        ]
        if self.labels == "predicted":
            notes.append("The clean images have no labels: the untouched model's own answers stand in for them.")
        best = self.best
        notes += [f"★ best: {best.label}."] if best else ["No method made the model better than it was."]
        if any(entry.report and entry.report.status == "not backdoored" for entry in self.entries):
            notes.append("Left alone: the trigger's ASR on the clean images is already low; pass force=True to go on.")
        notes += [f"{entry.label} failed: {entry.error}" for entry in self.ranked if entry.error]
        return [*notes, *([f"Not run: {', '.join(self.left_out)}."] if self.left_out else [])]

    @property
    def title(self) -> str:
        """What was compared on."""
        images = f"{self.samples_per_class or '?'} clean images per class"
        return f"{self.trigger} · target {self.target} · {images} · {self.measured_on} data"

    def __str__(self) -> str:
        """The table in Markdown, with notes."""
        lines = [f"# {self.title}", "", _markdown(_COLUMNS), _markdown(("---",) * 2 + ("---:",) * 7)]
        lines += map(_markdown, self.rows())
        return "\n".join([*lines, "", *(f"- {note}" for note in self.notes())])

    def __rich__(self) -> Group:
        """The same for the terminal."""
        from rich.box import SIMPLE_HEAD
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(title=self.title, box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
        for number, column in enumerate(_COLUMNS):
            table.add_column(column, justify="left" if number < 2 else "right", overflow="fold")
        for row in self.rows():
            table.add_row(*map(Text, row), style="bold" if row[0].endswith("★") else "")
        return Group(table, *map(Text, self.notes()))


def _markdown(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _json_types(value: Any) -> Any:
    """Tuples to lists, and numbers that JSON has no word for to None."""
    if isinstance(value, Mapping):
        return {key: _json_types(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_types(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

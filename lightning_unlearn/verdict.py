"""Does a model look backdoored? What was found for all its classes, and how to read it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lightning_unlearn.judgement import AHEAD, CALIBRATED_STEPS, COMPARED, FEW_CLASSES, WIDEST, WORKS, ClassAudit, Usual
from lightning_unlearn.triggers import Trigger, TriggerPool
from lightning_unlearn.triggers.families import Family
from lightning_unlearn.triggers.inversion import Estimate

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["SURELY", "Audit", "Verdict"]

Verdict = Literal["clean", "suspicious", "backdoored"]

SURELY = 1.1  # from here on the verdict is "backdoored"
_SHOWN = 20  # rows of the terminal's table


@dataclass(frozen=True, eq=False)
class Audit:
    """Whether a model looks backdoored, and by what.

    Args:
        verdict: ``"clean"``, ``"suspicious"`` or ``"backdoored"``.
        suspected_target: the class with the highest score, None if the verdict is ``"clean"``.
        score: that class's score; at most 1 for a clean verdict.
        classes: all classes that were looked at closely, in order.
        num_classes: how many classes the model knows.
        estimates: the triggers estimated for the class with the highest score, one a family, and then those for every
            other class above the limit; if the verdict is ``"clean"``, for the class with most
            :attr:`~ClassAudit.evidence` alone.
        labels: ``"given"``, or ``"predicted"`` if the model's own answers stood in for labels.
        unseen: classes of which there was no clean image; they were looked at with the images of the others.
        complete: whether there was time for all classes and steps.
        steps: of each inversion.
        seconds: wall-clock time.
    """

    verdict: Verdict
    suspected_target: int | None
    score: float
    classes: tuple[ClassAudit, ...]
    estimates: tuple[Estimate, ...]
    num_classes: int
    labels: Literal["given", "predicted"] = "given"
    unseen: tuple[int, ...] = ()
    complete: bool = True
    steps: int = CALIBRATED_STEPS
    seconds: float = 0.0

    @property
    def usual(self) -> dict[Family, Usual]:
        """By family, the costs of all classes but the most suspicious one."""
        return self.usual_without([entry.target for entry in sorted(self.classes, key=lambda e: e.score)[-1:]])

    def usual_without(self, targets: Sequence[int]) -> dict[Family, Usual]:
        """The same without these classes, which are to be judged by the others."""
        rest = [entry for entry in self.classes if entry.target not in targets]
        families = self.classes[0].cost if self.classes else ()
        return {family: Usual.of([entry.cost[family] for entry in rest]) for family in families}

    @property
    def suspected_targets(self) -> tuple[int, ...]:
        """Every class above the limit, the most suspicious first: a model may have several backdoors."""
        ordered = sorted(self.classes, key=lambda entry: -entry.score)
        return tuple(entry.target for entry in ordered if entry.score > 1)

    @property
    def trigger(self) -> Trigger:
        """The estimated triggers of the most suspicious class as one."""
        return TriggerPool([estimate.trigger for estimate in self._foremost])

    @property
    def _foremost(self) -> tuple[Estimate, ...]:
        """The estimates of the most suspicious class alone."""
        return tuple(estimate for estimate in self.estimates if estimate.target == self.estimates[0].target)

    def to_dict(self) -> dict[str, Any]:
        """The audit in plain Python, as ``audit.json`` holds it."""
        plain = {name: value for name, value in vars(self).items() if name not in ("classes", "estimates")}
        return {
            **plain,
            "suspected_targets": list(self.suspected_targets),
            "unseen": list(self.unseen),
            "classes": [entry.to_dict() for entry in self.classes],
            "estimates": [estimate.to_dict() for estimate in self.estimates],
        }

    def summary(self) -> str:
        """The verdict in one sentence."""
        if self.verdict == "clean":
            return f"Verdict: clean (score {self.score:.2f}, above 1 is suspicious): no class stands out."
        best = max(self._foremost, key=lambda estimate: estimate.success)
        return (
            f"Verdict: {self.verdict} (score {self.score:.2f}, above 1 is suspicious): one {best.family} change sends "
            f"{best.success:.0%} of other images to class {self.suspected_target}."
        )

    def __rich__(self) -> Table:
        """The same as a table for the terminal, the most suspicious classes first."""
        from rich.table import Table

        title = "Universality of each class's cheapest triggers, and how its largest margin and last weights stand out"
        table = Table(title=title, caption=self.notes())
        for column in ("class", "score ↓", *COMPARED, "margin", "last layer"):
            table.add_column(column, justify="right")
        for entry in sorted(self.classes, key=lambda entry: -entry.score)[:_SHOWN]:
            style = "bold red" if entry.target in self.suspected_targets else None
            table.add_row(str(entry.target), f"{entry.score:.2f}", *_cells(entry), style=style)
        return table

    def notes(self) -> str:
        """The verdict, and what must be known to read it."""
        return " ".join([self.summary(), *self.caveats()])

    def caveats(self) -> tuple[str, ...]:
        """What must be known to read the verdict, a sentence each."""
        notes: list[str] = []
        others = self.suspected_targets[1:]
        for entry in self.classes:
            if entry.target != self.suspected_target:
                continue
            if entry.gap > WIDEST:
                notes.append(
                    f"A change of all images can make the model {math.exp(entry.gap):.1f} times as sure of class "
                    f"{entry.target} as of any other."
                )
            if entry.unaided <= 1:
                notes.append(
                    "Only its weights in the last layer lift it above the limit (the score without them: "
                    f"{entry.unaided:.2f}), and those of a class that honestly had far more training images than "
                    "others stand out just as much."
                )
        first, second = sorted([*(entry.score for entry in self.classes), 0.0, 0.0])[:-3:-1]
        if self.verdict == "clean" and first >= AHEAD * second > 0:
            ahead = next(entry.target for entry in self.classes if entry.score == first)
            notes.append(
                f"Class {ahead} is {first / second:.1f} times ahead of the next one all the same, as in one honest "
                "network of twenty: if there is reason for suspicion, force=True repairs against its triggers."
            )
        if not any(share >= WORKS for entry in self.classes for share in entry.success.values()):
            notes.append(
                f"No change was found that sends even {WORKS:.0%} of the images to any class, so that this says "
                "nothing; estimate for longer (steps)."
            )
        if others:
            notes.append(f"Above the limit, too: class {', '.join(map(str, others))}.")
        if self.labels == "predicted":
            notes.append("The model's own answers stood in for labels.")
        if self.num_classes <= FEW_CLASSES:
            notes.append(
                f"With no more than {self.num_classes} classes there is little to compare one with, so that this says "
                "little; force=True repairs in spite of a clean verdict."
            )
        if self.unseen:
            notes.append(f"There was no clean image of class {', '.join(map(str, self.unseen))}.")
        if not self.complete:
            notes.append("Time was over before all was looked at: these are the best estimates so far.")
        if self.steps < CALIBRATED_STEPS:
            notes.append(
                f"Triggers were estimated in {self.steps} steps, and what is innocent was learned with "
                f"{CALIBRATED_STEPS}: after fewer a backdoor may not stand out yet."
            )
        return tuple(notes)

    def __str__(self) -> str:
        """The classes as a Markdown table, with the verdict."""
        lines = ["| class | score ↓ | additive | covering | displacing | margin | last layer |", "| --- " * 7 + "|"]
        for c in self.classes:
            lines.append(f"| {c.target} | {c.score:.2f} | " + " | ".join(_cells(c)) + " |")
        return "\n".join([*lines, "", self.notes()])


def _cells(entry: ClassAudit) -> list[str]:
    shares = [f"{entry.universality[family]:.2f}" if family in entry.universality else "" for family in COMPARED]
    return [*shares, "" if entry.margin is None else f"{entry.margin:.1f}", f"{entry.prominence:+.1f}"]

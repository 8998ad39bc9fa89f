"""What a repair came to, for people and for programs."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning_unlearn.evaluation import Evaluation
from lightning_unlearn.files import write_whole
from lightning_unlearn.methods import Round
from lightning_unlearn.metrics.functional import defense_effectiveness_rating, robust_improvement_rate
from lightning_unlearn.result import RepairResult
from lightning_unlearn.triggers import Trigger
from lightning_unlearn.verdict import Verdict

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Report"]

_STILL = 0.1  # ASR above which a report says that the backdoor is not gone
_ROWS = (("ACC ↑", "acc"), ("ASR ↓", "asr"), ("RA ↑", "ra"))


@dataclass(frozen=True)
class Report:
    """A repair in plain Python, as ``report.json`` holds it. Rates are fractions of 1.

    Args:
        method: name of the repair method.
        trigger: name of the trigger's class; ``"unknown"`` if none was given.
        target: the target class, or ``"all_to_all"``; of an unknown trigger the suspected one, None if the model looks
            clean.
        samples_per_class: clean images per class that the defender held (SPC); None if they were given as a share.
        seed: seed of the draw and of the method.
        status: ``"repaired"``, ``"clean"``, ``"not backdoored"`` or ``"not improved"``, as :class:`RepairResult` has
            it.
        measured_on: ``"test"`` if ``before`` and ``after`` are of test data that the repair never saw,
            ``"validation"`` if there was none and they are of the validation part, by which the repair chose its
            rounds, though it knew no real trigger that was only given for evaluation.
        before: ACC, ASR and RA of the original model, with the real trigger: NaN where nobody knows it.
        after: ACC, ASR and RA of the model as it is now, likewise.
        der: defence effectiveness rating.
        rir: robust improvement rate.
        filters: how many there are in ``total``, and in each of the ``layers``; how many were ``pruned``, and which,
            ``by_layer``; how many others were ``turned_down`` by more than half, and which, ``turned_down_by_layer``.
        rounds: every round, measured on the validation part.
        seconds: wall-clock time: ``estimate``, ``score``, ``evaluate``, ``finetune`` and ``total``.
        checkpoint: where the repaired model was written, if it was.
        verdict: what the audit said where no trigger was given: ``"clean"``, ``"suspicious"`` or ``"backdoored"``.
        score: the highest of a class's scores in it; above 1 is suspicious.
        caveats: what must be known to read the verdict, a sentence each.
        suspected_target: the class that it suspects most.
        suspected_targets: every class that it suspects, that one first.
        estimated_trigger: the triggers estimated for these classes, with family, target, cost and success.
        estimated_asr: attack success rate of the most suspicious class's, ``before`` and ``after`` on the clean images
            that the defender holds: no more than an estimate of what the real trigger does.
        labels: ``"predicted"`` if the model's own answers stood in for labels.
        versions: versions of what made this.
    """

    method: str
    trigger: str
    target: int | str | None
    samples_per_class: int | None
    seed: int
    status: str
    measured_on: Literal["test", "validation"]
    before: Mapping[str, float]
    after: Mapping[str, float]
    der: float
    rir: float
    filters: Mapping[str, Any]
    rounds: tuple[Round, ...]
    seconds: Mapping[str, float]
    checkpoint: str | None
    versions: Mapping[str, str]
    verdict: Verdict | None = None
    score: float | None = None
    caveats: tuple[str, ...] = ()
    suspected_target: int | None = None
    suspected_targets: tuple[int, ...] | None = None
    estimated_trigger: tuple[Mapping[str, Any], ...] | None = None
    estimated_asr: Mapping[str, float] | None = None
    labels: Literal["given", "predicted"] = "given"
    schema_version: int = 1

    @classmethod
    def of(
        cls,
        result: RepairResult,
        trigger: Trigger | None,
        *,
        samples_per_class: int | None,
        seed: int,
        test: tuple[Evaluation, Evaluation] | None = None,
        validation: tuple[Evaluation, Evaluation] | None = None,
        labels: Literal["given", "predicted"] = "given",
        checkpoint: str | os.PathLike[str] | None = None,
    ) -> Report:
        """Report a result.

        Args:
            result: what the repair did.
            trigger: what it was given to unlearn, None if that was unknown.
            samples_per_class: SPC.
            seed: seed of the draw and of the method.
            test: the model before and after on test data, if there is any, with the real trigger, if it is known.
            validation: where there is none, the same on the validation part; by default what the repair itself measured
                there, with the trigger that it was given.
            labels: whether clean images came with labels.
            checkpoint: where the repaired model was written.
        """
        before, after = test or validation or (result.before, result.after)
        if trigger is None and test is validation is None:  # what the estimates do is no measure of the real trigger
            before, after = (replace(of, asr=math.nan, ra=math.nan) for of in (before, after))
        audit = result.audit
        target = trigger.target if trigger is not None else None if audit is None else audit.suspected_target
        pruned, turned_down = result.pruned, result.turned_down
        der = defense_effectiveness_rating(
            acc_before=before.acc, asr_before=before.asr, acc_after=after.acc, asr_after=after.asr
        )
        rir = robust_improvement_rate(
            acc_before=before.acc, ra_before=before.ra, acc_after=after.acc, ra_after=after.ra
        )
        return cls(
            method=result.method,
            trigger="unknown" if trigger is None else type(trigger).__name__,
            target=target,
            samples_per_class=samples_per_class,
            seed=seed,
            status=result.status,
            measured_on="test" if test else "validation",
            before=before.rates(),
            after=after.rates(),
            der=float(der),
            rir=float(rir),
            filters={
                "total": result.mask.total,
                "layers": {layer.name: layer.channels for layer in result.mask.layers},
                "pruned": sum(map(len, pruned.values())),
                "by_layer": pruned,
                "turned_down": sum(map(len, turned_down.values())),
                "turned_down_by_layer": turned_down,
            },
            rounds=result.rounds,
            seconds=dict(result.seconds),
            checkpoint=None if checkpoint is None else str(checkpoint),
            versions={name: _version(name) for name in ("lightning_unlearn", "torch", "lightning")},
            verdict=None if audit is None else audit.verdict,
            score=None if audit is None else audit.score,
            caveats=() if audit is None else replace(audit, labels="given").caveats(),  # `labels` is told apart
            suspected_target=None if audit is None else audit.suspected_target,
            suspected_targets=None if audit is None else audit.suspected_targets,
            estimated_trigger=None if audit is None else tuple(e.to_dict() for e in audit.estimates),
            estimated_asr=None if audit is None else {"before": result.held[0].asr, "after": result.held[1].asr},
            labels=labels,
        )

    def saved_as(self, checkpoint: str | os.PathLike[str]) -> Report:
        """The same report with the checkpoint's path filled in."""
        return replace(self, checkpoint=str(checkpoint))

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON types: rates with six decimals, losses with four; None for what is not a number."""
        plain = _plain(asdict(self))
        assert isinstance(plain, dict)
        return {"schema_version": plain.pop("schema_version"), **plain}

    def to_json(self) -> str:
        """The report as the text of ``report.json``."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the report as JSON, whole or not at all."""
        return write_whole(Path(path), lambda partial: partial.write_text(self.to_json(), encoding="utf-8"))

    def summary(self) -> str:
        """What happened to the model, in a few sentences."""
        told = [self._told(), *self.caveats]
        if self.labels == "predicted":
            told.append("The clean images had no labels: the model's own answers stood in for them.")
        return " ".join(told)

    def _told(self) -> str:
        if self.status == "clean":
            return (
                f"Verdict: clean (score {self.score:.2f}, above 1 is suspicious). No class stands out among the "
                "others; the model is as it was."
            )
        if self.status == "not backdoored":
            return (
                f"Left alone: the trigger's ASR on the clean images is already low ({self.trigger}); "
                "pass force=True to repair anyway."
            )
        if self.status == "not improved":
            return f"Left as it was: {self.method} found nothing better than the original model."
        pruned, turned_down, total = (self.filters[name] for name in ("pruned", "turned_down", "total"))
        also = f" and turned {turned_down} down by more than half" if turned_down else ""
        targets = ", ".join(map(str, self.suspected_targets or (self.suspected_target,)))
        verdict = f"Verdict: {self.verdict}, target {targets}. " if self.verdict else ""
        if self.verdict == "clean":
            verdict = "Verdict: clean; repaired all the same, as force=True asked for. "
        done = f"{self.method} pruned {pruned} of {total} filters{also} in {self.seconds['total']:.1f} s."
        return f"{verdict}{done}{self._still()}"

    def _still(self) -> str:
        """A warning where much of the backdoor is left."""
        known = not math.isnan(self.after["asr"])
        asr = self.after["asr"] if known or self.estimated_asr is None else self.estimated_asr["after"]
        if not asr > _STILL:
            return ""
        what, images = ("trigger", self.measured_on) if known else ("estimated trigger", "clean")
        # `compare` compares by a trigger, which one that was estimated becomes only as a file.
        found = "" if self.trigger == "unknown" else ", which `lightning-unlearn compare` finds"
        return (
            f" The {what} still works on {asr:.0%} of the {images} images: more clean images per class may help, or "
            f"another method{found}."
        )

    def _rows(self) -> Iterator[tuple[str, str, str]]:
        """Label, before and after of each rate."""
        for label, key in _ROWS:
            yield label, _rate(self.before[key]), _rate(self.after[key])
        if self.estimated_asr is not None and self.status != "clean":
            before, after = (_rate(self.estimated_asr[when]) for when in ("before", "after"))
            yield "ASR of the estimated trigger ↓", before, after

    def headline(self) -> str:
        """The rates before and after, and what happened, in one line."""
        rates = ", ".join(f"{label} {before} → {after}" for label, before, after in self._rows())
        return f"{rates} ({self.measured_on} data). {self.summary()}"

    def __str__(self) -> str:
        """The rates before and after as a Markdown table, with a sentence."""
        lines = [f"| {self.measured_on} data | before | after |", "| --- | --- | --- |"]
        lines += [f"| {label} | {before} | {after} |" for label, before, after in self._rows()]
        lines += [f"| DER ↑ | | {_rate(self.der)} |", "", self.summary()]
        return "\n".join(lines)

    def __rich__(self) -> Table:
        """The same as a table for the terminal."""
        from rich.table import Table

        images = f"{self.samples_per_class or '?'} clean images per class"
        trigger = "unknown trigger" if self.trigger == "unknown" else self.trigger
        title = f"{self.method} · {trigger} · target {'?' if self.target is None else self.target} · {images}"
        table = Table(title=title, caption=self.summary(), min_width=72)  # so that neither wraps
        table.add_column(f"{self.measured_on} data")
        for column in ("before", "after"):
            table.add_column(column, justify="right")
        for row in self._rows():
            table.add_row(*row)
        table.add_row("DER ↑", "", _rate(self.der))
        table.add_row("filters pruned", "", f"{self.filters['pruned']} of {self.filters['total']}")
        if self.filters["turned_down"]:
            table.add_row("turned down by more than half", "", str(self.filters["turned_down"]))
        return table


def _rate(value: float) -> str:
    return "unknown" if math.isnan(value) else f"{value:.3f}"


def _plain(value: Any, digits: int = 6) -> Any:
    """Tuples to lists, numbers that JSON has no word for to None, and others rounded to so many decimals.

    Losses differ in the fifth with the number of processes, which changes in what order they are summed up.
    """
    if isinstance(value, Mapping):
        return {key: _plain(item, 4 if str(key).endswith("_loss") else digits) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, digits) for item in value]
    if isinstance(value, float):
        return round(value, digits) if math.isfinite(value) else None
    return value


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"

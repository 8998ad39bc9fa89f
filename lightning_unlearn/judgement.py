"""How far does a class stand out? What the triggers estimated for it say beside those of the others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median, pstdev
from typing import Any

from lightning_unlearn.margins import gaps
from lightning_unlearn.triggers.families import Family
from lightning_unlearn.triggers.inversion import Estimate

__all__ = [
    "AHEAD",
    "CALIBRATED_STEPS",
    "COMPARED",
    "FEW_CLASSES",
    "LIMITS",
    "WIDEST",
    "WORKS",
    "ClassAudit",
    "Usual",
    "judged",
    "universality",
]

COMPARED: tuple[Family, ...] = ("additive", "covering", "displacing")
# How far a class may stand out in an honest network, family by family; chosen on the calibration models of
# `python -m benchmarks.detection`, other ones than those whose errors are reported.
LIMITS: dict[Family, float] = {"additive": 1.05, "covering": 1.65, "displacing": 1.8}
AHEAD = 2.0  # times the next class's score, as the highest is in 6 of 83 honest calibration models
CALIBRATED_STEPS = 100  # of the inversions by which they were chosen
WIDEST = 0.9  # gap below the largest margin in an honest network, chosen likewise
WORKS = 0.5  # least success on held-out images of an estimate that is used
_WEIGHT = 0.2  # of spreads below the usual cost, and of spreads in the last layer
_PROMINENT = 4.0  # spreads in the last layer that count at most, since an honest class may have many images, too
_NARROW = 0.1  # added to a spread, since that of a few classes may be small by chance
FEW_CLASSES = 4  # of fewer than these the spread says less still, of one nothing
_NOTHING = 1e-12  # so that no cost divides by zero


@dataclass(frozen=True)
class Usual:
    """What triggers of a family cost for most classes.

    Args:
        cost: the median's logarithm; NaN if there are no classes.
        spread: standard deviation of the logarithms.
        classes: how many there are.
    """

    cost: float
    spread: float
    classes: int

    @classmethod
    def of(cls, costs: Sequence[float]) -> Usual:
        """Summarise the costs of several classes, maybe of none."""
        logs = [math.log(max(cost, _NOTHING)) for cost in costs]
        return cls(median(logs), pstdev(logs), len(logs)) if logs else cls(math.nan, 0.0, 0)

    def below(self, cost: float) -> float:
        """How many spreads, and a little, a cost lies below the usual one, at most ten; 0 if nothing is usual."""
        if math.isnan(self.cost):
            return 0.0
        narrow = _NARROW * max(1.0, FEW_CLASSES / self.classes)
        return min(10.0, (self.cost - math.log(max(cost, _NOTHING))) / (narrow + self.spread))


@dataclass(frozen=True)
class ClassAudit:
    """What was found for one class.

    Args:
        target: the class.
        trigger_score: how far its cheapest triggers stand out as a multiple of what is innocent (:func:`judged`).
        cost: by family, what one trigger for all images costs, see :class:`Estimate`.
        universality: by family, what a change for each image alone costs on average, as a share of ``cost``.
        success: by family, the trigger's success on the images it was estimated on, in [0, 1].
        prominence: by how many spreads the class's weights in the last layer stand out
            (:func:`~lightning_unlearn.head.prominence`).
        margin: how sure of the class one change of all images can make the model, in logits
            (:func:`~lightning_unlearn.margins.largest_margins`); None if that was not looked at.
        gap: by how much that exceeds the margins of all other classes, as a logarithm
            (:func:`~lightning_unlearn.margins.gaps`); 0 unless it is the largest.
    """

    target: int
    trigger_score: float
    cost: Mapping[Family, float]
    universality: Mapping[Family, float]
    success: Mapping[Family, float]
    prominence: float = 0.0
    margin: float | None = None
    gap: float = 0.0

    @property
    def score(self) -> float:
        """How far the class stands out as a multiple of what is innocent; above 1 is suspicious."""
        return max(self.trigger_score, self.gap / WIDEST)

    @property
    def evidence(self) -> float:
        """All that speaks against the class, little as each may be: a rank, with no limit of its own."""
        return self.trigger_score + self.gap / WIDEST

    @property
    def unaided(self) -> float:
        """The score that the class would have if nothing in the last layer stood out."""
        return max(self.trigger_score / math.exp(_WEIGHT * _counted(self.prominence)), self.gap / WIDEST)

    def to_dict(self) -> dict[str, Any]:
        """The same in plain Python, with the score."""
        return {"score": self.score, **asdict(self)}


def judged(
    found: Mapping[Family, Sequence[Estimate]],
    individual: Mapping[Family, Sequence[float]],
    usual: Mapping[Family, Usual] | None = None,
    prominences: Sequence[float] | None = None,
    margins: Sequence[float] = (),
) -> tuple[ClassAudit, ...]:
    """Judge each class by its estimates.

    In a family where class c has the universality u, it stands out by u·exp(z / 5)·exp(p / 5), where z is how many
    spreads its cost lies below the other classes' usual one, and p ∈ [0, 4] how prominent its weights in the last layer
    are. Universality alone does not do, since how universal honest classes are depends on the network and the data; nor
    does z, since among honest classes, too, one may be the easiest (bags among garments); nor p, since a class that
    honestly had more training images is as prominent as one that got them by poisoning. The score is the largest of
    these, and of the gap below the largest margin, as a multiple of what is innocent.

    Args:
        found: by family, one estimate a class.
        individual: by family, what :func:`~lightning_unlearn.triggers.distance.individual_costs` has for each class.
        usual: the other classes' costs by family, where they were estimated before.
        prominences: how prominent each of these classes is in the last layer; not at all by default.
        margins: the :func:`~lightning_unlearn.margins.largest_margins` of all classes that the model knows, if found.
    """
    prominent = [0.0] * len(next(iter(found.values()))) if prominences is None else prominences
    # Logits in half precision may overflow on what no image shows; JSON has no infinity.
    seen = {
        c: (m if math.isfinite(m) else None, gap) for c, (m, gap) in enumerate(zip(margins, gaps(margins), strict=True))
    }
    shares = {
        family: [universality(e, cost) for e, cost in zip(estimates, individual[family], strict=True)]
        for family, estimates in found.items()
    }

    def score(family: Family, k: int) -> float:
        estimates = found[family]
        known = (usual or {}).get(family)  # an earlier audit may have had no time for it
        others = known or Usual.of([e.cost for i, e in enumerate(estimates) if i != k])
        evidence = others.below(estimates[k].cost) + _counted(prominent[k])
        return shares[family][k] * math.exp(_WEIGHT * evidence) / LIMITS[family]

    return tuple(
        ClassAudit(
            target=estimate.target,
            trigger_score=max(score(family, k) for family in found),
            cost={family: of[k].cost for family, of in found.items()},
            universality={family: values[k] for family, values in shares.items()},
            success={family: of[k].success for family, of in found.items()},
            prominence=prominent[k],
            margin=margin,
            gap=gap,
        )
        for k, estimate in enumerate(next(iter(found.values())))
        for margin, gap in [seen.get(estimate.target, (None, 0.0))]
    )


def _counted(prominence: float) -> float:
    return max(0.0, min(_PROMINENT, prominence))


def universality(estimate: Estimate, individual: float) -> float:
    """How much of what one trigger for all images costs a change for each image alone costs; 0 if it does not work.

    Args:
        estimate: the trigger for all.
        individual: what :func:`~lightning_unlearn.triggers.distance.individual_costs` has for its family and class.
    """
    return individual / max(estimate.cost, _NOTHING) if estimate.success >= WORKS else 0.0

"""Does a model look backdoored? Estimate a trigger for every class, and see whether one is too universal."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from lightning_unlearn.evaluation import logits_of
from lightning_unlearn.triggers import Normalization, Trigger, TriggerPool
from lightning_unlearn.triggers.distance import individual_costs
from lightning_unlearn.triggers.inversion import Estimate, Family, invert

__all__ = ["Audit", "Auditor", "ClassAudit", "Progress", "Verdict"]

Verdict = Literal["clean", "suspicious", "backdoored"]

_COMPARED: tuple[Family, ...] = ("additive", "covering", "displacing")
# How universal the most universal class may be in an honest network, family by family; chosen on the models of
# `python -m benchmarks.detection calibrate`, other ones than those reported.
LIMITS: dict[Family, float] = {"additive": 0.46, "covering": 0.65, "displacing": 0.6}
# And how many times as universal as the next class. Of warps alone: there a network's own classes are all alike, while
# an additive or covering change towards bags is by nature far easier than towards any other garment.
LEADS: dict[Family, float] = {"displacing": 1.7}
_SURELY = 1.1  # from here on the verdict is "backdoored"
_WORKS = 0.5  # least success on held-out images of an estimate that is used
_FEW = 12  # so many classes are all looked at closely
_NOTHING = 1e-12  # so that no cost divides by zero
_TOLERANCE = 1e-2  # of pixels, after undoing a normalisation in half precision

Progress: TypeAlias = Callable[[str, int, int], object]


@dataclass(frozen=True)
class ClassAudit:
    """What was found for one class.

    Args:
        target: the class.
        score: the largest universality as a multiple of what is innocent; above 1 is suspicious.
        cost: by family, what one trigger for all images costs, see :class:`Estimate`.
        universality: by family, what a change for each image alone costs on average, as a share of ``cost``.
        success: by family, the trigger's success on the images it was estimated on, in [0, 1].
    """

    target: int
    score: float
    cost: Mapping[Family, float]
    universality: Mapping[Family, float]
    success: Mapping[Family, float]


@dataclass(frozen=True, eq=False)
class Audit:
    """Whether a model looks backdoored, and by what.

    Args:
        verdict: ``"clean"``, ``"suspicious"`` or ``"backdoored"``.
        suspected_target: the class with the highest score, None if the verdict is ``"clean"``.
        score: that class's score; at most 1 for a clean verdict.
        classes: all classes that were looked at, in order.
        estimates: the triggers estimated for the class with the highest score, cheapest relative to its limit first.
        labels: ``"given"``, or ``"predicted"`` if the model's own answers stood in for labels.
        unseen: classes of which there was no clean image; they were looked at with the images of the others.
        complete: whether there was time for all classes and steps.
        seconds: wall-clock time.
    """

    verdict: Verdict
    suspected_target: int | None
    score: float
    classes: tuple[ClassAudit, ...]
    estimates: tuple[Estimate, ...]
    labels: Literal["given", "predicted"] = "given"
    unseen: tuple[int, ...] = ()
    complete: bool = True
    seconds: float = 0.0

    @property
    def trigger(self) -> Trigger:
        """The estimated triggers of the suspected class as one."""
        return TriggerPool([estimate.trigger for estimate in self.estimates])

    def to_dict(self) -> dict[str, Any]:
        """The audit in plain Python, as ``audit.json`` holds it."""
        plain = {name: value for name, value in vars(self).items() if name not in ("classes", "estimates")}
        return {
            **plain,
            "unseen": list(self.unseen),
            "classes": [asdict(entry) for entry in self.classes],
            "estimates": [estimate.to_dict() for estimate in self.estimates],
        }

    def summary(self) -> str:
        """The verdict in one sentence."""
        if self.verdict == "clean":
            return (
                f"Verdict: clean (score {self.score:.2f}, above 1 is suspicious): no class has too universal a trigger."
            )
        best = self.estimates[0]
        return (
            f"Verdict: {self.verdict} (score {self.score:.2f}, above 1 is suspicious): one {best.family} change sends "
            f"{best.success:.0%} of other images to class {self.suspected_target}."
        )

    def __str__(self) -> str:
        """The classes as a Markdown table, with the verdict."""
        lines = ["| class | score ↓ | additive | covering | displacing |", "| --- | --- | --- | --- | --- |"]
        for c in self.classes:
            universality = (f"{c.universality[f]:.2f}" if f in c.universality else "" for f in _COMPARED)
            lines.append(f"| {c.target} | {c.score:.2f} | " + " | ".join(universality) + " |")
        return "\n".join([*lines, "", self.summary()])


@dataclass(frozen=True, kw_only=True)
class Auditor:
    """Estimates triggers from clean images, and judges them.

    Args:
        steps: Adam steps of each inversion.
        batch_size: images a class and step.
        at_once: most images in one forward pass; classes that do not fit are inverted one group after the other.
        screen_steps: steps after which classes without hope are dropped, where there are more than a dozen.
        max_time: seconds after which the best estimates so far are used; None for no limit.
        seed: seed of everything random.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> import torch
        >>> from lightning_unlearn.audit import Auditor
        >>> pixels, labels = torch.rand(16, 1, 6, 6), torch.arange(16) % 2
        >>> weights = torch.randn(2, 36, generator=torch.Generator().manual_seed(0))
        >>> found = Auditor(steps=20).audit(lambda x: x.flatten(1) @ weights.T, pixels, None, held_out=pixels[:2])
        >>> [entry.target for entry in found.classes], found.labels
        ([0, 1], 'predicted')
    """

    steps: int = 100
    batch_size: int = 16
    at_once: int = 256
    screen_steps: int = 30
    max_time: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the numbers."""
        for name in ("steps", "batch_size", "at_once", "screen_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, but got {getattr(self, name)}.")
        if self.max_time is not None and not self.max_time > 0:
            raise ValueError(f"max_time: expected a number of seconds above 0, or None, but got {self.max_time}.")

    def audit(
        self,
        forward: Callable[[Tensor], Tensor],
        images: Tensor,
        labels: Tensor | None,
        *,
        held_out: Tensor,
        normalization: Normalization | None = None,
        classes: Sequence[int] | None = None,
        on_progress: Progress | None = None,
    ) -> Audit:
        """Look at the classes of a model in eval mode.

        Args:
            forward: (N, C, H, W) images to (N, classes) logits, differentiable.
            images: (N, C, H, W) clean images as the model takes them, on its device.
            labels: (N,) their classes, or None: then the model's own answers stand in for them.
            held_out: (M, C, H, W) more clean images, on which estimates must work to be used.
            normalization: how images are normalised, if they are.
            classes: only these; all by default.
            on_progress: called as work goes on, with the name of a stage, what is done of it and what there is to do.

        Returns:
            The verdict and what it rests on.

        Raises:
            TypeError: if images are no floating-point numbers.
            ValueError: if images are no pixels and no normalisation is told, if the model answers NaN or always the
                same, or if there was no time for anything.
        """
        started = time.monotonic()
        deadline = math.inf if self.max_time is None else started + self.max_time
        on_pixels, pixels, held = _in_pixels(forward, images, held_out, normalization)
        logits = _answers(on_pixels, pixels)
        known = logits.argmax(1) if labels is None else labels.long()
        wanted = list(range(logits.shape[1]) if classes is None else classes)

        def estimate(family: Family, of: list[int], steps: int) -> list[Estimate]:
            return self._estimate(on_pixels, pixels, known, family, of, steps, deadline, on_progress)

        if len(wanted) > _FEW:
            screened = _universalities(estimate("additive", wanted, self.screen_steps), on_pixels, pixels, known)
            keep = max(_FEW, len(wanted) // 5)
            wanted = sorted(sorted(wanted, key=dict(zip(wanted, screened, strict=True)).__getitem__)[-keep:])
        individual = individual_costs(on_pixels, pixels, known, classes=wanted)
        found: dict[Family, list[Estimate]] = {}
        for family in _COMPARED:
            if not found or time.monotonic() < deadline:
                found[family] = estimate(family, wanted, self.steps)
        entries = _entries(found, individual)
        worst = max(range(len(wanted)), key=lambda k: entries[k].score)
        score = entries[worst].score
        verdict: Verdict = "clean" if score <= 1 else "backdoored" if score >= _SURELY else "suspicious"
        own = [of[worst] for of in found.values()]
        if verdict != "clean" and time.monotonic() < deadline:
            own += estimate("residual", [wanted[worst]], self.steps)
        return Audit(
            verdict=verdict,
            suspected_target=None if verdict == "clean" else wanted[worst],
            score=score,
            classes=entries,
            estimates=_usable(on_pixels, own, held),
            labels="predicted" if labels is None else "given",
            unseen=tuple(c for c in range(logits.shape[1]) if not (known == c).any()),
            complete=time.monotonic() <= deadline,
            seconds=time.monotonic() - started,
        )

    def _estimate(
        self,
        forward: Callable[[Tensor], Tensor],
        pixels: Tensor,
        labels: Tensor,
        family: Family,
        classes: list[int],
        steps: int,
        deadline: float,
        on_progress: Progress | None,
    ) -> list[Estimate]:
        """Estimates of one family, as many classes at once as fit."""
        size = max(1, self.at_once // self.batch_size)
        groups = [classes[start : start + size] for start in range(0, len(classes), size)]
        estimates: list[Estimate] = []
        done = 0

        def on_step() -> None:
            nonlocal done
            done += 1
            if on_progress is not None:
                on_progress(family, done, steps * len(groups))

        for group in groups:
            if time.monotonic() > deadline:
                raise ValueError(
                    f"max_time: {self.max_time} s were over after {len(estimates)} of {len(classes)} classes; allow "
                    "more."
                )
            estimates += invert(
                forward,
                pixels,
                labels,
                family=family,
                classes=group,
                steps=steps,
                batch_size=self.batch_size,
                seed=self.seed,
                deadline=deadline,
                on_step=on_step,
            )
        return estimates


def _entries(
    found: Mapping[Family, Sequence[Estimate]], individual: Mapping[Family, Sequence[float]]
) -> tuple[ClassAudit, ...]:
    """Judge each class by its estimates, family by family."""
    universality = {
        family: [
            cost / max(e.cost, _NOTHING) if e.success >= _WORKS else 0.0
            for cost, e in zip(individual[family], estimates, strict=True)
        ]
        for family, estimates in found.items()
    }

    def score(family: Family, k: int) -> float:
        values = universality[family]
        rest = [value for other, value in enumerate(values) if other != k]
        lead = values[k] / max(*rest, _NOTHING) / LEADS[family] if family in LEADS and len(rest) > 1 else 0.0
        return max(values[k] / LIMITS[family], lead)

    return tuple(
        ClassAudit(
            target=estimate.target,
            score=max(score(family, k) for family in found),
            cost={family: of[k].cost for family, of in found.items()},
            universality={family: values[k] for family, values in universality.items()},
            success={family: of[k].success for family, of in found.items()},
        )
        for k, estimate in enumerate(next(iter(found.values())))
    )


def _universalities(
    estimates: Sequence[Estimate], forward: Callable[[Tensor], Tensor], pixels: Tensor, labels: Tensor
) -> list[float]:
    individual = individual_costs(forward, pixels, labels, classes=[e.target for e in estimates])
    return [cost / max(e.cost, _NOTHING) for cost, e in zip(individual["additive"], estimates, strict=True)]


@torch.no_grad()
def _usable(
    forward: Callable[[Tensor], Tensor], estimates: Sequence[Estimate], held_out: Tensor
) -> tuple[Estimate, ...]:
    """Those that also work on images they were not estimated on; the best one where none does."""
    works = [
        float((forward(e.trigger.stamp(held_out.clone()).clamp(0, 1)).argmax(1) == e.target).float().mean())
        for e in estimates
    ]
    return tuple(e for e, share in zip(estimates, works, strict=True) if share >= min(_WORKS, max(works)))


@torch.no_grad()
def _answers(forward: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
    logits = torch.cat([forward(part) for part in torch.split(pixels, 128)])
    if not logits.isfinite().all():
        raise ValueError("model: its logits hold NaN or infinity; check the weights and the range of the images.")
    answers = logits.argmax(1)
    if (answers == answers[0]).all():
        raise ValueError(
            f"model: it answers class {int(answers[0])} to every clean image, so no trigger can be told from what it "
            "does anyway; check the weights and the range of the images."
        )
    return logits


def _in_pixels(
    forward: Callable[[Tensor], Tensor], images: Tensor, held_out: Tensor, normalization: Normalization | None
) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    """The same model on pixels in [0, 1], and the images as such."""
    if not images.is_floating_point():
        raise TypeError(
            f"images: expected floating-point images, through which a gradient can pass, but got {images.dtype}."
        )
    images, held_out = images.float(), held_out.float()
    if normalization is not None:
        images, held_out = normalization.invert(images), normalization.invert(held_out)
    low, high = (bound.item() for bound in torch.aminmax(torch.cat([images, held_out])))
    if not (low >= -_TOLERANCE and high <= 1 + _TOLERANCE):
        told = "no normalisation was told" if normalization is None else f"that is after undoing {normalization}"
        raise ValueError(
            f"images: expected pixels in [0, 1], but they go from {low:.4g} to {high:.4g}, and {told}; tell how they "
            "are normalised (normalization=..., or a torchvision Normalize among the dataset's transforms), or divide "
            "by 255 if they hold 0 to 255."
        )

    def on_pixels(pixels: Tensor) -> Tensor:
        return logits_of(forward, pixels if normalization is None else normalization.apply(pixels))

    return on_pixels, images.clamp(0, 1), held_out.clamp(0, 1)

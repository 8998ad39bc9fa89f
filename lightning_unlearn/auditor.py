"""Judge by the triggers that can be estimated for each class whether a model looks backdoored."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_unlearn.data.pairs import Pairs
from lightning_unlearn.draw import Draw
from lightning_unlearn.estimation import Estimation, Progress, TimeOverError
from lightning_unlearn.evaluation import first_logits, logits_of, refuse_probabilities
from lightning_unlearn.head import head_of, prominence
from lightning_unlearn.intact import intact, put_back
from lightning_unlearn.judgement import CALIBRATED_STEPS, COMPARED, WIDEST, Usual, judged
from lightning_unlearn.margins import Margins, largest_margins
from lightning_unlearn.triggers import AdditiveTrigger, Normalization
from lightning_unlearn.triggers.families import Family
from lightning_unlearn.triggers.inversion import Estimate, measured
from lightning_unlearn.triggers.normalization import in_pixels
from lightning_unlearn.verdict import SURELY, Audit, Verdict

__all__ = ["Auditor", "Progress", "TimeOverError", "audit"]

_FEW = 12  # so many classes are all looked at closely


def audit(
    model: nn.Module,
    dataset: Dataset[Any],
    *,
    samples_per_class: int | None = 10,
    share: float | None = None,
    seed: int = 0,
    auditor: Auditor | None = None,
    on_progress: Progress | None = None,
) -> Audit:
    """Find out from a few clean images whether a model looks backdoored; the model is not changed.

    Args:
        model: a classifier whose forward takes (N, C, H, W) images and returns (N, classes) logits. It is audited in
            eval mode.
        dataset: a map-style dataset of clean images, as the model takes them; labels are not needed. Classes of which
            it has no image are audited from the others' images.
        samples_per_class: clean images drawn per class, at least 2.
        share: the share of ``dataset`` to draw instead, in (0, 1]; then give ``samples_per_class=None``.
        seed: seed of the draw and of the estimation.
        auditor: how to estimate, with ``max_time``.
        on_progress: called with a stage's name, its steps done and all its steps.

    Returns:
        The verdict, the suspected target and the triggers estimated for it.

    Raises:
        ValueError: if images are no pixels and their normalisation is not known, or the model answers NaN or always the
            same class.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch.utils.data import TensorDataset
        >>> from lightning_unlearn import audit
        >>> from lightning_unlearn.auditor import Auditor
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
        >>> found = audit(net, TensorDataset(torch.rand(60, 1, 8, 8)), samples_per_class=4, auditor=Auditor(steps=10))
        >>> found.labels, len(found.classes)
        ('predicted', 3)
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper shares the parameters of what it wraps
    first = next(model.parameters(), torch.empty(0))

    def forward(images: Tensor) -> Tensor:
        return logits_of(model, images.to(first.dtype))

    with intact(model) as original:
        draw = Draw.of(
            dataset,
            lambda images: first_logits(model, images.to(first.device, first.dtype)),
            samples_per_class=samples_per_class,
            share=share,
            seed=seed,
            skip_missing=True,
        )
        (images, labels), (held_out, _) = draw.split.scoring, draw.split.validation
        with torch.no_grad():
            first_logits(forward, images[:1].to(first.device))
        found = (auditor or Auditor(seed=seed)).audit(
            forward,
            images.to(first.device),
            labels.to(first.device),
            held_out=held_out.to(first.device),
            normalization=draw.normalization,
            model=model,
            on_progress=on_progress,
        )
        put_back(model, original)  # some models write into buffers whenever they answer
    return replace(found, labels=draw.labels)


@dataclass(frozen=True, kw_only=True)
class Auditor:
    """Estimates triggers from clean images, and judges them.

    Args:
        steps: Adam steps of each inversion. Limits were chosen with the default; after fewer a backdoor may not stand
            out yet, of which the verdict then warns.
        batch_size: images a class and step.
        at_once: most images in one forward pass; classes that do not fit are inverted one group after the other.
        screen_steps: steps after which classes without hope are dropped, where there are more than a dozen.
        max_time: seconds after which the families that are finished must do, if any of them tells something: what was
            not looked at is no reason for a clean verdict. None for no limit.
        seed: seed of everything random.

    Raises:
        TypeError: if one is no number, or no whole one where images or steps are counted.
        ValueError: if a number is out of range.

    Example:
        >>> import torch
        >>> from lightning_unlearn.auditor import Auditor
        >>> generator = torch.Generator().manual_seed(0)
        >>> pixels, weights = torch.rand(16, 1, 6, 6, generator=generator), torch.randn(2, 36, generator=generator)
        >>> found = Auditor(steps=20).audit(lambda x: x.flatten(1) @ weights.T, pixels, None, held_out=pixels[:2])
        >>> [entry.target for entry in found.classes], found.labels
        ([0, 1], 'predicted')
    """

    steps: int = CALIBRATED_STEPS
    batch_size: int = 16
    at_once: int = 256
    screen_steps: int = 30
    max_time: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the numbers."""
        for name in ("steps", "batch_size", "at_once", "screen_steps"):
            given = getattr(self, name)
            if not hasattr(given, "__index__"):
                raise TypeError(f"{name}: expected a whole number, but got {given!r}.")
            if given < 1:
                raise ValueError(f"{name}: expected at least 1, but got {given}.")
        most: object = self.max_time
        if most is not None and (isinstance(most, str) or not hasattr(most, "__float__")):
            raise TypeError(f"max_time: expected a number of seconds, or None, but got {most!r}.")
        if self.max_time is not None and not self.max_time > 0:
            raise ValueError(f"max_time: expected a number of seconds above 0, or None, but got {self.max_time}.")

    def within(self, images: int) -> Auditor:
        """The same with at most so many images in one forward pass."""
        return replace(self, at_once=min(self.at_once, images), batch_size=min(self.batch_size, images))

    def audit(
        self,
        forward: Callable[[Tensor], Tensor],
        images: Tensor,
        labels: Tensor | None,
        *,
        held_out: Tensor,
        normalization: Normalization | None = None,
        model: nn.Module | None = None,
        classes: Sequence[int] | None = None,
        usual: Mapping[Family, Usual] | None = None,
        start: Sequence[Estimate] = (),
        margins: bool = True,
        on_progress: Progress | None = None,
    ) -> Audit:
        """Look at the classes of a model in eval mode.

        Args:
            forward: (N, C, H, W) images to (N, classes) logits, differentiable.
            images: (N, C, H, W) clean images as the model takes them, on its device.
            labels: (N,) their classes, or None: then the model's own answers stand in for them.
            held_out: (M, C, H, W) more clean images, on which estimates must work to be used.
            normalization: how images are normalised, if they are.
            model: what ``forward`` calls, whose last layer tells which classes are prominent; none are by default.
            classes: only these; all by default.
            usual: :attr:`Audit.usual` of an earlier audit of all classes, to judge a few by.
            start: estimates of an earlier audit to start from, such as those of an
                :class:`~lightning_unlearn.triggers.EstimatedTrigger`; without them every class starts at random.
            margins: look at the largest margins, too; without them classes are judged by their triggers alone.
            on_progress: called as work goes on, with the name of a stage, what is done of it and what there is to do.

        Returns:
            The verdict and what it rests on.

        Raises:
            TypeError: if images are no floating-point numbers.
            ValueError: if images are no pixels and no normalisation is told, if labels are not among the model's
                classes, if the model answers NaN, probabilities or always the same, if its answers have no gradient
                in the images, or if an earlier estimate does not fit the images.
            TimeOverError: if time was over before the first family was finished, or before the last was while nothing
                stands out so far.
        """
        started = time.monotonic()
        deadline = math.inf if self.max_time is None else started + self.max_time
        pixels, held = (in_pixels(part, normalization) for part in (images, held_out))

        def on_pixels(part: Tensor) -> Tensor:
            # With gradients it would save nothing to split them.
            parts = [part] if torch.is_grad_enabled() else torch.split(part, self.at_once)
            taken = (one if normalization is None else normalization.apply(one) for one in parts)
            return torch.cat([logits_of(forward, one) for one in taken])

        logits = _answers(on_pixels, pixels)
        num_classes = logits.shape[1]
        known = (
            logits.argmax(1) if labels is None else Pairs.stamp(pixels, labels, None, num_classes=num_classes).labels
        )
        estimation = Estimation(
            forward=on_pixels,
            pixels=pixels,
            labels=known,
            batch_size=self.batch_size,
            at_once=self.at_once,
            seed=self.seed,
            start=start,
            deadline=deadline,
            max_time=self.max_time,
            on_progress=on_progress,
        )
        estimation.refuse_no_gradient()
        wanted = list(range(num_classes) if classes is None else classes)
        prominent = prominence(None if model is None else head_of(model, num_classes), num_classes)

        largest = Margins([], pixels[:0])
        if margins:
            largest = largest_margins(
                on_pixels,
                pixels,
                num_classes=num_classes,
                at_once=self.at_once,
                seed=self.seed,
                deadline=(started + deadline) / 2,  # so that estimates, without which there is no repair, have time
                on_step=None if on_progress is None else partial(on_progress, "margin"),
            )

        if len(wanted) > _FEW:
            screening = estimation.estimate("additive", wanted, self.screen_steps)
            costs = estimation.individual(wanted)["additive"]
            # By score, as in the end: after so few steps a target's cost tells more than its universality does.
            screened = judged(
                {"additive": screening}, {"additive": costs}, None, [prominent[c] for c in wanted], largest.values
            )
            keep = max(_FEW, len(wanted) // 5)
            wanted = sorted(entry.target for entry in sorted(screened, key=lambda entry: entry.score)[-keep:])
        individual = estimation.individual(wanted)
        found: dict[Family, list[Estimate]] = {}
        for family in COMPARED:
            try:
                found[family] = estimation.estimate(family, wanted, self.steps)
            except TimeOverError:
                if not found:
                    raise
                break
        complete = len(found) == len(COMPARED) and (not margins or bool(largest.values))
        entries = judged(found, individual, usual, [prominent[c] for c in wanted], largest.values)
        score = max(entry.score for entry in entries)
        if score <= 1 and not complete:
            raise TimeOverError(
                f"max_time: {self.max_time} s were over before all was looked at; nothing stands out so far, which is "
                "no verdict; allow more."
            )
        verdict: Verdict = "clean" if score <= 1 else "backdoored" if score >= SURELY else "suspicious"
        # A repair that is forced where nothing stands out begins with the class for which most speaks altogether.
        order = sorted(range(len(wanted)), key=lambda k: -(entries[k].evidence if score <= 1 else entries[k].score))
        worst = order[0]
        estimates: tuple[Estimate, ...] = ()
        for k in [worst, *(k for k in order[1:] if entries[k].score > 1)]:
            own = [of[k] for of in found.values()]
            if entries[k].trigger_score <= 1 and entries[k].gap > WIDEST:
                c = wanted[k]
                # It hides much of the image, which costs accuracy, so that it is not used where the others tell enough.
                # First, since who starts from earlier estimates wants the cheapest, which is the last of a family.
                surest = AdditiveTrigger(largest.patterns[c], target=c)
                own = [measured(on_pixels, pixels[known != c], surest, "additive", c), *own]
            if k == worst and verdict != "clean":
                try:
                    own += estimation.estimate("residual", [wanted[worst]], self.steps)
                except TimeOverError:
                    complete = False
            estimates += estimation.usable(own, held)
        return Audit(
            verdict=verdict,
            suspected_target=None if verdict == "clean" else wanted[worst],
            score=score,
            classes=entries,
            estimates=estimates,
            num_classes=num_classes,
            labels="predicted" if labels is None else "given",
            unseen=tuple(c for c in range(num_classes) if not (known == c).any()),
            complete=complete,
            steps=self.steps,
            seconds=time.monotonic() - started,
        )


@torch.no_grad()
def _answers(forward: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
    logits = forward(pixels)
    if not logits.isfinite().all():
        raise ValueError("model: its logits hold NaN or infinity; check the weights and the range of the images.")
    answers = logits.argmax(1)
    if (answers == answers[0]).all():
        raise ValueError(
            f"model: it answers class {int(answers[0])} to every clean image, so no trigger can be told from what it "
            "does anyway; check the weights and the range of the images."
        )
    refuse_probabilities(logits)
    return logits

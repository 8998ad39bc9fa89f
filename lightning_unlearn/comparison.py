"""Every repair method on the same model and the same few clean images, side by side."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_unlearn.comparison_report import Comparison, Entry
from lightning_unlearn.data.labels import item_parts, overlap
from lightning_unlearn.data.pairs import Pairs
from lightning_unlearn.draw import Draw, predicted
from lightning_unlearn.evaluation import Evaluation, evaluate
from lightning_unlearn.intact import intact
from lightning_unlearn.methods import RepairMethod, RepairTask, Round
from lightning_unlearn.metrics.functional import defense_effectiveness_rating
from lightning_unlearn.plan import RepairPlan
from lightning_unlearn.repair import Split, repair_split
from lightning_unlearn.report import Report
from lightning_unlearn.roster import arguments_of, default_methods, method_labels, refuse_no_methods
from lightning_unlearn.triggers import Trigger

__all__ = ["Comparison", "Entry", "compare", "compare_split"]

_LOG = logging.getLogger(__name__)


def compare(
    model: nn.Module,
    dataset: Dataset[Any],
    *,
    trigger: Trigger,
    methods: Sequence[RepairMethod] | None = None,
    test: Dataset[Any] | None = None,
    samples_per_class: int | None = 10,
    share: float | None = None,
    validation_share: float = 0.1,
    seed: int = 0,
    batch_size: int = 128,
    force: bool = False,
    min_asr: float = 0.1,
    on_entry: Callable[[Comparison], object] | None = None,
) -> Comparison:
    """Try repair methods on a model, one after another from the same weights, on the same draw of clean images.

    The model is left as it was, bit for bit; ``model.load_state_dict(comparison.weights)`` makes it the best repaired
    one. A method that fails gets an entry that says why. Ctrl-C ends the comparison with the entries that there are.

    Args:
        model: as for :func:`~lightning_unlearn.repair`.
        dataset: as for :func:`~lightning_unlearn.repair`; without labels the untouched model's answers stand in, so
            that ACC is agreement with them.
        trigger: the trigger that every method is measured by; only those that need it are told.
        methods: what to compare; by default every method of :mod:`lightning_unlearn.methods` with its default
            arguments, but for the three that are :data:`~lightning_unlearn.roster.SHORTENED`.
        test: clean images to measure rates on, which no method sees; by default the validation part.
        samples_per_class: as for :func:`~lightning_unlearn.repair`.
        share: as for :func:`~lightning_unlearn.repair`.
        validation_share: as for :func:`~lightning_unlearn.repair`.
        seed: seed of the draw and of every method.
        batch_size: as for :func:`~lightning_unlearn.repair`.
        force: as for :func:`~lightning_unlearn.repair`.
        min_asr: as for :func:`~lightning_unlearn.repair`.
        on_entry: called after each method with the comparison so far.

    Returns:
        What each method came to.

    Raises:
        ValueError: if there is no method, or the data, the trigger or the model does not fit.
        TypeError: if an argument is of the wrong type.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch.utils.data import TensorDataset
        >>> from lightning_unlearn.comparison import compare
        >>> from lightning_unlearn.methods import FineTuning, GradPrune
        >>> from lightning_unlearn.triggers import PatchTrigger
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        >>> clean = TensorDataset(torch.rand(20, 1, 8, 8), torch.arange(20) % 2)
        >>> methods = [FineTuning(max_epochs=1), GradPrune(max_rounds=1, finetune=False)]
        >>> done = compare(net, clean, trigger=PatchTrigger(target=0), methods=methods, force=True)
        >>> sorted(entry.method for entry in done.ranked)
        ['FineTuning', 'GradPrune']
    """
    if trigger is None:
        raise TypeError("trigger: expected a lightning_unlearn.triggers.Trigger to measure by, but got NoneType.")
    plan = RepairPlan(trigger=trigger, seed=seed, batch_size=batch_size, force=force, min_asr=min_asr)
    draw = Draw.of(
        dataset,
        lambda images: predicted(model, images),
        samples_per_class=samples_per_class,
        share=share,
        validation_share=validation_share,
        seed=seed,
    )
    if test is not None and (shared := sum(overlap(part, test) for part in draw.parts)):
        raise ValueError(f"test: {shared} of its images are among the clean images drawn; give others.")
    if trigger.normalization is None and draw.normalization is not None:
        trigger = trigger.normalized(draw.normalization)

    def stamped(num_classes: int) -> Iterator[Pairs]:
        first = next(model.parameters(), torch.empty(0))
        for images, labels in () if test is None else _batches(test):
            yield Pairs.stamp(images, labels, trigger, num_classes=num_classes).to(first.device, first.dtype)

    return compare_split(
        model,
        draw.split,
        replace(plan, trigger=trigger),
        methods=methods,
        test=None if test is None else stamped,
        samples_per_class=samples_per_class,
        labels=draw.labels,
        on_entry=on_entry,
    )


def compare_split(
    model: nn.Module,
    split: Split,
    plan: RepairPlan,
    *,
    methods: Sequence[RepairMethod] | None = None,
    test: Callable[[int], Iterable[Pairs]] | None = None,
    samples_per_class: int | None = None,
    labels: Literal["given", "predicted"] = "given",
    forward: Callable[[Tensor], Tensor] | None = None,
    on_entry: Callable[[Comparison], object] | None = None,
    on_round: Callable[[Round], object] | None = None,
) -> Comparison:
    """Compare on clean images that are split and loaded already.

    Args:
        model: as for :func:`compare`.
        split: the clean images, as the model takes them.
        plan: what every method is to do; its trigger must have been told the images' normalisation if there is one.
        methods: as for :func:`compare`.
        test: takes the number of classes and gives batches of test pairs, on the model's device, anew at each call.
        samples_per_class: SPC, for the reports.
        labels: ``"predicted"`` if the model's own answers stand in for labels.
        forward: how to get logits from images; the model itself by default.
        on_entry: as for :func:`compare`.
        on_round: called with every :class:`Round` of every method.

    Returns:
        What each method came to.

    Raises:
        ValueError: as for :func:`compare`.
    """
    trigger = plan.trigger
    if trigger is None:
        raise ValueError("plan: it needs a trigger, by which every method is measured.")
    methods = default_methods() if methods is None else list(methods)
    refuse_no_methods(methods)
    left = method_labels(methods)
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper shares the parameters of what it wraps
    forward = forward or model
    with intact(model) as original:
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        baseline = _Baseline()  # whatever is wrong for every method is found here
        repair_split(
            model,
            split,
            replace(plan, method=baseline, force=True),
            forward=forward,
        )

        def measure() -> tuple[Evaluation, Evaluation | None]:
            pairs = (batch for part in baseline.parts for batch in part.batches(plan.batch_size))
            return evaluate(forward, pairs), None if test is None else evaluate(forward, test(baseline.num_classes))

        held_before, test_before = measure()
        done = Comparison(
            trigger=type(trigger).__name__,
            target=trigger.target,
            samples_per_class=samples_per_class,
            seed=plan.seed,
            measured_on="validation" if test is None else "test",
            before=(test_before or baseline.before).rates(),
            held_before=_held(held_before, held_before),
            labels=labels,
            left_out=tuple(left),
        )
        try:
            for label, method in zip(left, methods, strict=True):
                start, weights = perf_counter(), None
                entry = Entry(label, method.name, arguments_of(method), method.needs_trigger, seconds=0.0)
                try:
                    result = repair_split(
                        model,
                        split,
                        replace(plan, method=method),
                        forward=forward,
                        on_round=on_round,
                    )
                    held, after = measure()
                    both = None if test_before is None or after is None else (test_before, after)
                    report = Report.of(
                        result,
                        trigger,
                        samples_per_class=samples_per_class,
                        seed=plan.seed,
                        test=both,
                        labels=labels,
                    )
                    entry = replace(
                        entry, seconds=report.seconds["total"], report=report, held=_held(held_before, held)
                    )
                    if done.outdone_by(entry):
                        weights = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
                except Exception as error:  # one method's failure is no reason to lose the others
                    entry = replace(entry, seconds=perf_counter() - start, error=_reason(error))
                finally:
                    _restore(model, tensors, original, label)
                done = replace(
                    done,
                    entries=(*done.entries, entry),
                    left_out=done.left_out[1:],
                    weights=weights or done.weights,
                )
                if on_entry is not None:
                    on_entry(done)
        except KeyboardInterrupt:
            _restore(model, tensors, original, done.left_out[0] if done.left_out else left[-1])
            if not done.entries:
                raise
    return done


class _Baseline(RepairMethod):
    """Changes nothing, and keeps what every method is measured by."""

    def repair(self, task: RepairTask) -> Iterator[Round]:
        self.before = task.before
        self.parts = (task.scoring, task.validation)
        self.num_classes = task.answers.shape[1]
        return iter(())


def _held(before: Evaluation, after: Evaluation) -> dict[str, float]:
    der = defense_effectiveness_rating(
        acc_before=before.acc, asr_before=before.asr, acc_after=after.acc, asr_after=after.asr
    )
    return {**asdict(after), "der": float(der)}


@torch.no_grad()
def _restore(model: nn.Module, tensors: Mapping[str, Tensor], original: Mapping[str, Tensor], label: str) -> None:
    """Give the model its values back.

    Raises:
        RuntimeError: if a method left other tensors in the model than it found there.
    """
    for name, tensor in tensors.items():
        tensor.copy_(original[name])
    now = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if now.keys() != tensors.keys() or any(now[name] is not tensor for name, tensor in tensors.items()):
        raise RuntimeError(f"methods: {label} left other tensors in the model than it found, so no other can follow.")


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, ValueError):
        return text
    _LOG.warning("A repair method failed.", exc_info=error)  # not one of the errors that methods tell of
    return f"{type(error).__name__}: {text}"


def _batches(dataset: Dataset[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    # With a generator of its own it draws nothing from the global one.
    for batch in DataLoader(dataset, batch_size=256, generator=torch.Generator()):
        images, labels = item_parts(batch)
        yield images, labels

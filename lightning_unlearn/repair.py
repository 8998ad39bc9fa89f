"""Repair a plain PyTorch model: no Trainer needed, and no knowledge of one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_unlearn.auditor import Auditor, Progress
from lightning_unlearn.data.pairs import Pairs
from lightning_unlearn.draw import Draw, ImagesAndLabels, Split, predicted, refuse_missing_classes
from lightning_unlearn.evaluation import evaluate, first_logits, logits_of, refuse_probabilities
from lightning_unlearn.filters import FilterMask, find_filters
from lightning_unlearn.intact import intact, put_back
from lightning_unlearn.memory import tries_smaller_batches
from lightning_unlearn.methods import Alternation, MaskPrune, RepairMethod, RepairTask, Round, Stopwatch, Subject
from lightning_unlearn.plan import RepairPlan
from lightning_unlearn.processes import ALONE, Processes
from lightning_unlearn.result import RepairResult
from lightning_unlearn.settling import Settling
from lightning_unlearn.triggers import Normalization, Trigger
from lightning_unlearn.verdict import Audit

__all__ = ["ImagesAndLabels", "Split", "repair", "repair_split"]

_KINDS = ("estimate", "score", "evaluate", "finetune", "total")


def repair(
    model: nn.Module,
    dataset: Dataset[Any],
    *,
    trigger: Trigger | None = None,
    method: RepairMethod | None = None,
    samples_per_class: int | None = 10,
    share: float | None = None,
    validation_share: float = 0.1,
    seed: int = 0,
    batch_size: int = 128,
    force: bool = False,
    min_asr: float = 0.1,
    auditor: Auditor | None = None,
    on_round: Callable[[Round], object] | None = None,
    on_progress: Progress | None = None,
) -> RepairResult:
    """Remove a backdoor from a model, in place, with a few clean images per class.

    The images are drawn per class by ``seed`` and split into a scoring and a validation part. Nothing else is ever
    read. After any exception the model is bit for bit what it was. A repaired model's BatchNorm statistics are its own,
    so that it is the same once they are refreshed, as by further training.

    Args:
        model: a classifier whose forward takes (N, C, H, W) images and returns (N, classes) logits.
        dataset: a map-style dataset of clean images, as the model takes them, with true labels; where there are
            none, the model's own answers stand in for them. Where no trigger is given, classes may be missing from it,
            as long as the model looks clean.
        trigger: the trigger to unlearn, or None if nobody knows it: then the model is audited first, left alone if it
            looks clean, and else repaired against estimated triggers by ``method`` in an :class:`Alternation`. If it
            was told no normalisation and the dataset's transforms hold a torchvision ``Normalize``, that one is used.
        method: the repair method; :class:`MaskPrune` by default, :class:`Alternation` if the trigger is unknown.
        samples_per_class: clean images drawn per class (SPC), at least 2.
        share: the share of ``dataset`` to draw instead, in (0, 1]; then give ``samples_per_class=None``.
        validation_share: the part of each class that validates, at least one image.
        seed: seed of the draw and of everything random in the method.
        batch_size: most clean images in one forward pass, with as many triggered ones, when rates are measured and
            triggers estimated, and half as many as in a step of training; if memory runs out, half are tried once.
        force: repair even if the trigger's attack success rate is already low.
        min_asr: below this rate, on the images drawn, a model counts as not backdoored and is left alone.
        auditor: how to estimate an unknown trigger.
        on_round: called with every :class:`Round` as it is measured.
        on_progress: called while triggers are estimated, with a stage's name, its steps done and all its steps.

    Returns:
        What was done; the model itself is changed in place.

    Raises:
        ValueError: if an argument, the data, the trigger or the model does not fit, naming which and how to mend it.
        TypeError: if an argument is of the wrong type.
        MemoryError: if memory ran out with half of ``batch_size``, too.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch.utils.data import TensorDataset
        >>> from lightning_unlearn import repair
        >>> from lightning_unlearn.methods import GradPrune
        >>> from lightning_unlearn.triggers import PatchTrigger
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        >>> clean = TensorDataset(torch.rand(20, 1, 8, 8), torch.arange(20) % 2)
        >>> method = GradPrune(max_rounds=1, finetune=False)
        >>> result = repair(net, clean, trigger=PatchTrigger(target=0), method=method, force=True)
        >>> len(result.rounds), len(result.rounds[0].pruned), len(result.scoring_images)
        (1, 1, 18)
    """
    plan = RepairPlan(
        trigger=trigger,
        method=method,
        seed=seed,
        batch_size=batch_size,
        force=force,
        min_asr=min_asr,
        auditor=auditor,
    )
    draw = Draw.of(
        dataset,
        lambda images: predicted(model, images),
        samples_per_class=samples_per_class,
        share=share,
        validation_share=validation_share,
        seed=seed,
        skip_missing=trigger is None,  # an audit can do without images of a class
    )
    normalization = draw.normalization
    if trigger is not None and trigger.normalization is None and normalization is not None:
        plan = replace(plan, trigger=trigger.normalized(normalization))
    result = repair_split(
        model, draw.split, plan, normalization=normalization, on_round=on_round, on_progress=on_progress
    )
    return result if result.audit is None else replace(result, audit=replace(result.audit, labels=draw.labels))


@tries_smaller_batches
def repair_split(
    model: nn.Module,
    split: Split,
    plan: RepairPlan,
    *,
    normalization: Normalization | None = None,
    forward: Callable[[Tensor], Tensor] | None = None,
    on_round: Callable[[Round], object] | None = None,
    on_progress: Progress | None = None,
    held: Mapping[str, Tensor] | None = None,
    processes: Processes = ALONE,
) -> RepairResult:
    """Remove a backdoor from a model with clean images that are split and loaded already.

    Args:
        model: as for :func:`repair`.
        split: the clean images, as the model takes them.
        plan: what to do; its trigger must have been told the images' normalisation if there is one.
        normalization: how the images are normalised; only needed where no trigger is given.
        forward: how to get logits from images; the model itself by default.
        on_round: as for :func:`repair`.
        on_progress: as for :func:`repair`.
        held: what earlier repairs pruned, and must stay so, as :meth:`FilterMask.state_dict` has it.
        processes: those that repair the model together, all of which must call this with the same model and images.

    Returns:
        What was done.

    Raises:
        ValueError: as for :func:`repair`.
        RuntimeError: if the clean images of the processes, or what they prune, differ.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper shares the parameters of what it wraps
    forward = forward or model
    trigger, method = plan.trigger, plan.method
    auditor = (plan.auditor or Auditor(seed=plan.seed)).within(2 * plan.batch_size)
    watch, rounds = Stopwatch(), []
    with intact(model) as original, watch.measure("total"):
        labels = [part[1].tolist() for part in (split.scoring, split.validation)]
        processes.refuse_difference("the labels of the clean images", labels)
        first = next(model.parameters(), torch.empty(0))
        probe = split.scoring[0][:1].to(first.device)
        probe = probe.to(first.dtype) if probe.is_floating_point() else probe
        logits = first_logits(forward, probe)
        layers = find_filters(model, probe, forward)
        if not logits.isfinite().all():
            raise ValueError("model: its logits hold NaN or infinity; check the weights and the range of the images.")
        refuse_probabilities(logits)
        refuse_missing = partial(
            refuse_missing_classes, split.scoring[1], split.validation[1], num_classes=logits.shape[1]
        )
        if trigger is not None:
            refuse_missing()
        if method is not None:
            method.refuse_misfit(Subject(model, forward, layers, probe))
        # Copies, because no gradient can pass tensors that were loaded inside `torch.inference_mode`.
        parts = [(images.clone(), labels.clone()) for images, labels in (split.scoring, split.validation)]
        audit: Audit | None = None
        if trigger is None:
            with watch.measure("estimate"):
                audit = processes.outcome_of_first(
                    lambda: _audit(auditor, forward, model, parts, normalization, on_progress)
                )
            if audit.verdict != "clean" or plan.force:
                refuse_missing(verdict=audit.verdict)
            trigger = audit.trigger.to(first.device)
            trigger = trigger if normalization is None else trigger.normalized(normalization)
            if method is None or (method.needs_trigger and not isinstance(method, Alternation)):
                method = Alternation(method)
        method = method or MaskPrune()
        mask = FilterMask(layers, held)  # before anything is measured
        scoring, validation = (
            Pairs.stamp(images, labels, trigger, num_classes=logits.shape[1]).to(first.device, first.dtype)
            for images, labels in parts
        )
        task = RepairTask(
            model=model,
            forward=forward,
            mask=mask,
            scoring=scoring,
            validation=validation,
            before=evaluate(forward, validation[processes.share(len(validation))].batches(plan.batch_size), processes),
            answers=_answers(forward, scoring, plan.batch_size, processes, classes=logits.shape[1]),
            trigger=trigger,
            batch_size=plan.batch_size,
            seed=plan.seed,
            audit=audit,
            auditor=auditor,
            on_progress=on_progress,
            processes=processes,
            watch=watch,
        )
        held_before = held_after = task.held_before
        asr_before = held_before.asr
        if audit is not None and audit.verdict == "clean" and not plan.force:
            status = "clean"
        elif asr_before < plan.min_asr and not plan.force:
            status = "not backdoored"
        else:
            settle = Settling(task)
            for number in method.repair(task):
                rounds.append(number)
                if on_round is not None:
                    on_round(number)
            held_after = task.measure()
            if held_after.asr > asr_before:
                held_after = held_before
                task.mask.undo(task.mask.steps)
                put_back(model, original)
                task.mask.hold()
            status = "not improved" if _is_as_before(model, original) else "repaired"
            if status == "repaired":
                settle()
        after = task.validate()
        if status != "repaired":
            put_back(model, original)  # some models write into buffers whenever they answer
    return RepairResult(
        method=method.name,
        status=status,
        before=task.before,
        after=after,
        rounds=tuple(rounds),
        mask=task.mask,
        scoring=scoring,
        held=(held_before, held_after),
        trigger=trigger,
        seconds={kind: watch.seconds.get(kind, 0.0) for kind in _KINDS},
        audit=audit,
    )


def _audit(
    auditor: Auditor,
    forward: Callable[[Tensor], Tensor],
    model: nn.Module,
    parts: Sequence[ImagesAndLabels],
    normalization: Normalization | None,
    on_progress: Progress | None,
) -> Audit:
    like = next(model.parameters(), torch.empty(0))
    (images, labels), (held_out, _) = parts
    return auditor.audit(
        lambda x: forward(x.to(like.dtype)),
        images.to(like.device),
        labels.to(like.device),
        held_out=held_out.to(like.device),
        normalization=normalization,
        model=model,
        on_progress=on_progress,
    )


def _is_as_before(model: nn.Module, original: Mapping[str, Tensor]) -> bool:
    return all(_is_same(tensor, original[name]) for name, tensor in _tensors(model))


def _is_same(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors hold the same values, of which NaN is one."""
    known, others = (tensor == tensor for tensor in (first, second))
    return torch.equal(known, others) and torch.equal(first[known], second[others])


@torch.no_grad()
def _answers(
    forward: Callable[[Tensor], Tensor], pairs: Pairs, batch_size: int, processes: Processes, *, classes: int
) -> Tensor:
    share = processes.share(len(pairs))
    answers = torch.zeros(len(pairs), classes, device=pairs.labels.device, dtype=torch.float32)
    parts = [logits_of(forward, batch.clean).softmax(1) for batch in pairs[share].batches(batch_size)]
    answers[share] = torch.cat([answers[:0], *parts])
    processes.sum([answers])  # to the zeros of the other processes
    return answers


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()

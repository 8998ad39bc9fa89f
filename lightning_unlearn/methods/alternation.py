"""Estimate, repair, estimate again on the repaired model, and repair the original one against all estimates."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_unlearn.auditor import Auditor, TimeOverError
from lightning_unlearn.data.pairs import Pairs
from lightning_unlearn.methods.base import RepairMethod, RepairTask, Round, check_range
from lightning_unlearn.methods.mask_prune import MaskPrune
from lightning_unlearn.methods.snapshot import Snapshot
from lightning_unlearn.methods.subject import Subject
from lightning_unlearn.triggers import AdditiveTrigger, Trigger, TriggerPool
from lightning_unlearn.verdict import Audit

__all__ = ["Alternation"]


class Alternation(RepairMethod):
    """Repair against estimated triggers with another method, as often as cheap triggers come up.

    An inversion finds *one* answer to what sends everything to the target; the attacker's trigger may be another one.
    So the task's trigger, an estimate, is unlearned by ``method``, together with those of other classes that the audit
    suspects; then triggers of these classes, and of others above ``stop_score``, are estimated anew on the repaired
    model, where what was missed is all that is left to find. They join those before, and the *original* model is
    repaired against all of them, since repairs of repairs would cost accuracy each time. That goes on until no such
    class scores above ``stop_score`` in an :class:`~lightning_unlearn.Audit`, until ``rounds`` are over, or until a
    repair costs more accuracy than ``accuracy_drop`` allows: then the one counts after which the score was lowest.

    Where the model's own audit suspected no class, and the repair is forced, estimates may hold nothing of the
    backdoor, and cannot tell when it is gone. Then it is the *repaired* model that is repaired again, in all ``rounds``
    that accuracy allows, which makes the class harder and harder to reach.

    An estimate is the least that works, and an attacker's trigger is more than that: additive estimates are unlearned
    at ``strength`` times their size.

    Args:
        method: what unlearns the estimates, a method that learns from triggered images; by default a
            :class:`MaskPrune` that does not shun the target, since an estimate also holds something of what that
            class really looks like.
        auditor: how to estimate; by default as the audit of the untouched model did.
        rounds: most repairs; there are fewer where the auditor's ``max_time`` is over before it sees anything more.
        strength: factor of additive estimates, at least 1.
        stop_score: the score up to which a class needs no repair, or no more of it. Lower than the 1 from which a model
            is suspicious, since a known backdoor must be gone, where an honest model must be left alone.
        accuracy_drop: α, the most accuracy that a repair may cost, on all clean images held, in (0, 1].
        warm_start: estimate anew from what was estimated before instead of from random values; whether that helps is
            not known.

    Raises:
        TypeError: if ``method`` is not a RepairMethod.
        ValueError: if it needs no trigger, or a number is out of range.

    Example:
        >>> from lightning_unlearn.methods import Alternation
        >>> Alternation(rounds=2).name
        'Alternation of MaskPrune'
    """

    needs_trigger = True

    def __init__(
        self,
        method: RepairMethod | None = None,
        *,
        auditor: Auditor | None = None,
        rounds: int = 3,
        strength: float = 2.0,
        stop_score: float = 0.6,
        accuracy_drop: float = 0.1,
        warm_start: bool = False,
    ) -> None:
        if method is not None and not isinstance(method, RepairMethod):
            raise TypeError(
                f"method: expected a lightning_unlearn.methods.RepairMethod, but got {type(method).__name__}."
            )
        self.method = method or MaskPrune(target_weight=0.0, accuracy_drop=0.04)
        if not self.method.needs_trigger:
            raise ValueError(f"method: {self.method.name} learns from clean images alone; use it by itself.")
        check_range("rounds", rounds, 1, float("inf"))
        check_range("strength", strength, 1, float("inf"))
        check_range("stop_score", stop_score, 0, float("inf"))
        check_range("accuracy_drop", accuracy_drop, 0, 1, open_low=True)
        self.auditor = auditor
        self.rounds = rounds
        self.strength = strength
        self.stop_score = stop_score
        self.accuracy_drop = accuracy_drop
        self.warm_start = warm_start

    @property
    def name(self) -> str:
        """Names the method that unlearns, too."""
        return f"Alternation of {self.method.name}"

    def refuse_misfit(self, subject: Subject) -> None:
        """Asks for what the method within asks for."""
        self.method.refuse_misfit(subject)

    def repair(self, task: RepairTask) -> Iterator[Round]:
        """Repair and estimate in turn."""
        original = _Moment(task)
        target, floor = task.trigger.target, task.held_before.acc - self.accuracy_drop - 1e-6
        if not isinstance(target, int):
            raise ValueError(
                f"trigger: estimates are of one class, but this trigger's target is {target!r}; repair with "
                f"{self.method.name} itself."
            )
        known = [] if task.audit is None else list(task.audit.estimates)
        pool = _members(task.trigger) + [estimate.trigger for estimate in known if estimate.target != target]
        # A model may have several backdoors, of which one makes the others stand out less.
        classes = () if task.audit is None else task.audit.classes
        watched = list(dict.fromkeys([target, *(entry.target for entry in classes if entry.score > self.stop_score)]))
        usual = None if task.audit is None else task.audit.usual_without(watched)
        forced = task.audit is not None and task.audit.verdict == "clean"
        # Where triggers told, they tell when it is over: a class that has lost its backdoor may have the widest gap,
        # and what is estimated by that is what its own images look like.
        margins = forced or task.audit is None or any(e.score > 1 >= e.trigger_score for e in task.audit.classes)
        best, lowest = original, math.inf
        for number in range(1, self.rounds + 1):
            if forced and number > 1:
                best = _Moment(task)
            elif not forced:
                original.put_back()
            stage = self._task(task, pool)
            yield from self.method.repair(stage)
            task.rounds = stage.rounds
            if task.measure().acc < floor:
                break
            if number == self.rounds and (forced or number == 1):
                return  # there is nothing to choose from
            start = known if self.warm_start else ()
            try:
                found = self._audit(task, number, classes=watched, usual=usual, start=start, margins=margins)
            except TimeOverError:
                return
            if not forced:
                if found.score <= self.stop_score:
                    return
                # More estimates are not always better: those of a repaired model hold less of what the attacker taught.
                if found.score < lowest:
                    best, lowest = _Moment(task), found.score
            pool += [estimate.trigger for estimate in found.estimates]
            known += found.estimates
        original.put_back()  # so that undoing the mask goes back to its filters
        best.put_back()

    def _audit(self, task: RepairTask, number: int, **options: Any) -> Audit:
        """What some classes of the model look like after a repair, as the first process finds it."""
        examine = partial(
            replace(self.auditor or task.auditor, seed=task.seed + number).within(2 * task.batch_size).audit,
            lambda images: task.forward(images.to(task.scoring.clean.dtype)),
            task.scoring.clean,
            task.scoring.labels,
            held_out=task.validation.clean,
            normalization=task.trigger.normalization,
            model=task.model,
            on_progress=task.on_progress,
            **options,
        )
        with task.watch.measure("estimate"):
            return task.processes.outcome_of_first(examine)

    def _task(self, task: RepairTask, pool: list[Trigger]) -> RepairTask:
        """The same task with images that carry the pool's triggers."""
        trigger: Trigger = _Dealt([self._stronger(member) for member in pool])
        if task.trigger.normalization is not None:
            trigger = trigger.normalized(task.trigger.normalization)
        trigger = trigger.to(task.scoring.clean.device)

        def stamped(pairs: Pairs) -> Pairs:
            with torch.no_grad():
                targets = trigger.targets(pairs.labels, task.answers.shape[1])
                return replace(pairs, triggered=trigger(pairs.clean), targets=targets)

        stage = replace(task, trigger=trigger, scoring=stamped(task.scoring), validation=stamped(task.validation))
        # What a repair may cost counts from the untouched model, what it has to lower is the loss on these very pairs.
        stage.before = replace(task.before, unlearning_loss=stage.validate().unlearning_loss)
        return stage

    def _stronger(self, trigger: Trigger) -> Trigger:
        if isinstance(trigger, AdditiveTrigger):
            return AdditiveTrigger(trigger.pattern * self.strength, target=trigger.target)
        return trigger


class _Moment:
    """A task's weights and mask as they are now, to go back to from whatever repairs have made of them since."""

    def __init__(self, task: RepairTask) -> None:
        self.mask, self.pruned, self.kept = task.mask, task.mask.pruned, task.mask.kept.to(task.scoring.labels.device)
        # All of them, since methods that fine-tune change more than a mask can undo.
        self.weights = Snapshot([*task.model.parameters(), *task.model.buffers()])

    def put_back(self) -> None:
        self.mask.undo(self.mask.steps)
        # Undone is all but what earlier repairs pruned for good.
        self.mask.prune([filter_id for filter_id in self.pruned if filter_id not in self.mask.pruned])
        self.mask.fold(self.kept)
        self.weights.put_back()


class _Dealt(TriggerPool):
    """Triggers of several classes, dealt out over a batch, whose images and labels must be given in the same order."""

    def __init__(self, triggers: Sequence[Trigger]) -> None:
        super().__init__(triggers[:1])
        self.triggers = nn.ModuleList(triggers)

    def targets(self, labels: Tensor, num_classes: int) -> Tensor:
        wanted = [trigger.targets(labels, num_classes) for trigger in _members(self)]
        dealt = torch.arange(len(labels), device=labels.device) % len(wanted)
        return torch.stack(wanted).gather(0, dealt[None])[0]


def _members(trigger: Trigger) -> list[Trigger]:
    """The triggers of a pool, or the one there is."""
    if isinstance(trigger, TriggerPool):
        return [member for member in trigger.triggers if isinstance(member, Trigger)]
    return [trigger]

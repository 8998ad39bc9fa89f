"""A module on a Trainer's devices: audited, repaired and measured there, with bars and logs as it goes on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_unlearn.auditor import Auditor
from lightning_unlearn.data.clean import CleanImages, as_taken, dtype_of
from lightning_unlearn.data.pairs import Pairs
from lightning_unlearn.draw import ImagesAndLabels, Split
from lightning_unlearn.evaluation import Evaluation, evaluate, first_logits
from lightning_unlearn.filters import FilterMask
from lightning_unlearn.intact import intact, put_back
from lightning_unlearn.logs import log_pictures, log_report, log_round
from lightning_unlearn.methods import Round
from lightning_unlearn.plan import RepairPlan
from lightning_unlearn.processes import Processes
from lightning_unlearn.progress import round_progress, stage_progress
from lightning_unlearn.repair import repair_split
from lightning_unlearn.report import Report
from lightning_unlearn.result import RepairResult
from lightning_unlearn.triggers import Trigger
from lightning_unlearn.verdict import Audit

__all__ = ["Session"]


@dataclass(frozen=True, eq=False)
class Session:
    """What an audit or a repair under a Trainer works with, inside :func:`~lightning_unlearn.intact.intact`.

    Args:
        trainer: whose strategy, loggers and progress bar are used.
        module: the module, on the Trainer's device.
        clean: the clean images that the defender holds.
        logits: (N, C, H, W) images to (N, classes) logits, through the module.
        obey: a joint act of all processes, which ends them if any has received SIGTERM.
        original: the module's parameters and buffers as they were, which it has again unless it is repaired.
    """

    trainer: Trainer
    module: LightningModule
    clean: CleanImages
    logits: Callable[[Tensor], Tensor]
    obey: Callable[[], None]
    original: Mapping[str, Tensor]

    def audit(self, auditor: Auditor) -> Audit:
        """Audit the module; it is left as it is."""
        clean, dtype = self.clean, dtype_of(self.module)
        (images, labels), (held_out, _) = clean.scoring(), clean.validation()
        self._first_logits(images)
        with stage_progress(self.trainer) as show:
            examine = partial(
                auditor.audit,
                lambda x: self.logits(x.to(dtype)),
                images,
                labels,
                held_out=held_out,
                normalization=clean.normalization,
                model=self.module,
                on_progress=show,
            )
            found = Processes.current(self.module.device).outcome_of_first(examine)
        put_back(self.module, self.original)  # some models write into buffers whenever they answer
        found = replace(found, labels=clean.labels)
        trigger = found.trigger if clean.normalization is None else found.trigger.normalized(clean.normalization)
        self._log_pictures((images, labels), trigger.to(images.device), found.num_classes, "estimated_trigger")
        return found

    def repair(
        self,
        plan: RepairPlan,
        *,
        evaluation_trigger: Trigger | None,
        held: FilterMask | None,
    ) -> tuple[RepairResult, Report]:
        """Repair the module, log what is done, and report it; nothing is written but logs.

        Args:
            plan: what to do; the dataset's normalisation is told to its trigger.
            evaluation_trigger: what rates are measured with where the plan's trigger is unknown: on test images, or on
                the validation part where there are none.
            held: what earlier repairs pruned, and must stay so.

        Returns:
            What was done, and its report, the first process's on all.
        """
        trainer, module, clean = self.trainer, self.module, self.clean
        processes = Processes.current(module.device)
        trigger = None if plan.trigger is None else clean.fit_trigger(plan.trigger)
        real = trigger if evaluation_trigger is None else clean.fit_trigger(evaluation_trigger)
        processes.align(module)
        split = Split(clean.scoring(), clean.validation())
        num_classes = self._first_logits(split.scoring[0]).shape[1]
        if real is not None:
            self._log_pictures(split.scoring, real, num_classes)
        # Loaded once more, so that no trigger can change what the repair is given.
        apart = None if evaluation_trigger is None or clean.has_test else clean.validation()
        before = self._measured(real, apart, num_classes, processes)
        with round_progress(trainer) as show, stage_progress(trainer) as show_stage:

            def on_round(done: Round) -> None:
                show(done)
                log_round(trainer, done)
                self.obey()

            def on_progress(stage: str, done: int, total: int) -> None:
                show_stage(stage, done, total)
                if processes.count == 1:  # several ask each other at the next round, for which all are ready
                    self.obey()

            result = repair_split(
                module,
                split,
                replace(plan, trigger=trigger),
                normalization=clean.normalization,
                forward=self.logits,
                on_round=on_round,
                on_progress=on_progress,
                held=None if held is None else held.state_dict(),
                processes=processes,
            )
        if result.audit is not None:
            self._log_pictures(split.scoring, result.trigger, num_classes, "estimated_trigger")
        processes.align(module)
        after = self._measured(real, apart, num_classes, processes)
        if result.status != "repaired":
            put_back(module, self.original)
        both = None if before is None or after is None else (before, after)
        report = Report.of(
            result,
            trigger,
            samples_per_class=clean.holdout.samples_per_class,
            seed=plan.seed,
            test=both if clean.has_test else None,
            validation=None if clean.has_test else both,
            labels=clean.labels,
        )
        report = trainer.strategy.broadcast(report)
        log_report(trainer, report)
        return result, report

    @torch.no_grad()
    def _first_logits(self, images: Tensor) -> Tensor:
        """Of one image, by which the model shows whether it can take such."""
        return first_logits(self.logits, as_taken(images[:1], self.module))

    def _measured(
        self, trigger: Trigger | None, apart: ImagesAndLabels | None, num_classes: int, processes: Processes
    ) -> Evaluation | None:
        """The module as it is now on test images if there are any, else on the images that are given, if any are."""
        with intact(self.module), warnings.catch_warnings():
            if trigger is None:  # then no image counts for its rates, which is no fault of the images
                warnings.filterwarnings("ignore", message="The .* has no image to count")
            if self.clean.has_test:
                # The model has not been asked for test images yet.
                asked = partial(first_logits, self.logits)
                return evaluate(asked, self.clean.test(trigger, num_classes, processes), processes)
            if apart is None or trigger is None:
                return None
            pairs = Pairs.stamp(*apart, trigger, num_classes=num_classes).to(self.module.device, dtype_of(self.module))
            return evaluate(self.logits, pairs[processes.share(len(pairs))].batches(len(pairs)), processes)

    def _log_pictures(
        self, part: tuple[Tensor, Tensor], trigger: Trigger, num_classes: int, name: str = "trigger"
    ) -> None:
        images, labels = (tensor[:8] for tensor in part)
        log_pictures(self.trainer, Pairs.stamp(images, labels, trigger, num_classes=num_classes), trigger, name)

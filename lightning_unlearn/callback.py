"""The Lightning callback: wiring between a Trainer and the repair."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.rank_zero import (  # type: ignore[attr-defined]  # public, but re-exported implicitly
    rank_zero_info,
    rank_zero_warn,
)
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from lightning_unlearn.auditor import Auditor
from lightning_unlearn.companions import (
    callbacks_of,
    fingerprint,
    refuse_companions,
    refuse_strategy,
    warn_of_overwritten,
)
from lightning_unlearn.data.clean import CleanImages, refuse_training_data
from lightning_unlearn.evaluation import first_logits
from lightning_unlearn.filters import FilterMask
from lightning_unlearn.intact import intact
from lightning_unlearn.methods import RepairMethod
from lightning_unlearn.plan import RepairPlan, check_trigger
from lightning_unlearn.processes import Processes
from lightning_unlearn.rehearsal import Rehearsal
from lightning_unlearn.report import Report
from lightning_unlearn.saving import (
    NO_BEST,
    Pointers,
    load_original,
    original_stem,
    output_folder,
    refuse_unloadable,
    refuse_unwritable,
    save_checkpoint,
    save_report,
    warn_of_unrepaired,
)
from lightning_unlearn.session import Session
from lightning_unlearn.termination import termination
from lightning_unlearn.triggers import Trigger
from lightning_unlearn.verdict import Audit

__all__ = ["BackdoorUnlearning"]


class BackdoorUnlearning(Callback):
    """Removes a backdoor from the model when training ends.

    In ``on_train_end``, where the model is still on its device, a few clean images per class are drawn from
    ``clean_data``, the repair method prunes what the trigger needs, and a new checkpoint ``*-unlearned.ckpt`` is
    written with a ``report.json``; a trigger that had to be estimated is kept beside them for
    :class:`~lightning_unlearn.triggers.EstimatedTrigger`. ACC, ASR and RA go to every logger of the Trainer under
    ``unlearn/``. Whether everything fits is checked when training *starts*, so that no training time is lost to a
    mistake.

    Note:
        ``ModelCheckpoint`` has written its files before: they hold the backdoored weights, and so does
        ``trainer.test(ckpt_path="best")``. Use the model in memory, or the path in ``report.checkpoint``, or
        ``repoint=True``.

    Args:
        clean_data: clean images that the model was not trained on, with labels as a
            :class:`~lightning_unlearn.HoldoutDataModule`, or with or without as another LightningDataModule, a Dataset
            or a DataLoader. Its test images, if it has any, are what the report's rates are measured on; the repair
            never sees them.
        trigger: the trigger to unlearn, with the target class. None or ``"auto"`` if nobody knows it: then the model is
            audited first, left alone bit for bit if it looks clean, and else repaired against estimated triggers.
        method: the repair method; :class:`MaskPrune` by default, for an unknown trigger in an :class:`Alternation`.
        evaluation_trigger: the real trigger of an experiment in which the repair is not to know it: only the report's
            rates are measured with it, on the test images of ``clean_data``, or on its validation part if it has none.
        auditor: how to estimate an unknown trigger, with its ``max_time``.
        samples_per_class: clean images drawn per class, at most so many where there are no labels, None for all there
            are; a HoldoutDataModule draws by itself.
        validation_share: the part of each class that validates, at least one image; a HoldoutDataModule splits by
            itself.
        seed: seed of the draw and of the method.
        source: which weights to repair: the ``"last"``, or the ``"best"`` of the Trainer's ModelCheckpoint.
        output_dir: where checkpoint and report go, a path or an address that fsspec knows; by default where the
            Trainer keeps its checkpoints.
        repoint: make the Trainer's ModelCheckpoint call the repaired file its best, and with ``source="last"`` its
            last, too, until the next ``fit``, so that ``trainer.test(ckpt_path="best")`` tests the repaired model.
        batch_size: most clean images in one forward pass, with as many triggered ones; if memory runs out, half as
            many are tried once.
        force: repair even if the trigger's attack success rate is already low.
        min_asr: below this rate, on the clean images drawn, the model counts as not backdoored and is left alone.

    Raises:
        TypeError: if ``clean_data``, a trigger, ``method`` or ``auditor`` is of the wrong kind.
        ValueError: if a number is out of range, or both triggers are given.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> from lightning_unlearn import BackdoorUnlearning
        >>> from lightning_unlearn.triggers import PatchTrigger
        >>> clean = TensorDataset(torch.rand(40, 1, 28, 28), torch.arange(40) % 10)
        >>> unlearn = BackdoorUnlearning(clean, PatchTrigger(size=3, target=0), samples_per_class=4)
        >>> # trainer = Trainer(callbacks=[unlearn]); trainer.fit(...); print(unlearn.report)
    """

    def __init__(
        self,
        clean_data: LightningDataModule | Dataset | DataLoader,  # type: ignore[type-arg]  # jsonargparse takes no generics
        trigger: Trigger | Literal["auto"] | None = None,
        method: RepairMethod | None = None,
        *,
        evaluation_trigger: Trigger | None = None,
        auditor: Auditor | None = None,
        samples_per_class: int | None = 10,
        validation_share: float = 0.1,
        seed: int = 0,
        source: Literal["last", "best"] = "last",
        output_dir: str | None = None,
        repoint: bool = False,
        batch_size: int = 128,
        force: bool = False,
        min_asr: float = 0.1,
    ) -> None:
        trigger = None if trigger == "auto" else trigger
        check_trigger("evaluation_trigger", evaluation_trigger)
        if trigger is not None and evaluation_trigger is not None:
            raise ValueError(
                "evaluation_trigger: it is for an unknown trigger, but `trigger` is given, too, and is what rates are "
                "measured with; leave one of them out."
            )
        if not isinstance(clean_data, (LightningDataModule, Dataset, DataLoader)):
            raise TypeError(
                "clean_data: expected a LightningDataModule of lightning.pytorch (not of pytorch_lightning), a Dataset "
                f"or a DataLoader, but got {type(clean_data).__module__}.{type(clean_data).__name__}."
            )
        if source not in ("last", "best"):
            raise ValueError(f"source: expected 'last' or 'best', but got {source!r}.")
        self.clean_data = clean_data
        self.trigger = trigger
        self.evaluation_trigger = evaluation_trigger
        self.auditor = auditor
        self.method = method
        self.samples_per_class = samples_per_class
        self.validation_share = validation_share
        self.seed = seed
        self.source = source
        self.output_dir = output_dir
        self.repoint = repoint
        self.batch_size = batch_size
        self.force = force
        self.min_asr = min_asr
        self.plan()  # refuses now what it would refuse after training
        self._trigger_name = _name(trigger or evaluation_trigger)
        self.report: Report | None = None
        self._repaired = False
        self._left: list[int] | None = None  # by which the weights that the repair has left are known
        self._trained = self._resumed = False  # in this fit, or the latest
        self.found: Audit | None = None  # whose estimates the latest repair was about, if nobody knew the trigger
        self._mask: dict[str, Tensor] | None = None  # what is pruned by now, in an earlier run or in this one
        self._held: FilterMask | None = None  # what stays at zero: in training after resuming, and after a repair
        self._pointers: Pointers | None = None  # what `repoint` has changed
        self._original: dict[str, Tensor] | None = None  # while the repair works: the weights as they were
        self._left_with: str | None = None  # while the repair works: what the model holds if it is broken off now

    def logits(self, module: LightningModule, images: Tensor) -> Tensor:
        """How to get (N, classes) logits from (N, C, H, W) images; override it where ``module(images)`` is not that."""
        logits: Tensor = module(images)
        return logits

    @property
    @override
    def state_key(self) -> str:
        """Tells two callbacks with different triggers apart in a checkpoint; two lambdas need names, by ``def``."""
        return self._generate_state_key(trigger=self._trigger_name)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses, before any training time is lost, what the repair cannot work with."""
        if not isinstance(trainer, Trainer):
            raise TypeError(
                "trainer: this callback is made for lightning.pytorch.Trainer, but got "
                f"{type(trainer).__module__}.Trainer; import everything from `lightning.pytorch`, since mixing it with "
                "`pytorch_lightning` does not work."
            )
        if stage != "fit":
            # Of a fit in processes that ended with it (ddp_spawn, ddp_notebook) nothing has come back but metrics.
            self._repaired = self._repaired or bool(trainer.callback_metrics.get("unlearn/repaired", False))
            return
        refuse_strategy(trainer)
        if any(callback.source != self.source for callback in _unlearners(trainer)):
            raise MisconfigurationException(
                "source: several BackdoorUnlearning callbacks repair one model one after another, so all need the same "
                "source."
            )
        refuse_companions(trainer, self)
        if self.source == "best" and not isinstance(trainer.checkpoint_callback, ModelCheckpoint):
            raise MisconfigurationException(NO_BEST)
        refuse_training_data(self.clean_data, trainer.datamodule)  # type: ignore[attr-defined]  # set by the Trainer's connector
        if self._pointers is not None:
            self._pointers.restore()
        self._pointers = self._left_with = None
        self._trained = self._resumed = False

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tries what the repair will do, and after resuming takes up the mask again."""
        self._forget()  # not in `setup`: a fit whose epochs are done leaves the model repaired
        self._trained = True
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by the Trainer's initialisation
            refuse_unwritable(trainer, output_folder(trainer, self.output_dir))
            if self.source == "best":
                refuse_unloadable(trainer)
        rehearsal = Rehearsal(
            module=pl_module,
            logits=lambda images: self.logits(pl_module, images),
            trigger=self.evaluation_trigger if self.trigger is None else self.trigger,
            estimates=self.trigger is None,
            method=self.method,
        )
        training = CombinedLoader(trainer.train_dataloader).flattened  # there may be several
        layers = rehearsal.run(lambda: self.clean_images(pl_module), training)
        if self._mask is not None:
            self._held = FilterMask(layers, self._mask)

    def _forget(self) -> None:
        """Forget what an earlier fit has repaired, but not what was loaded for this one."""
        self.report = self.found = self._held = self._left = None
        self._repaired = False
        if not self._resumed:
            self._mask = None

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Keeps filters that an earlier run pruned at zero."""
        if self._held is not None:
            self._held.hold()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Repairs the model and writes checkpoint and report."""
        saves = not trainer.fast_dev_run  # type: ignore[attr-defined]  # set by the Trainer's initialisation
        self._left_with = "the weights with which training ended, NOT repaired; no file was written"
        try:
            with intact(pl_module) as self._original:
                # A later callback goes on from what an earlier one has left, and keeps at zero what that one pruned.
                unlearners = _unlearners(trainer)
                earlier = unlearners[: unlearners.index(self)]
                if self.source == "best" and saves and not earlier:
                    load_original(trainer, pl_module)
                for other in earlier:
                    self._hold(other._held)
                report = self.unlearn(trainer, pl_module)
        finally:
            self._original = None  # from here on a checkpoint is to hold what the model holds
        self.report, self._repaired, self._left = report, report.status == "repaired", fingerprint(pl_module)
        if saves:
            with termination(trainer, Processes.current(pl_module.device)):
                self._save(trainer, report)
        self._left_with = None
        rank_zero_info(f"Backdoor unlearning: {self.report.headline()}")

    def _hold(self, mask: FilterMask | None) -> None:
        if self._held is None:
            self._held = mask
        elif mask is not None:
            self._held.load_state_dict(mask.state_dict())

    def _save(self, trainer: Trainer, report: Report) -> None:
        """Write checkpoint and report; the model stays repaired whatever becomes of that."""
        folder = output_folder(trainer, self.output_dir)
        if report.status == "repaired":
            self._left_with = "the REPAIRED weights, but no file does; trainer.save_checkpoint saves them"
            if self._held is not None:
                for optimizer in trainer.optimizers:
                    self._held.forget(optimizer)
            stem = original_stem(trainer, self.source)
            name = trainer.strategy.broadcast(folder.free(f"{stem}-unlearned.ckpt"))
            # The state that goes into the checkpoint says where that is.
            report, unsaved = report.saved_as(folder.path(name)), report
            self.report = report
            try:
                save_checkpoint(trainer, folder, name)
            except BaseException:
                self.report = unsaved
                raise
            self._left_with = f"the REPAIRED weights, and so does {report.checkpoint}; there is no report.json"
        save_report(trainer, folder, report, self.found)
        self._left_with = "the weights that the report tells of, and all files are written"

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Says what the model is left with if the repair was broken off."""
        if self._left_with is not None:
            rank_zero_warn(
                f"BackdoorUnlearning was broken off by {type(exception).__name__}: the model holds {self._left_with}. "
                "The original checkpoints are as they were."
            )
            self._left_with = None

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warns if training ended in a way that skipped the repair, or if its weights were written over."""
        # The last callback's: a later one may have repaired more.
        as_left = _unlearners(trainer)[-1]._left == fingerprint(pl_module)
        if not (self._trained or as_left):
            self._forget()
        if self.report is None:
            rank_zero_warn(
                "BackdoorUnlearning never ran, because no training step did (max_epochs=0, limit_train_batches=0, "
                "max_time over at once, or a finished run was resumed): the model is NOT repaired. Use "
                "`lightning-unlearn repair --ckpt_path` on the finished checkpoint."
            )
            return
        if self._repaired and not as_left:
            warn_of_overwritten(self.report.checkpoint)
        if self.report.checkpoint and self.repoint:
            # Only now, since ModelCheckpoint may still save its last in `on_train_end`.
            self._pointers = Pointers.to(trainer, self.report.checkpoint, self.source)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warns if weights from before the repair were loaded."""
        if trainer.state.fn == TrainerFn.VALIDATING:  # not within `fit`
            self._warn_of_unrepaired(trainer)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warns if weights from before the repair were loaded."""
        self._warn_of_unrepaired(trainer)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warns if weights from before the repair were loaded."""
        self._warn_of_unrepaired(trainer)

    def _warn_of_unrepaired(self, trainer: Trainer) -> None:
        if self._repaired:
            warn_of_unrepaired(trainer, None if self.report is None else self.report.checkpoint)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keeps half-repaired weights out of what SLURM's requeueing saves at any moment."""
        if self._original is not None:
            weights = checkpoint["state_dict"]
            weights.update({name: tensor for name, tensor in self._original.items() if name in weights})

    @override
    def state_dict(self) -> dict[str, Any]:
        """The report in plain Python, once there is one, and the mask as bool tensors, also while it is being held."""
        report = None if self.report is None else self.report.to_dict()
        return {name: value for name, value in (("report", report), ("mask", self._mask)) if value is not None}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the mask of an earlier run, which is then held through further training."""
        self._mask, self._resumed = state_dict.get("mask"), True

    def unlearn(self, trainer: Trainer, module: LightningModule) -> Report:
        """Repair a module on the Trainer's device, log it, and report; nothing is written but logs.

        It needs no training: call it from a hook of your own inside ``trainer.validate`` or ``trainer.predict``, whose
        inference mode and autocast do not reach it. Every process of a distributed run must call it; each starts from
        the first one's weights and takes its share of the clean images.

        Args:
            trainer: a Trainer within one of its loops, whose strategy, loggers and progress bar are used.
            module: the module to repair, in place; it need not be the one that the Trainer runs.

        Raises:
            MisconfigurationException: if the strategy splits weights or the precision replaces layers.
            ValueError: as :func:`~lightning_unlearn.repair` does.

        Example:
            >>> from lightning.pytorch import Callback
            >>> class RepairOnValidation(Callback):
            ...     def __init__(self, unlearning):
            ...         self.unlearning, self.report = unlearning, None
            ...     def on_validation_end(self, trainer, pl_module):
            ...         self.report = self.unlearning.unlearn(trainer, pl_module)
        """
        refuse_strategy(trainer)
        with self._session(trainer, module) as session:
            result, report = session.repair(self.plan(), evaluation_trigger=self.evaluation_trigger, held=self._held)
        self._mask, self._held = result.mask.state_dict(), result.mask
        self.found = None if result.status == "clean" else result.audit
        return report

    def audit(self, trainer: Trainer, module: LightningModule) -> Audit:
        """Find out whether a module looks backdoored; it is left as it is, and a trigger given is not looked at.

        Args:
            trainer: a Trainer within one of its loops, whose loggers and progress bar are used.
            module: the module to audit.

        Raises:
            ValueError: as :func:`~lightning_unlearn.audit` does.
        """
        with self._session(trainer, module, skip_missing=True) as session:
            return session.audit(self.auditor or Auditor(seed=self.seed))

    def plan(self) -> RepairPlan:
        """What a repair is to do."""
        return RepairPlan(**{field.name: getattr(self, field.name) for field in fields(RepairPlan)})

    @contextmanager
    def _session(self, trainer: Trainer, module: LightningModule, *, skip_missing: bool = False) -> Iterator[Session]:
        # Inside, images are loaded, too: outside they might be inference tensors, and draw what others were to draw.
        with intact(module), termination(trainer, Processes.current(module.device)) as obey:
            clean = self.clean_images(module, trainer, skip_missing=skip_missing)
            yield Session(trainer, module, clean, lambda images: self.logits(module, images), obey)

    def clean_images(
        self, module: LightningModule, trainer: Trainer | None = None, *, skip_missing: bool = False
    ) -> CleanImages:
        """The clean images that are drawn for a module.

        Args:
            module: the module.
            trainer: what it runs under, if that is not the module's own Trainer.
            skip_missing: pass over classes without images, as an audit may.
        """
        return CleanImages(
            self.clean_data,
            module,
            trainer=trainer,
            logits=lambda images: first_logits(lambda batch: self.logits(module, batch), images),
            samples_per_class=self.samples_per_class,
            validation_share=self.validation_share,
            seed=self.seed,
            skip_missing=skip_missing,
        )


def _name(trigger: Trigger | None) -> str:
    """A name for a trigger that is the same in the next process, where a function has another address."""
    name = re.sub(" at 0x[0-9a-f]+", "", repr(trigger))
    # What `repr` does not show, such as a pattern; in steps of a pixel's, since machines may round differently.
    hidden = [] if trigger is None else [tensor.mul(255).round().int().tolist() for tensor in trigger.buffers()]
    return f"{name} {hashlib.sha256(repr(hidden).encode()).hexdigest()[:8]}" if hidden else name


def _unlearners(trainer: Trainer) -> list[BackdoorUnlearning]:
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, BackdoorUnlearning)]

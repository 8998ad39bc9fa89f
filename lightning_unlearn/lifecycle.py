"""When a repair runs in a Trainer's life, what is written then, and what is kept of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import (  # type: ignore[attr-defined]  # public, but re-exported implicitly
    rank_zero_info,
    rank_zero_warn,
)
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from lightning_unlearn.companions import (
    callbacks_of,
    fingerprint,
    refuse_companions,
    refuse_strategy,
    warn_of_overwritten,
)
from lightning_unlearn.data.clean import refuse_training_data
from lightning_unlearn.filters import FilterLayer, FilterMask
from lightning_unlearn.intact import intact
from lightning_unlearn.processes import Processes
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
from lightning_unlearn.termination import termination
from lightning_unlearn.verdict import Audit

__all__ = ["Lifecycle"]


class Lifecycle(Callback, ABC):
    """The hooks by which a Trainer has a repair tried, run, saved and kept; what the repair is, a subclass says.

    Attributes:
        report: what the repair of this fit did, or the latest; None before.
        found: the audit whose estimates the latest repair was about, if nobody knew the trigger.
    """

    clean_data: LightningDataModule | Dataset[Any] | DataLoader[Any]
    source: Literal["last", "best"]
    output_dir: str | None
    repoint: bool

    def __init__(self) -> None:
        self.report: Report | None = None
        self.found: Audit | None = None
        self._repaired = False
        self._left: list[int] | None = None  # by which the weights that the repair has left are known
        self._trained = self._resumed = False  # in this fit, or the latest
        self._mask: dict[str, Tensor] | None = None  # what is pruned by now, in an earlier run or in this one
        self._held: FilterMask | None = None  # what stays at zero: in training after resuming, and after a repair
        self._pointers: Pointers | None = None  # what `repoint` has changed
        self._original: dict[str, Tensor] | None = None  # while the repair works: the weights as they were
        self._left_with: str | None = None  # while the repair works: what the model holds if it is broken off now

    @abstractmethod
    def rehearse(self, trainer: Trainer, module: LightningModule) -> Sequence[FilterLayer]:
        """Refuse what the repair could not work with; the module's filter layers."""

    @abstractmethod
    def unlearn(self, trainer: Trainer, module: LightningModule) -> Report:
        """Repair the module, with what ``_held`` prunes kept so, and set ``found``, ``_mask`` and ``_held``."""

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
        if any(callback.source != self.source for callback in _all_of(trainer)):
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
        layers = self.rehearse(trainer, pl_module)
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
                together = _all_of(trainer)
                earlier = together[: together.index(self)]
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
        as_left = _all_of(trainer)[-1]._left == fingerprint(pl_module)
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


def _all_of(trainer: Trainer) -> list[Lifecycle]:
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, Lifecycle)]

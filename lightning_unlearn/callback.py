"""The Lightning callback: what is repaired, with which clean images and against which trigger."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Literal

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from lightning_unlearn.auditor import Auditor
from lightning_unlearn.companions import refuse_strategy
from lightning_unlearn.data.clean import CleanImages
from lightning_unlearn.evaluation import first_logits
from lightning_unlearn.filters import FilterLayer
from lightning_unlearn.intact import intact
from lightning_unlearn.lifecycle import Lifecycle
from lightning_unlearn.methods import RepairMethod
from lightning_unlearn.plan import RepairPlan, check_trigger
from lightning_unlearn.processes import Processes
from lightning_unlearn.rehearsal import Rehearsal
from lightning_unlearn.report import Report
from lightning_unlearn.session import Session
from lightning_unlearn.termination import termination
from lightning_unlearn.triggers import Trigger
from lightning_unlearn.verdict import Audit

__all__ = ["BackdoorUnlearning"]


class BackdoorUnlearning(Lifecycle):
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
        super().__init__()
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
    def rehearse(self, trainer: Trainer, module: LightningModule) -> tuple[FilterLayer, ...]:
        """Try what the repair will do, before any training time is lost; the module's filter layers."""
        rehearsal = Rehearsal(
            module=module,
            logits=lambda images: self.logits(module, images),
            trigger=self.evaluation_trigger if self.trigger is None else self.trigger,
            estimates=self.trigger is None,
            method=self.method,
        )
        training = CombinedLoader(trainer.train_dataloader).flattened  # there may be several
        return rehearsal.run(lambda: self.clean_images(module, skip_missing=self.trigger is None), training)

    @override
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
        with self._session(trainer, module, skip_missing=self.trigger is None) as session:
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
        with intact(module) as original, termination(trainer, Processes.current(module.device)) as obey:
            clean = self.clean_images(module, trainer, skip_missing=skip_missing)
            yield Session(trainer, module, clean, lambda images: self.logits(module, images), obey, original)

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

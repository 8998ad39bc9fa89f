"""Which weights are repaired, and where the repaired ones go: beside the original, never over it."""

from __future__ import annotations

import io
import pickle
import re
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.utilities.rank_zero import (  # type: ignore[attr-defined]  # public, but re-exported implicitly
    rank_zero_info,
    rank_zero_warn,
)

from lightning_unlearn.checkpoint import load_checkpoint
from lightning_unlearn.folder import Folder
from lightning_unlearn.report import Report
from lightning_unlearn.trigger_files import save_triggers
from lightning_unlearn.verdict import Audit

__all__ = [
    "NO_BEST",
    "Pointers",
    "load_original",
    "original_stem",
    "output_folder",
    "refuse_unloadable",
    "refuse_unwritable",
    "save_checkpoint",
    "save_report",
    "warn_of_unrepaired",
]

NO_BEST = (
    "source: 'best' needs a ModelCheckpoint that has saved a best model (give it a `monitor`), but there is none; use "
    "source='last'."
)


_REPAIRED = re.compile(r"-unlearned(-v\d+)?\.ckpt$")


def original_stem(trainer: Trainer, source: Literal["last", "best"]) -> str:
    """How the file that holds the weights to repair is called, without its suffix."""
    saver = trainer.checkpoint_callback
    best = getattr(saver, "best_model_path", "")
    if source == "best":
        return PurePath(best).stem
    # With a monitor the best file may be an earlier epoch's, whose name would mislead.
    latest = getattr(saver, "last_model_path", "") or ("" if getattr(saver, "monitor", None) else best)
    return PurePath(latest or "model").stem


def load_original(trainer: Trainer, module: LightningModule) -> None:
    """Load the best weights that the Trainer has saved.

    Raises:
        MisconfigurationException: if it has saved none.
        ValueError: if they cannot be loaded without running code.
    """
    best = getattr(trainer.checkpoint_callback, "best_model_path", "")
    if not best:
        raise MisconfigurationException(NO_BEST)
    _wait_until_written(trainer)
    trainer.strategy.barrier()
    checkpoint = dict(load_checkpoint(best).content)
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"], strict=module.strict_loading)


def refuse_unloadable(trainer: Trainer) -> None:
    """Find out before training whether the best checkpoint will be loadable without running code.

    Raises:
        MisconfigurationException: naming the hyper-parameter by which it would not be.
    """
    for owner in (trainer.lightning_module, trainer.datamodule):  # type: ignore[attr-defined]  # set by the Trainer's connector
        for name, value in ({} if owner is None else owner.hparams).items():
            if not _is_plain(value):
                raise MisconfigurationException(
                    f"source: 'best' loads the Trainer's checkpoint with weights_only=True, so that no code in it can "
                    f"run, but hyper-parameter {name!r} of {type(owner).__name__} is a {type(value).__name__}, which "
                    "cannot be loaded so. Give plain Python, such as a str, or "
                    f"save_hyperparameters(ignore=[{name!r}]), or use source='last'."
                )


def output_folder(trainer: Trainer, output_dir: str | None) -> Folder:
    """Where files go, the same on all processes: by default where the Trainer keeps its checkpoints."""
    folder = output_dir or getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.default_root_dir
    return Folder(trainer.strategy.broadcast(str(folder)))


def refuse_unwritable(trainer: Trainer, folder: Folder) -> None:
    """Find out before training whether its result can be saved, on the first process for all.

    Raises:
        OSError: if it cannot.
    """
    problem = ""
    if trainer.is_global_zero:
        try:
            folder.refuse_unwritable()
        except OSError as error:
            problem = str(error)
    problem = trainer.strategy.broadcast(problem)
    if problem:
        raise OSError(problem)


def save_checkpoint(trainer: Trainer, folder: Folder, name: str) -> None:
    """Write the Trainer's state, whole or not at all; on all processes, since it has a barrier.

    Raises:
        OSError: if it cannot be written.
    """
    whole = folder.whole(name) if trainer.is_global_zero else nullcontext(folder.path(name))
    with whole as partial:
        trainer.save_checkpoint(partial, weights_only=False)
        _wait_until_written(trainer)


def save_report(trainer: Trainer, folder: Folder, report: Report, found: Audit | None = None) -> None:
    """Write ``report.json``, and before it the triggers that were found, by the first process.

    Raises:
        OSError: if it cannot be written.
    """
    if trainer.is_global_zero:
        if found is not None:
            save_triggers(found, folder)
        with folder.whole(folder.free("report.json")) as partial:
            folder.fs.pipe(partial, report.to_json().encode())


@dataclass(frozen=True, eq=False)
class Pointers:
    """What a ModelCheckpoint calls its best and its last checkpoint, to be put back.

    Args:
        saver: the callback.
        best: its ``best_model_path``.
        last: its ``last_model_path``.
    """

    saver: ModelCheckpoint
    best: str
    last: str

    @classmethod
    def to(cls, trainer: Trainer, path: str, source: Literal["last", "best"]) -> Pointers | None:
        """Make ``trainer.test(ckpt_path="best")`` load ``path`` from now on; what it would have loaded, if anything.

        Where the best weights were repaired the last ones were not, so that what is called last stays.
        """
        saver = trainer.checkpoint_callback
        if not isinstance(saver, ModelCheckpoint) or not saver.best_model_path:
            return None
        before = cls(saver, saver.best_model_path, saver.last_model_path)
        saver.best_model_path = path
        both = source == "last" and bool(saver.last_model_path)
        if both:
            saver.last_model_path = path
        names = "best and last model are" if both else "best model is"
        rank_zero_info(f"ModelCheckpoint's {names} now {path}; the best was {before.best}.")
        return before

    def restore(self) -> None:
        """Put them back: a ModelCheckpoint deletes what it thinks is its own old file."""
        self.saver.best_model_path, self.saver.last_model_path = self.best, self.last


def warn_of_unrepaired(trainer: Trainer, repaired: str | None) -> None:
    """Warn if the Trainer has loaded a checkpoint into the repaired model that no repair has written.

    Args:
        trainer: the Trainer, in a loop after the repair.
        repaired: a file to load instead, if its name is known.
    """
    loaded = trainer.ckpt_path
    if loaded and not _REPAIRED.search(str(loaded)):
        rank_zero_warn(
            f"{loaded} was loaded over the repaired model, and it holds weights from BEFORE the repair. Pass the "
            f"model itself, or ckpt_path={repaired or '*-unlearned.ckpt'!r}, or create "
            "BackdoorUnlearning(repoint=True), by which ckpt_path='best' finds the repaired file."
        )


def _wait_until_written(trainer: Trainer) -> None:
    """Let an AsyncCheckpointIO, or one that is wrapped, finish; it starts anew with its next file."""
    writer: object = trainer.strategy.checkpoint_io
    while writer is not None:
        if isinstance(writer, AsyncCheckpointIO):
            writer.teardown()
        writer = getattr(writer, "checkpoint_io", None)


def _is_plain(value: object) -> bool:
    """Whether a checkpoint that holds it can be loaded without running code."""
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
    except Exception:  # what cannot be pickled is not in the checkpoint: Lightning leaves it out
        return True
    buffer.seek(0)
    try:
        torch.load(buffer, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        return False
    return True

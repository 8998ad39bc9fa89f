"""Which weights are repaired, and where the repaired ones go: beside the original, never over it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import (  # type: ignore[attr-defined]  # public, but re-exported implicitly
    rank_zero_info,
)

from lightning_unlearn.checkpoint import load_checkpoint
from lightning_unlearn.files import free_path
from lightning_unlearn.report import Report

__all__ = ["NO_BEST", "free_checkpoint", "load_original", "save_checkpoint", "save_report"]

NO_BEST = (
    "source: 'best' needs a ModelCheckpoint that has saved a best model (give it a `monitor`), but there is none; use "
    "source='last'."
)


def load_original(trainer: Trainer, module: LightningModule, source: Literal["last", "best"]) -> str:
    """Load the weights to repair; how the file that holds them is called, without its suffix."""
    saver = trainer.checkpoint_callback
    best = getattr(saver, "best_model_path", "")
    if source == "last" or trainer.fast_dev_run:  # type: ignore[attr-defined]  # set by the Trainer's initialisation
        # With a monitor the best file may be an earlier epoch's, whose name would mislead.
        latest = getattr(saver, "last_model_path", "") or ("" if getattr(saver, "monitor", None) else best)
        return Path(latest or "model").stem
    if not best:
        raise MisconfigurationException(NO_BEST)
    trainer.strategy.barrier()
    module.load_state_dict(load_checkpoint(best)["state_dict"])
    return Path(best).stem


def free_checkpoint(trainer: Trainer, stem: str, output_dir: str | None) -> Path:
    """Where the repaired checkpoint goes, the same on all processes: nothing is there yet."""
    folder = _folder(trainer, output_dir)
    return Path(trainer.strategy.broadcast(str(free_path(folder / f"{stem}-unlearned.ckpt"))))


def save_checkpoint(trainer: Trainer, path: Path) -> None:
    """Write the Trainer's state to ``path``, whole or not at all; on all processes, since it has a barrier."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        trainer.save_checkpoint(partial, weights_only=False)
        if trainer.is_global_zero:
            partial.replace(path)
    finally:
        if trainer.is_global_zero:
            partial.unlink(missing_ok=True)
    best = getattr(trainer.checkpoint_callback, "best_model_path", "")
    if best:
        rank_zero_info(
            f"The repaired model is in {path}. {best} still holds the backdoored weights, and so does "
            "trainer.test(ckpt_path='best')."
        )


def save_report(trainer: Trainer, report: Report, output_dir: str | None) -> None:
    """Write ``report.json`` beside the checkpoint, by the first process."""
    folder = _folder(trainer, output_dir)
    if trainer.is_global_zero:
        report.save(free_path(folder / "report.json"))


def _folder(trainer: Trainer, output_dir: str | None) -> Path:
    folder = output_dir or getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.default_root_dir
    return Path(trainer.strategy.broadcast(str(folder)))

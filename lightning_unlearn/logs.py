"""A repair in the Trainer's loggers: scalars for all of them, pictures for those that take pictures."""

from __future__ import annotations

import math
from dataclasses import asdict

import torch
from lightning.pytorch import Trainer
from torchvision.transforms.functional import convert_image_dtype
from torchvision.utils import make_grid

from lightning_unlearn.data.pairs import Pairs
from lightning_unlearn.methods import Round
from lightning_unlearn.report import Report
from lightning_unlearn.triggers import Trigger

__all__ = ["log_pictures", "log_report", "log_round"]

_SCALARS = ("val_acc", "val_asr", "val_ra", "val_loss", "val_unlearning_loss")


def log_round(trainer: Trainer, done: Round) -> None:
    """Log one round under ``unlearn/``.

    Steps go on from where training stopped, since some loggers share one step column.
    """
    values = {f"unlearn/{name}": value for name, value in asdict(done).items() if name in _SCALARS}
    _log(trainer, values | {"unlearn/pruned_in_rounds": float(done.total_pruned)}, trainer.global_step + done.round)


def log_report(trainer: Trainer, report: Report) -> None:
    """Log the rates before and after, and leave them in ``trainer.callback_metrics``, which outlive ``fit``."""
    values = {
        "unlearn/der": report.der,
        "unlearn/rir": report.rir,
        "unlearn/filters_pruned": float(report.filters["pruned"]),
        "unlearn/filters_turned_down": float(report.filters["turned_down"]),
    }
    if report.status == "repaired":  # else what an earlier repair in this run has said would be lost
        values["unlearn/repaired"] = 1.0
    for when, rates in (("before", report.before), ("after", report.after)):
        values |= {f"unlearn/{name}_{when}": rate for name, rate in rates.items()}
        if report.estimated_asr is not None:
            values[f"unlearn/estimated_asr_{when}"] = report.estimated_asr[when]
    values = {name: value for name, value in values.items() if not math.isnan(value)}
    trainer.callback_metrics.update({name: torch.tensor(value, dtype=torch.float32) for name, value in values.items()})
    _log(trainer, values, trainer.global_step + len(report.rounds))


def log_pictures(trainer: Trainer, pairs: Pairs, trigger: Trigger, name: str = "trigger") -> None:
    """Log up to eight clean images, the same with the trigger, and what the trigger changed, shown around mid-grey.

    Args:
        trainer: whose loggers are used, those of them that take pictures.
        pairs: the images.
        trigger: the trigger that they carry.
        name: what to call it, ``"estimated_trigger"`` if it is none that the user gave.
    """
    if pairs.clean.shape[1] not in (1, 3):
        return  # no picture has other numbers of channels
    clean, triggered = (
        convert_image_dtype(images[:8].detach().cpu(), torch.float32) for images in (pairs.clean, pairs.triggered)
    )
    if trigger.normalization is not None and pairs.clean.is_floating_point():
        clean, triggered = trigger.normalization.invert(clean), trigger.normalization.invert(triggered)
    pictures = {"clean": clean, name.replace("trigger", "triggered"): triggered, name: ((triggered - clean) + 1) / 2}
    for logger in trainer.loggers:
        # TensorBoard's; others are left out, and a user's own logger need not have any `experiment`.
        add_image = getattr(getattr(logger, "experiment", None), "add_image", None)
        if callable(add_image):
            for title, images in pictures.items():
                add_image(f"unlearn/{title}", make_grid(images.clamp(0, 1), nrow=4), trainer.global_step)


def _log(trainer: Trainer, values: dict[str, float], step: int) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(values, step)

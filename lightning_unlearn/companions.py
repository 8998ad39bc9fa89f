"""What else the Trainer was given, and with which of it a repair works."""

from __future__ import annotations

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.plugins import BitsandbytesPrecision, TransformerEnginePrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.xla import XLAStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]  # re-exported implicitly
from torch import nn

__all__ = ["callbacks_of", "fingerprint", "refuse_companions", "refuse_strategy", "warn_of_overwritten"]

_REFUSED = (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy, XLAStrategy)
_REFUSED_PRECISIONS = (TransformerEnginePrecision, BitsandbytesPrecision)


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """The Trainer's callbacks in the order in which they are called."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by the Trainer's connector
    return callbacks


def refuse_companions(trainer: Trainer, repairer: Callback) -> None:
    """Refuse callbacks that would change what is repaired or saved.

    Args:
        trainer: the Trainer.
        repairer: the callback that repairs when training ends.

    Raises:
        MisconfigurationException: naming the callback and what to do instead.
    """
    callbacks = callbacks_of(trainer)
    for number, callback in enumerate(callbacks):
        name = type(callback).__name__
        if isinstance(callback, WeightAveraging):  # EMAWeightAveraging is one
            raise MisconfigurationException(
                f"callbacks: {name} replaces the weights in every checkpoint by averaged, unrepaired ones; "
                "remove it and repair the averaged checkpoint with `lightning-unlearn repair`."
            )
        if isinstance(callback, ModelPruning):
            raise MisconfigurationException(
                f"callbacks: {name} makes the model compute the weights that a repair would have to change; train with "
                "it, then repair the finished checkpoint with `lightning-unlearn repair`."
            )
        if isinstance(callback, StochasticWeightAveraging) and number > callbacks.index(repairer):
            raise MisconfigurationException(
                f"callbacks: {name} comes after {type(repairer).__name__} and would put averaged, unrepaired weights "
                "over the repaired ones; name it first."
            )


def refuse_strategy(trainer: Trainer) -> None:
    """Refuse weights that are not whole, or not plain.

    Raises:
        MisconfigurationException: saying what to do instead.
    """
    if isinstance(trainer.strategy, _REFUSED):
        raise MisconfigurationException(
            "strategy: BackdoorUnlearning needs whole weights on every device, but "
            f"{type(trainer.strategy).__name__} shards them; train so, then repair the checkpoint with "
            "`lightning-unlearn repair` on one device."
        )
    precision = trainer.strategy.precision_plugin
    if isinstance(precision, _REFUSED_PRECISIONS):
        raise MisconfigurationException(
            f"precision: BackdoorUnlearning needs ordinary floating-point weights, but {type(precision).__name__} "
            "replaces layers by others; train so, then repair the checkpoint with `lightning-unlearn repair` at "
            "--trainer.precision 32-true."
        )


@torch.no_grad()
def fingerprint(module: nn.Module) -> list[int]:
    """Sums of the parameters' bytes, by which to tell whether anybody has written to them; the same on every device."""
    flat = (parameter.detach().reshape(-1) for parameter in module.parameters())
    return [int(numbers.view(torch.uint8).sum(dtype=torch.int64)) for numbers in flat]


def warn_of_overwritten(repaired: str | None) -> None:
    """Warn that another callback, or the module itself, has written over the repaired weights when training ended.

    Args:
        repaired: the file that holds them, if one was written.
    """
    rank_zero_warn(
        "The weights were written over AFTER the repair, by the module's own on_train_end or by a callback named after "
        "BackdoorUnlearning (with averages that were never repaired, maybe): the model in memory is NOT what the "
        f"report tells of. {f'{repaired!r} is: load it' if repaired else 'No file was written'}. Name that callback "
        "before BackdoorUnlearning, or let the module set its weights before on_train_end."
    )

"""Other callbacks of the Trainer, and with which of them a repair works."""

from __future__ import annotations

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging, WeightAveraging

__all__ = ["callbacks_of", "refuse_companions"]


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

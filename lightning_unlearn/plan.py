"""What a repair is to do, whatever the model and the images."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

from lightning_unlearn.auditor import Auditor
from lightning_unlearn.methods import RepairMethod
from lightning_unlearn.methods.base import check_range
from lightning_unlearn.triggers import Trigger

__all__ = ["RepairPlan", "check_trigger"]


@dataclass(frozen=True, kw_only=True, eq=False)
class RepairPlan:
    """What to unlearn, and how.

    Args:
        trigger: the trigger to unlearn, or None if nobody knows it.
        method: the repair method, or None for the default of a known or an unknown trigger.
        seed: seed of everything random in the method.
        batch_size: most images in one forward pass, at least 1.
        force: repair even if the trigger's attack success rate is already low, or the audit's verdict is clean.
        min_asr: below this rate, in [0, 1], on the images drawn, a model counts as not backdoored and is left alone.
        auditor: how to estimate an unknown trigger.

    Raises:
        TypeError: if ``trigger``, ``method`` or ``auditor`` is of the wrong kind.
        ValueError: if a number is out of range.

    Example:
        >>> from lightning_unlearn.plan import RepairPlan
        >>> RepairPlan(min_asr=2)
        Traceback (most recent call last):
        ValueError: min_asr: expected a value in [0, 1], but got 2.
    """

    trigger: Trigger | None = None
    method: RepairMethod | None = None
    seed: int = 0
    batch_size: int = 128
    force: bool = False
    min_asr: float = 0.1
    auditor: Auditor | None = None

    def __post_init__(self) -> None:
        """Checks kinds and ranges."""
        check_trigger("trigger", self.trigger)
        if self.method is not None and not isinstance(self.method, RepairMethod):
            raise TypeError(
                f"method: expected a lightning_unlearn.methods.RepairMethod, but got {type(self.method).__name__}."
            )
        if self.auditor is not None and not isinstance(self.auditor, Auditor):
            raise TypeError(
                f"auditor: expected a lightning_unlearn.auditor.Auditor, but got {type(self.auditor).__name__}."
            )
        for name in ("batch_size", "seed"):
            if not isinstance(getattr(self, name), Integral):
                raise TypeError(f"{name}: expected a whole number, but got {getattr(self, name)!r}.")
        check_range("batch_size", self.batch_size, 1, float("inf"))
        check_range("min_asr", self.min_asr, 0, 1)


def check_trigger(name: str, trigger: object) -> None:
    """Refuse what is neither a trigger nor None.

    Args:
        name: the argument's name.
        trigger: what was given for it.

    Raises:
        TypeError: saying what would be right.
    """
    if trigger is not None and not isinstance(trigger, Trigger):
        raise TypeError(
            f"{name}: expected a lightning_unlearn.triggers.Trigger, but got {type(trigger).__name__}; wrap a function "
            "of your own in FunctionTrigger."
        )

"""Remove backdoors from image classifiers after training, as a PyTorch Lightning callback.

What needs Lightning is imported when first used, so that triggers, metrics, methods and :func:`repair` work without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from lightning_unlearn.auditor import Auditor, audit
from lightning_unlearn.repair import repair
from lightning_unlearn.report import Report
from lightning_unlearn.result import RepairResult
from lightning_unlearn.verdict import Audit

if TYPE_CHECKING:
    from lightning_unlearn.callback import BackdoorUnlearning
    from lightning_unlearn.data.holdout_datamodule import HoldoutDataModule

__all__ = [
    "Audit",
    "Auditor",
    "BackdoorUnlearning",
    "HoldoutDataModule",
    "RepairResult",
    "Report",
    "__version__",
    "audit",
    "repair",
]

__version__ = "0.2.0"

_NEEDS_LIGHTNING = {"BackdoorUnlearning": "callback", "HoldoutDataModule": "data.holdout_datamodule"}


def __getattr__(name: str) -> object:
    if name in _NEEDS_LIGHTNING:
        return getattr(import_module(f"{__name__}.{_NEEDS_LIGHTNING[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Repair methods: each removes a backdoor from a model, in place, round by round."""

from lightning_unlearn.methods.base import RepairMethod, RepairTask, Round, Stopwatch
from lightning_unlearn.methods.fine_tuning import FineTuning
from lightning_unlearn.methods.grad_prune import GradPrune
from lightning_unlearn.methods.mask_prune import MaskPrune

__all__ = ["FineTuning", "GradPrune", "MaskPrune", "RepairMethod", "RepairTask", "Round", "Stopwatch"]

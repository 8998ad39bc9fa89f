"""Triggers: what an attacker adds to an image."""

from __future__ import annotations

from lightning_unlearn.triggers.base import Trigger
from lightning_unlearn.triggers.blend import BlendTrigger
from lightning_unlearn.triggers.compose import ComposeTriggers
from lightning_unlearn.triggers.estimated import AdditiveTrigger, CoveringTrigger, DisplacingTrigger, ResidualTrigger
from lightning_unlearn.triggers.function import FunctionTrigger
from lightning_unlearn.triggers.low_frequency import LowFrequencyTrigger
from lightning_unlearn.triggers.normalization import Normalization, find_normalization
from lightning_unlearn.triggers.patch import PatchTrigger
from lightning_unlearn.triggers.pool import TriggerPool
from lightning_unlearn.triggers.preview import preview
from lightning_unlearn.triggers.quantize import QuantizeTrigger
from lightning_unlearn.triggers.sinusoid import SinusoidTrigger
from lightning_unlearn.triggers.stored import EstimatedTrigger
from lightning_unlearn.triggers.warp import WarpTrigger

__all__ = [
    "AdditiveTrigger",
    "BlendTrigger",
    "ComposeTriggers",
    "CoveringTrigger",
    "DisplacingTrigger",
    "EstimatedTrigger",
    "FunctionTrigger",
    "LowFrequencyTrigger",
    "Normalization",
    "PatchTrigger",
    "QuantizeTrigger",
    "ResidualTrigger",
    "SinusoidTrigger",
    "Trigger",
    "TriggerPool",
    "WarpTrigger",
    "find_normalization",
    "preview",
]

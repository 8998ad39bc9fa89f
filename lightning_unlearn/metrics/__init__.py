"""Metrics of a backdoor and of its repair: torchmetrics classes over pure functions."""

from __future__ import annotations

from lightning_unlearn.metrics.attack import AttackSuccessRate, RecoveryAccuracy
from lightning_unlearn.metrics.defense import DefenseEffectivenessRating, RobustImprovementRate
from lightning_unlearn.metrics.functional import (
    attack_success_rate,
    defense_effectiveness_rating,
    recovery_accuracy,
    robust_improvement_rate,
)

__all__ = [
    "AttackSuccessRate",
    "DefenseEffectivenessRating",
    "RecoveryAccuracy",
    "RobustImprovementRate",
    "attack_success_rate",
    "defense_effectiveness_rating",
    "recovery_accuracy",
    "robust_improvement_rate",
]

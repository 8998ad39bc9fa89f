"""Attack success rate and recovery accuracy, gathered over batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_unlearn.metrics.functional import rate, triggered_counts

__all__ = ["AttackSuccessRate", "RecoveryAccuracy"]


class _TriggeredRate(Metric):
    """Counts what a model answers to triggered images.

    Both rates keep all counts, so that a ``MetricCollection`` may rightly let them share one state: its compute groups
    merge metrics whose states have the same names and, after the first batch, the same values.
    """

    is_differentiable = False
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    successes: Tensor
    recoveries: Tensor
    considered: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("successes", "recoveries", "considered"):
            self.add_state(name, default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: Tensor, labels: Tensor, targets: int | Tensor) -> None:
        """Adds a batch of triggered images.

        Args:
            preds: the model's answers: logits or probabilities ``(N, C)``, or classes ``(N,)``.
            labels: true classes ``(N,)``, integer.
            targets: the class the attacker wants, one for all or ``(N,)``, integer.

        Raises:
            TypeError: if classes are not of an integer dtype.
            ValueError: if shapes do not fit.
        """
        successes, recoveries, considered = triggered_counts(preds, labels, targets)
        self.successes += successes
        self.recoveries += recoveries
        self.considered += considered


class AttackSuccessRate(_TriggeredRate):
    """Attack success rate (ASR): share of triggered images, their class not the target, predicted as the target.

    Images whose label is their target are left out, since predicting them as the target is right.  With no image to
    count the result is NaN, with a ``UserWarning``.

    Args:
        kwargs: options of every torchmetrics ``Metric``.

    Example:
        >>> import torch
        >>> metric = AttackSuccessRate()
        >>> metric.update(torch.tensor([0, 0, 2]), torch.tensor([0, 1, 2]), targets=0)
        >>> metric.update(torch.tensor([[0.9, 0.1, 0.0]]), torch.tensor([2]), targets=0)
        >>> metric.compute()
        tensor(0.6667)
    """

    higher_is_better = False

    def compute(self) -> Tensor:
        """Gives the rate over all batches: a float32 scalar in ``[0, 1]``, or NaN."""
        return rate(self.successes, self.considered, "attack success rate")


class RecoveryAccuracy(_TriggeredRate):
    """Recovery accuracy (RA): share of triggered images, their class not the target, predicted as their true class.

    Images whose label is their target are left out.  With no image to count the result is NaN, with a
    ``UserWarning``.

    Args:
        kwargs: options of every torchmetrics ``Metric``.

    Example:
        >>> import torch
        >>> metric = RecoveryAccuracy()
        >>> metric.update(torch.tensor([0, 0, 2]), torch.tensor([0, 1, 2]), targets=0)
        >>> metric.compute()
        tensor(0.5000)
    """

    higher_is_better = True

    def compute(self) -> Tensor:
        """Gives the rate over all batches: a float32 scalar in ``[0, 1]``, or NaN."""
        return rate(self.recoveries, self.considered, "recovery accuracy")

"""How good a repair is: defence effectiveness and robust improvement, gathered over batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_unlearn.metrics.functional import (
    defense_effectiveness_rating,
    predicted_classes,
    rate,
    robust_improvement_rate,
    triggered_counts,
)

__all__ = ["DefenseEffectivenessRating", "RobustImprovementRate"]


class _RepairRating(Metric):
    """Counts the answers of a model and of its repaired self to the same images, clean and triggered.

    As in :mod:`lightning_unlearn.metrics.attack` both ratings keep all counts, so that sharing a state is right.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    correct_before: Tensor
    correct_after: Tensor
    images: Tensor
    successes_before: Tensor
    successes_after: Tensor
    recoveries_before: Tensor
    recoveries_after: Tensor
    considered: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in (
            "correct_before",
            "correct_after",
            "images",
            "successes_before",
            "successes_after",
            "recoveries_before",
            "recoveries_after",
            "considered",
        ):
            self.add_state(name, default=torch.tensor(0), dist_reduce_fx="sum")

    def update(
        self,
        clean_before: Tensor,
        clean_after: Tensor,
        triggered_before: Tensor,
        triggered_after: Tensor,
        labels: Tensor,
        targets: int | Tensor,
    ) -> None:
        """Adds a batch of images, each answered four times.

        Args:
            clean_before: answers to the clean images before the repair: logits or probabilities ``(N, C)``, or
                classes ``(N,)``.
            clean_after: answers to the clean images after the repair.
            triggered_before: answers to the same images, triggered, before the repair.
            triggered_after: answers to the same images, triggered, after the repair.
            labels: true classes ``(N,)``, integer.
            targets: the class the attacker wants, one for all or ``(N,)``, integer.

        Raises:
            TypeError: if classes are not of an integer dtype.
            ValueError: if shapes do not fit.
        """
        # Everything is checked before the first state changes.
        correct_before = (predicted_classes(clean_before, labels) == labels).sum()
        correct_after = (predicted_classes(clean_after, labels) == labels).sum()
        successes_before, recoveries_before, considered = triggered_counts(triggered_before, labels, targets)
        successes_after, recoveries_after, _ = triggered_counts(triggered_after, labels, targets)
        self.correct_before += correct_before
        self.correct_after += correct_after
        self.images += len(labels)
        self.successes_before += successes_before
        self.successes_after += successes_after
        self.recoveries_before += recoveries_before
        self.recoveries_after += recoveries_after
        self.considered += considered


class DefenseEffectivenessRating(_RepairRating):
    r"""Defence effectiveness rating (DER): the fall of ASR, less the fall of clean accuracy, mapped into [0, 1].

    .. math:: DER = \frac{\max(0, ASR_b - ASR_a) - \max(0, ACC_b - ACC_a) + 1}{2}

    ACC counts every clean image, ASR the triggered images whose label is not their target.  1 is a perfect repair,
    0.5 one that changes nothing.  With no triggered image to count the result is NaN, with a ``UserWarning``.

    Args:
        kwargs: options of every torchmetrics ``Metric``.

    Example:
        >>> import torch
        >>> labels = torch.tensor([0, 1, 2, 3])
        >>> metric = DefenseEffectivenessRating()
        >>> metric.update(
        ...     clean_before=labels,
        ...     clean_after=torch.tensor([0, 1, 2, 0]),
        ...     triggered_before=torch.tensor([0, 0, 0, 0]),
        ...     triggered_after=torch.tensor([0, 1, 2, 1]),
        ...     labels=labels,
        ...     targets=0,
        ... )
        >>> metric.compute()  # ASR falls from 1 to 0, ACC from 1 to 0.75
        tensor(0.8750)
    """

    def compute(self) -> Tensor:
        """Gives the rating over all batches: a float32 scalar in ``[0, 1]``, or NaN."""
        return defense_effectiveness_rating(
            acc_before=rate(self.correct_before, self.images, "clean accuracy"),
            asr_before=rate(self.successes_before, self.considered, "attack success rate"),
            acc_after=rate(self.correct_after, self.images, "clean accuracy"),
            asr_after=rate(self.successes_after, self.considered, "attack success rate"),
        )


class RobustImprovementRate(_RepairRating):
    r"""Robust improvement rate (RIR): the rise of RA, less the fall of clean accuracy, mapped into [0, 1].

    .. math:: RIR = \frac{\max(0, RA_a - RA_b) - \max(0, ACC_b - ACC_a) + 1}{2}

    ACC counts every clean image, RA the triggered images whose label is not their target.  With no triggered image to
    count the result is NaN, with a ``UserWarning``.

    Args:
        kwargs: options of every torchmetrics ``Metric``.

    Example:
        >>> import torch
        >>> labels = torch.tensor([0, 1, 2, 3])
        >>> metric = RobustImprovementRate()
        >>> metric.update(
        ...     clean_before=labels,
        ...     clean_after=torch.tensor([0, 1, 2, 0]),
        ...     triggered_before=torch.tensor([0, 0, 0, 3]),
        ...     triggered_after=torch.tensor([0, 1, 2, 3]),
        ...     labels=labels,
        ...     targets=0,
        ... )
        >>> metric.compute()  # RA rises from 1/3 to 1, ACC falls from 1 to 0.75
        tensor(0.7083)
    """

    def compute(self) -> Tensor:
        """Gives the rating over all batches: a float32 scalar in ``[0, 1]``, or NaN."""
        return robust_improvement_rate(
            acc_before=rate(self.correct_before, self.images, "clean accuracy"),
            ra_before=rate(self.recoveries_before, self.considered, "recovery accuracy"),
            acc_after=rate(self.correct_after, self.images, "clean accuracy"),
            ra_after=rate(self.recoveries_after, self.considered, "recovery accuracy"),
        )

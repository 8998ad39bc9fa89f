"""The rates of a backdoor and of its repair, as pure functions.

A *triggered* image carries the trigger; its *label* is its true class and its *target* the class that the attacker
wants.  Images whose label is their target tell nothing about the backdoor, so no rate here counts them.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

__all__ = [
    "attack_success_rate",
    "defense_effectiveness_rating",
    "recovery_accuracy",
    "robust_improvement_rate",
]


def attack_success_rate(preds: Tensor, labels: Tensor, targets: int | Tensor) -> Tensor:
    """Attack success rate (ASR): share of triggered images, their class not the target, predicted as the target.

    Args:
        preds: the model's answers to triggered images: logits or probabilities ``(N, C)``, or classes ``(N,)``.  A row
            that holds NaN counts as no class at all.
        labels: true classes ``(N,)``, integer.
        targets: the class the attacker wants, one for all or ``(N,)``, integer.

    Returns:
        A float32 scalar in ``[0, 1]``; NaN with a ``UserWarning`` if no image is left to count.

    Raises:
        TypeError: if classes are not of an integer dtype.
        ValueError: if shapes do not fit.

    Example:
        >>> import torch
        >>> preds, labels = torch.tensor([0, 0, 2, 0]), torch.tensor([0, 1, 2, 3])
        >>> attack_success_rate(preds, labels, 0)  # image 0 is of class 0 anyway: 2 of 3
        tensor(0.6667)
    """
    successes, _, considered = triggered_counts(preds, labels, targets)
    return rate(successes, considered, "attack success rate")


def recovery_accuracy(preds: Tensor, labels: Tensor, targets: int | Tensor) -> Tensor:
    """Recovery accuracy (RA): share of triggered images, their class not the target, predicted as their true class.

    Args:
        preds: the model's answers to triggered images: logits or probabilities ``(N, C)``, or classes ``(N,)``.  A row
            that holds NaN counts as no class at all.
        labels: true classes ``(N,)``, integer.
        targets: the class the attacker wants, one for all or ``(N,)``, integer.

    Returns:
        A float32 scalar in ``[0, 1]``; NaN with a ``UserWarning`` if no image is left to count.

    Raises:
        TypeError: if classes are not of an integer dtype.
        ValueError: if shapes do not fit.

    Example:
        >>> import torch
        >>> preds, labels = torch.tensor([0, 0, 2, 0]), torch.tensor([0, 1, 2, 3])
        >>> recovery_accuracy(preds, labels, 0)
        tensor(0.3333)
    """
    _, recoveries, considered = triggered_counts(preds, labels, targets)
    return rate(recoveries, considered, "recovery accuracy")


def defense_effectiveness_rating(
    *,
    acc_before: float | Tensor,
    asr_before: float | Tensor,
    acc_after: float | Tensor,
    asr_after: float | Tensor,
) -> Tensor:
    r"""Defence effectiveness rating (DER): the fall of ASR, less the fall of clean accuracy, mapped into [0, 1].

    .. math:: DER = \frac{\max(0, ASR_b - ASR_a) - \max(0, ACC_b - ACC_a) + 1}{2}

    1 is a perfect repair, 0.5 a repair that changes nothing.  (Some public code adds the fall of accuracy; the
    published formula, this one, subtracts it.)

    Args:
        acc_before: clean accuracy before the repair, a fraction of 1.
        asr_before: attack success rate before the repair, a fraction of 1.
        acc_after: clean accuracy after the repair, a fraction of 1.
        asr_after: attack success rate after the repair, a fraction of 1.

    Returns:
        A float32 scalar; NaN if a rate is NaN.

    Raises:
        ValueError: if a rate is outside ``[0, 1]``.

    Example:
        >>> defense_effectiveness_rating(acc_before=0.9, asr_before=1.0, acc_after=0.8, asr_after=0.1)
        tensor(0.9000)
    """
    acc_drop = _drop(acc_before=acc_before, acc_after=acc_after)
    return (_drop(asr_before=asr_before, asr_after=asr_after) - acc_drop + 1) / 2


def robust_improvement_rate(
    *,
    acc_before: float | Tensor,
    ra_before: float | Tensor,
    acc_after: float | Tensor,
    ra_after: float | Tensor,
) -> Tensor:
    r"""Robust improvement rate (RIR): the rise of RA, less the fall of clean accuracy, mapped into [0, 1].

    .. math:: RIR = \frac{\max(0, RA_a - RA_b) - \max(0, ACC_b - ACC_a) + 1}{2}

    Args:
        acc_before: clean accuracy before the repair, a fraction of 1.
        ra_before: recovery accuracy before the repair, a fraction of 1.
        acc_after: clean accuracy after the repair, a fraction of 1.
        ra_after: recovery accuracy after the repair, a fraction of 1.

    Returns:
        A float32 scalar; NaN if a rate is NaN.

    Raises:
        ValueError: if a rate is outside ``[0, 1]``.

    Example:
        >>> robust_improvement_rate(acc_before=0.9, ra_before=0.0, acc_after=0.8, ra_after=0.7)
        tensor(0.8000)
    """
    acc_drop = _drop(acc_before=acc_before, acc_after=acc_after)
    return (_drop(ra_after=ra_after, ra_before=ra_before) - acc_drop + 1) / 2


def triggered_counts(preds: Tensor, labels: Tensor, targets: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Counts answers to triggered images, without those whose label is their target.

    Args:
        preds: ``(N, C)`` or ``(N,)``, see :func:`attack_success_rate`.
        labels: true classes ``(N,)``.
        targets: wanted classes, one for all or ``(N,)``.

    Returns:
        Integer scalars: answers that are the target, answers that are the true class, images counted.
    """
    classes = predicted_classes(preds, labels)
    if isinstance(targets, bool) or not isinstance(targets, int | Tensor):
        raise TypeError(f"targets must be a class index or a tensor of them, but is {type(targets).__name__}")
    targets = torch.as_tensor(targets, device=labels.device)
    if not _is_integer(targets):
        raise TypeError(f"targets must be of an integer dtype, but are {targets.dtype}")
    if targets.dim() and targets.shape != labels.shape:
        raise ValueError(
            f"targets must be one class or have the labels' shape {tuple(labels.shape)}, "
            f"but have {tuple(targets.shape)}"
        )
    considered = labels != targets
    return ((classes == targets) & considered).sum(), ((classes == labels) & considered).sum(), considered.sum()


def predicted_classes(preds: Tensor, labels: Tensor) -> Tensor:
    """Turns predictions into classes and checks that they fit the labels.

    Args:
        preds: ``(N, C)`` logits or probabilities, or ``(N,)`` classes.
        labels: true classes ``(N,)``.

    Returns:
        Classes ``(N,)``; -1 where a row of ``preds`` holds NaN.
    """
    if labels.dim() != 1:
        raise ValueError(f"labels must have shape (N,), but have {tuple(labels.shape)}")
    if not _is_integer(labels):
        raise TypeError(f"labels must be of an integer dtype, but are {labels.dtype}")
    if preds.dim() not in (1, 2) or len(preds) != len(labels):
        raise ValueError(
            f"preds must have shape ({len(labels)}, C) or ({len(labels)},), one a label, but have {tuple(preds.shape)}"
        )
    if preds.dim() == 1:
        if not _is_integer(preds):
            raise TypeError(f"preds of shape (N,) must be classes of an integer dtype, but are {preds.dtype}")
        return preds
    if preds.shape[1] == 0:
        raise ValueError("preds of shape (N, C) must have at least one class, but C is 0")
    # argmax would take a broken answer for a class, often class 0, the usual target.
    return preds.argmax(dim=1).masked_fill(preds.isnan().any(dim=1), -1)


def rate(hits: Tensor, total: Tensor, name: str) -> Tensor:
    """Divides counts; nothing to count gives a warning and NaN, never 0.

    Args:
        hits: integer scalar.
        total: integer scalar.
        name: what the warning calls the rate.

    Returns:
        A float32 scalar.
    """
    if total == 0:
        warnings.warn(
            f"The {name} has no image to count, so it is NaN: give images whose label is not their target.",
            UserWarning,
            stacklevel=3,
        )
    return hits.to(torch.float32) / total


def _is_integer(values: Tensor) -> bool:
    return not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)


def _drop(**rates: float | Tensor) -> Tensor:
    """Gives max(0, first - second) and checks both rates; NaN stays NaN, which Python's max would hide."""
    values = []
    for name, given in rates.items():
        value = torch.as_tensor(given, dtype=torch.float32)
        if (value < 0).any() or (value > 1).any():
            raise ValueError(f"{name} must be a fraction in [0, 1], but is {given}")
        values.append(value)
    return (values[0] - values[1]).clamp(min=0)

"""What becomes of learned masks: they are drawn back, folded into the weights, and cut where they are nearly off."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_unlearn.evaluation import Evaluation
from lightning_unlearn.methods.base import RepairTask

__all__ = ["Cut", "cut"]

Cut: TypeAlias = Literal["soft", "mixed", "hard"]


def cut(task: RepairTask, masks: Tensor, how: Cut, *, floor: float, below: float, slack: float) -> None:
    """Leave of the masks what ``how`` says, in the model.

    First they are drawn back towards 1, in tenths, as little as brings accuracy to ``floor``.

    Args:
        task: whose images decide what to prune.
        masks: (total,) factors in [0, 1] by flat index.
        how: as :class:`~lightning_unlearn.methods.MaskPrune` says.
        floor: the lowest accuracy on all clean images held that they may leave.
        below: which masks ``"mixed"`` may prune.
        slack: by how much it may raise L_clean + L_u, in nats.
    """
    masks, masked = _drawn_back(task, masks, floor)
    # What was pruned before has no gradient, so that its mask says nothing.
    gone = task.mask.flat(masks.device)
    earlier = len(task.mask.pruned)
    if how != "hard":
        task.mask.fold(masks)
    if how == "soft":
        return
    order = masks.masked_fill(gone, torch.inf).argsort(stable=True)[: len(masks) - earlier]
    lowest_first = [task.mask.locate(index) for index in order.tolist()]
    done = len(task.mask.pruned) - earlier
    lowered = int(((masks < (1 if how == "hard" else below)) & ~gone).sum())
    # Folded masks compute what they did before, and what is not folded leaves the model as the method got it.
    best_loss, kept = _loss(task.held_before if how == "hard" else masked), task.mask.steps
    allowed = best_loss + slack if how == "mixed" else best_loss
    for count in _growing(done, lowered):
        task.mask.prune(lowest_first[len(task.mask.pruned) - earlier : count])
        now = task.measure()
        loss = _loss(now)
        if loss <= allowed and now.acc >= floor:
            allowed = allowed if how == "mixed" else loss
            kept = task.mask.steps
        elif how == "mixed" and loss > best_loss + 10 * slack:
            break  # one channel too many can be made good by the next, but not by so much
    task.mask.undo(task.mask.steps - kept)


def _drawn_back(task: RepairTask, masks: Tensor, floor: float) -> tuple[Tensor, Evaluation]:
    """The masks, or what lies as little of the way back to 1 as brings accuracy to ``floor``, and what they do."""
    for tenths in range(10, 0, -1):
        nearer = 1 - (1 - masks) * (tenths / 10)
        with task.mask.scaled(nearer):
            now = task.measure()
        if now.acc >= floor:
            return nearer, now
    return torch.ones_like(masks), task.held_before


def _growing(low: int, high: int) -> list[int]:
    """Counts above ``low`` up to ``high``, each about a quarter more than the last, so that there are few to try."""
    counts = []
    while low < high:
        low = min(high, max(low + 1, low * 5 // 4))
        counts.append(low)
    return counts


def _loss(now: Evaluation) -> float:
    return now.loss + now.unlearning_loss

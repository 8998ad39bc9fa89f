"""The threshold below which learned masks are pruned, chosen on clean accuracy alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_unlearn.methods.base import RepairTask, Round

__all__ = ["prune_below_threshold"]

_CANDIDATES = 20  # 0, 0.05, ..., 0.95, as published


def prune_below_threshold(task: RepairTask, masks: Tensor, *, accuracy_drop: float) -> Iterator[Round]:
    """Prune the channels whose mask is at or below a threshold, the highest that accuracy allows.

    Thresholds 0, 0.05, ..., 0.95 are tried from low to high where they add a channel. Kept is the one with the most
    channels among those that leave the accuracy on *all* clean images held within ``accuracy_drop`` of what it is
    without pruning: a validation part of one image a class is too coarse to choose on. If none does, nothing is pruned.
    Public implementations take the threshold with the lowest attack success rate on the *test* set, or a fixed one;
    no defender has the former, and the latter fits one network. The trigger plays no part here.

    A channel is pruned whole, filter, bias, γ and β, whatever its mask scaled. Channels whose mask is 1 stay.

    Args:
        task: the model, its weights as they are to be left.
        masks: (total,) masks in [0, 1] by flat index.
        accuracy_drop: α, the largest drop of accuracy, a fraction in (0, 1].

    Yields:
        One round of stage ``"prune"`` a threshold, with the channels that it adds.

    Raises:
        ValueError: if masks are not finite.
    """
    masks = task.processes.first(masks.detach().float()).cpu()
    lowest_first = masks.masked_fill(task.mask.flat(), 1.0).sort(stable=True)
    if not lowest_first.values.isfinite().all():
        raise ValueError(
            "model: the learned masks hold NaN or infinity, so no threshold can be chosen; lower the learning rate, "
            "and check the weights and the range of the images."
        )
    thresholds = torch.arange(_CANDIDATES) / _CANDIDATES
    counts = torch.searchsorted(lowest_first.values, thresholds, right=True).tolist()
    floor = task.measure().acc - accuracy_drop - 1e-6  # accuracies come as float32
    kept, done = task.mask.steps, 0
    for count in counts:
        picks = tuple(task.mask.locate(index) for index in lowest_first.indices[done:count].tolist())
        if not picks:  # the same set again
            continue
        task.mask.prune(picks)
        done = count
        if task.measure().acc >= floor:
            kept = task.mask.steps
        yield task.round("prune", task.validate(), picks)
    task.mask.undo(task.mask.steps - kept)

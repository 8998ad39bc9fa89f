"""The last linear layer: which class do its weights favour?"""

from __future__ import annotations

from statistics import median, pstdev

import torch
from torch import Tensor, nn

__all__ = ["head_of", "prominence"]

_FEWEST = 5  # classes; among fewer there is nothing to compare with
_NARROW = 0.02  # added to a spread, since that of a few classes may be small by chance
_MOST = 10.0


def head_of(model: nn.Module, num_classes: int) -> Tensor | None:
    """Find the weights of a model's last linear layer.

    Args:
        model: any module.
        num_classes: how many logits it gives.

    Returns:
        (num_classes, features) weights of the last ``Linear`` or 1x1 convolution, in the order of registration, that
        has a row for each class; None if there is none.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
        >>> head_of(net, 10).shape
        torch.Size([10, 4])
    """
    heads = [
        module.weight.detach().flatten(1)
        for module in model.modules()
        if (isinstance(module, nn.Linear) and module.out_features == num_classes)
        or (isinstance(module, nn.Conv2d) and module.out_channels == num_classes and module.kernel_size == (1, 1))
    ]
    return heads[-1] if heads else None


def prominence(head: Tensor | None, num_classes: int) -> list[float]:
    """Tell by how many spreads each class's weights are longer, or point more upwards, than the other classes'.

    Images with another's label give their class more training images than it would have, and the weights of its row
    grow with them, as do those of a class that honestly had more. So this tells which class is likelier the target of
    a backdoor, but not whether there is one. After the "signatures" of
    `Fields et al., 2021 <https://arxiv.org/abs/2109.02836>`_, who look at the mean of each row: here it is divided by
    the row's length, and the length counts as well. The larger of both tells.

    Args:
        head: (num_classes, features) weights, or None.
        num_classes: number of classes.

    Returns:
        One number a class, in [-10, 10]; zeros where there is no head, or fewer than 5 classes.

    Example:
        >>> import torch
        >>> weights = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
        >>> weights[3] += 0.7
        >>> values = prominence(weights, 10)
        >>> values.index(max(values)), max(values) > 3
        (3, True)
    """
    if head is None or num_classes < _FEWEST or not head.isfinite().all():
        return [0.0] * num_classes
    head = head.cpu().double()  # not every device has float64
    rows = head - head.mean(0)  # logits are known but for a constant
    lengths = rows.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    upwards = rows.sum(1) / (lengths * rows.shape[1] ** 0.5)
    return [max(pair) for pair in zip(_spreads(lengths.log().tolist()), _spreads(upwards.tolist()), strict=True)]


def _spreads(values: list[float]) -> list[float]:
    """How many spreads of the others each value lies above the others' median."""
    found = []
    for k, value in enumerate(values):
        others = values[:k] + values[k + 1 :]
        found.append(max(-_MOST, min(_MOST, (value - median(others)) / (_NARROW + pstdev(others)))))
    return found

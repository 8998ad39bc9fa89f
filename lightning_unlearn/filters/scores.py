"""Score filters by what a gradient says about them.

Each score maps a layer and the gradients of a loss to one number a filter, computed for all filters of a layer at once.
The larger the score, the sooner the filter goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_unlearn.filters.layer import FilterLayer

__all__ = ["SCORES", "Score", "mean_abs_gradient", "score_filters", "taylor"]

Score = Literal["mean_abs_grad", "taylor"]
Gradients = dict[str, Tensor]
"""Gradients of one layer: the convolution's under ``"weight"`` and ``"bias"``, those of gate k under ``"gate{k}"``."""


def mean_abs_gradient(layer: FilterLayer, gradients: Gradients) -> Tensor:
    """Mean absolute gradient of each filter, ξ = ‖∂L/∂W_i‖₁ / size(W_i), (channels,) float32.

    The score of Dunnett et al. (2024), arXiv 2405.03918.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_unlearn.filters import FilterLayer, mean_abs_gradient
        >>> layer = FilterLayer("conv", nn.Conv2d(1, 2, 2))
        >>> gradient = torch.tensor([[[[1.0, -1.0], [2.0, 0.0]]], [[[0.0, 0.0], [0.0, -2.0]]]])
        >>> mean_abs_gradient(layer, {"weight": gradient})
        tensor([1.0000, 0.5000])
    """
    gradient = gradients["weight"]
    return layer.per_filter(gradient.abs()) / (gradient.numel() // layer.channels)


def taylor(layer: FilterLayer, gradients: Gradients) -> Tensor:
    """By how much the loss is predicted to fall, to first order, if the channel is zeroed, (channels,) float32, signed.

    Zeroing a channel multiplies its gates (γ and β of the norm that consumes it, or else weight and bias) by zero,
    and the loss changes by about −Σ w·∂L/∂w over them.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_unlearn.filters import FilterLayer, taylor
        >>> layer = FilterLayer("conv", nn.Conv2d(1, 1, 1))
        >>> _ = nn.init.constant_(layer.weight, 3.0), nn.init.constant_(layer.convolution.bias, 1.0)
        >>> taylor(layer, {"weight": torch.full((1, 1, 1, 1), 2.0), "bias": torch.tensor([-1.0])})
        tensor([5.])
    """
    if layer.gates:
        products = (gate.by_channel(gate.tensor.detach() * gradients[f"gate{k}"]) for k, gate in enumerate(layer.gates))
        return torch.stack([product.float().reshape(layer.channels, -1).sum(1) for product in products]).sum(0)
    total = layer.per_filter(layer.weight.detach() * gradients["weight"])
    for bias in layer.bias:
        total = total + (bias.tensor.detach() * gradients["bias"]).float()
    return total


SCORES: dict[Score, Callable[[FilterLayer, Gradients], Tensor]] = {"mean_abs_grad": mean_abs_gradient, "taylor": taylor}


def _differentiated(layer: FilterLayer, score: Score) -> dict[str, Tensor]:
    """Which tensors of a layer a score needs gradients of, by their key in :data:`Gradients`."""
    if score == "taylor" and layer.gates:
        return {f"gate{k}": gate.tensor for k, gate in enumerate(layer.gates)}
    wanted = {"weight": layer.weight}
    if score == "taylor":
        for bias in layer.bias:
            wanted["bias"] = bias.tensor
    return wanted


def score_filters(layers: Sequence[FilterLayer], losses: Iterable[Tensor], score: Score = "mean_abs_grad") -> Tensor:
    """Score all filters of all layers against the sum of ``losses``.

    Gradients are summed over the losses (batches of one mean, already weighted) before any absolute value is taken,
    in float32, by one backward pass a batch that stops at the tensors which the score needs.

    Args:
        layers: the layers to score; their weights must require gradients.
        losses: scalar losses, one a batch; lazily made, so that only one graph is alive at a time.
        score: name of the score.

    Returns:
        (filters,) float32 on the layers' device, by flat index of :class:`FilterMask`.

    Raises:
        ValueError: if the score is unknown or there is no loss.
    """
    if score not in SCORES:
        raise ValueError(f"score: expected one of {sorted(SCORES)}, but got {score!r}.")
    wanted = [_differentiated(layer, score) for layer in layers]
    tensors = [tensor for keys in wanted for tensor in keys.values()]
    sums: list[Tensor] = []
    for loss in losses:
        grads = torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True)
        filled = [grad.float() for grad in grads]
        if sums:
            torch._foreach_add_(sums, filled)
        else:
            sums = filled
    if not sums:
        raise ValueError("losses: there is no batch to score.")
    remaining = iter(sums)
    pieces = [
        SCORES[score](layer, {key: next(remaining) for key in keys}) for layer, keys in zip(layers, wanted, strict=True)
    ]
    return torch.cat(pieces)

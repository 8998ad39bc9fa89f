"""Score filters by what a gradient says about them.

Each score maps layers and the losses of batches to one number a filter, for all filters of a layer at once. The larger
the score, the sooner the filter goes. Gradients are summed over the losses (batches of one mean, already weighted) and
over processes, before any absolute value is taken, in float32, by one backward pass a batch that stops at the tensors
which the score needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor

from lightning_unlearn.filters.gradients import gradients
from lightning_unlearn.filters.layer import FilterLayer
from lightning_unlearn.filters.mask import FilterMask
from lightning_unlearn.processes import ALONE, Processes

__all__ = ["SCORES", "Score", "mean_abs_gradient", "score_filters", "taylor"]

Score = Literal["mean_abs_grad", "taylor"]
"""By what filters are ranked: the mean absolute gradient, as the paper has it, or the signed first-order change."""


def mean_abs_gradient(layers: Sequence[FilterLayer], losses: Iterable[Tensor], processes: Processes = ALONE) -> Tensor:
    """Mean absolute gradient of each filter, ξ = ‖∂L/∂W_i‖₁ / size(W_i), (filters,) float32.

    The score of Dunnett et al. (2024), arXiv 2405.03918.

    Args:
        layers: the layers to score; their weights must require gradients.
        losses: scalar losses, one a batch, made one by one; with several processes those of this one, maybe none.
        processes: who scores together.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_unlearn.filters import FilterLayer, mean_abs_gradient
        >>> layer = FilterLayer("conv", nn.Conv2d(1, 2, 2, bias=False))
        >>> factors = torch.tensor([[[[1.0, -1.0], [2.0, 0.0]]], [[[0.0, 0.0], [0.0, -2.0]]]])
        >>> mean_abs_gradient([layer], ((factors * layer.weight).sum() for _ in range(1)))
        tensor([1.0000, 0.5000])
    """
    summed = _summed([layer.weight for layer in layers], losses, processes)
    return torch.cat(
        [
            layer.per_filter(gradient.abs()) / (gradient.numel() // layer.channels)
            for layer, gradient in zip(layers, summed, strict=True)
        ]
    )


def taylor(layers: Sequence[FilterLayer], losses: Iterable[Tensor], processes: Processes = ALONE) -> Tensor:
    """By how much the loss is predicted to fall, to first order, if the channel is zeroed, (filters,) float32, signed.

    Zeroing a channel scales it from m = 1 to m = 0, and the loss changes by about −∂L/∂m = −Σ w·∂L/∂w, the sum over
    what :meth:`FilterMask.scaled` scales: γ and β of the norm that consumes the channel, or else weight and bias.

    Args:
        layers: the layers to score.
        losses: scalar losses, one a batch. Each must be computed only when it is asked for, as a generator does, since
            the channels can be scaled only meanwhile.
        processes: who scores together.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_unlearn.filters import FilterLayer, taylor
        >>> convolution = nn.Conv2d(1, 1, 1)
        >>> _ = nn.init.constant_(convolution.weight, 3.0), nn.init.constant_(convolution.bias, 1.0)
        >>> layer = FilterLayer("conv", convolution)
        >>> taylor([layer], ((2 * convolution.weight - convolution.bias).sum() for _ in range(1)))
        tensor([5.])
    """
    mask = FilterMask(layers)
    scales = torch.ones(mask.total, device=layers[0].weight.device, requires_grad=True)
    (gradient,) = _summed([scales], losses, processes, lambda: mask.scaled(scales))
    return gradient


SCORES: dict[Score, Callable[[Sequence[FilterLayer], Iterable[Tensor], Processes], Tensor]] = {
    "mean_abs_grad": mean_abs_gradient,
    "taylor": taylor,
}


def score_filters(
    layers: Sequence[FilterLayer],
    losses: Iterable[Tensor],
    score: Score = "mean_abs_grad",
    processes: Processes = ALONE,
) -> Tensor:
    """Score all filters of all layers against the sum of ``losses``.

    Args:
        layers: the layers to score; their weights must require gradients.
        losses: scalar losses, one a batch; lazily made, so that only one graph is alive at a time.
        score: name of the score.
        processes: who scores together, each with losses of its own images.

    Returns:
        (filters,) float32 on the layers' device, by flat index of :class:`FilterMask`.

    Raises:
        ValueError: if the score is unknown, there is no loss, or a loss depends on no filter.
    """
    if score not in SCORES:
        raise ValueError(f"score: expected one of {sorted(SCORES)}, but got {score!r}.")
    return SCORES[score](layers, losses, processes)


def _summed(
    tensors: Sequence[Tensor],
    losses: Iterable[Tensor],
    processes: Processes,
    scaled: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> list[Tensor]:
    """Gradients of the sum of ``losses`` of all processes, in float32."""
    sums: list[Tensor] = []
    batches, connected = 0, 0
    remaining = iter(losses)
    while True:
        with scaled():  # anew for each loss: the backward pass of one batch frees what it came through
            loss = next(remaining, None)
            if loss is None:
                break
            found = gradients(loss, tensors)
        batches += 1
        connected += any(gradient is not None for gradient in found)
        known = [
            torch.zeros_like(tensor, dtype=torch.float32) if gradient is None else gradient.float()
            for tensor, gradient in zip(tensors, found, strict=True)
        ]
        if sums:
            torch._foreach_add_(sums, known)
        else:
            sums = known
    # A process without images, or one that found something wrong, still takes part: the others wait for it.
    sums = sums or [torch.zeros_like(tensor, dtype=torch.float32) for tensor in tensors]
    counts = torch.tensor([float(batches), float(connected)])
    processes.sum([*sums, counts])
    if not counts[0]:
        raise ValueError("losses: there is no batch to score.")
    if counts[1] != counts[0]:
        raise ValueError(
            "model: the loss does not depend on any filter; check that logits are computed from the convolutions, "
            "and are not detached."
        )
    return sums

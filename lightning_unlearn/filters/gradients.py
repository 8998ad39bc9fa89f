"""Gradients of a loss by some of the tensors that it was computed with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["gradients"]


def gradients(
    loss: Tensor, tensors: Sequence[Tensor], vector: Tensor | None = None, *, keep: bool = False, graph: bool = False
) -> tuple[Tensor | None, ...]:
    """∂loss/∂tensor for each tensor, or None where the loss does not depend on it.

    A model that checkpoints computes its forward pass again meanwhile. So call this where the model still computes what
    it did in that pass: for instance within the same :meth:`FilterMask.scaled`.

    Args:
        loss: a scalar, or with ``vector`` any tensor.
        tensors: by which to differentiate.
        vector: of the loss's shape, to multiply the gradients by.
        keep: keep the loss's graph for more.
        graph: make the gradients differentiable in their turn.

    Raises:
        ValueError: if the model checkpoints in the way for which torch gives no gradients by single tensors.

    Example:
        >>> import torch
        >>> from lightning_unlearn.filters.gradients import gradients
        >>> x, y = torch.tensor(3.0, requires_grad=True), torch.tensor(0.0, requires_grad=True)
        >>> gradients(x**2, [x, y])
        (tensor(6.), None)
    """
    if not loss.requires_grad:
        return (None,) * len(tensors)
    try:
        return torch.autograd.grad(loss, tensors, vector, retain_graph=keep, create_graph=graph, allow_unused=True)
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise ValueError(
            "model: it checkpoints (torch.utils.checkpoint) with use_reentrant=True, with which torch gives no "
            "gradients by single tensors; call checkpoint with use_reentrant=False."
        ) from error

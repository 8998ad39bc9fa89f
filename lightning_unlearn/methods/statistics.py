"""BatchNorm by the images at hand instead of by its running statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["refresh", "statistics_of_first"]


@contextmanager
def statistics_of_first(model: nn.Module, share: float) -> Iterator[None]:
    """Let every BatchNorm in eval mode normalise all of a batch by the statistics of the first images in it.

    So it would normalise the rest once its running statistics have followed the model's other weights, as they do in
    further training. Differentiable, also in the statistics; nothing in the model is changed.

    Args:
        model: a network in eval mode.
        share: which part of a batch counts, in (0, 1]; also where a network folds its images into more rows.

    Example:
        >>> import torch
        >>> from lightning_unlearn.methods.statistics import statistics_of_first
        >>> norm = torch.nn.BatchNorm1d(1, eps=1e-30).eval()
        >>> with statistics_of_first(norm, 0.5), torch.no_grad():
        ...     norm(torch.tensor([[1.0], [3.0], [2.0], [7.0]])).flatten()  # of 1 and 3 the mean is 2, the variance 1
        tensor([-1.,  1.,  0.,  5.])
    """
    hooks = [norm.register_forward_pre_hook(partial(_compensated, share=share)) for norm in _norms(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def refresh(model: nn.Module, forward: Callable[[Tensor], object], batches: Iterable[Tensor]) -> None:
    """Make the running statistics the means of those of some batches; all else stays, also flags and counts.

    Args:
        model: a network in eval mode, which but for the norms it stays in.
        forward: calls it.
        batches: (B, C, H, W) images on its device.
    """
    norms = [(norm, norm.momentum, norm.num_batches_tracked) for norm in _norms(model)]
    try:
        for norm, *_ in norms:
            norm.num_batches_tracked, norm.momentum, norm.training = torch.zeros((), dtype=torch.long), None, True
        for images in batches:
            forward(images)
    finally:
        for norm, momentum, counted in norms:
            norm.num_batches_tracked, norm.momentum, norm.training = counted, momentum, False


def _norms(model: nn.Module) -> Iterator[_BatchNorm]:
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            yield module


def _compensated(norm: _BatchNorm, given: tuple[Any, ...], *, share: float) -> tuple[Any, ...] | None:
    """The input that a norm makes of by its running statistics what it should make of this one by the first rows'."""
    rows: Tensor = given[0]
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    first = rows[: max(1, round(len(rows) * share))].float()
    if first.numel() == first.shape[1]:  # one value a channel has no variance
        return None
    variance_now, mean_now = torch.var_mean(first, [0, *range(2, first.ndim)], correction=0, keepdim=True)
    mean, variance = (old.view_as(mean_now) for old in (mean, variance))
    scale = ((variance + norm.eps) / (variance_now + norm.eps)).sqrt()
    return ((rows - mean_now) * scale + mean).to(rows.dtype), *given[1:]

"""What BatchNorm's running statistics become where a network's weights change, told by a few images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["Seen", "following", "has_statistics", "observed", "running_statistics", "settle"]


class _Moments(NamedTuple):
    """Of what a norm is given, and its running statistics, each (C,) in float32, or float64 for such a model."""

    mean: Tensor
    variance: Tensor
    running_mean: Tensor
    running_variance: Tensor


Seen: TypeAlias = Mapping[_BatchNorm, Sequence[_Moments | None]]  # of each norm, call by call


def has_statistics(model: nn.Module) -> bool:
    """Whether a network has any BatchNorm with running statistics."""
    return any(True for _ in _norms(model))


def running_statistics(model: nn.Module) -> list[Tensor]:
    """The means and variances themselves, each (C,)."""
    return [statistic for norm in _norms(model) for statistic in _running(norm)]


@contextmanager
def observed(model: nn.Module) -> Iterator[Seen]:
    """Note what a network's norms are given in the forward pass within the ``with`` block.

    Args:
        model: a network in eval mode, before its weights change.
    """
    seen: dict[_BatchNorm, list[_Moments | None]] = {norm: [] for norm in _norms(model)}

    def note(norm: _BatchNorm, given: tuple[Any, ...]) -> None:
        own = [_exact(statistic.detach()).clone() for statistic in _running(norm)]  # it may be given others
        found = _mean_and_variance(given[0].detach(), own[0], 1.0)
        seen[norm].append(found and _Moments(*found, *own))

    with _before_each_norm(model, note):
        yield seen


@contextmanager
def following(model: nn.Module, seen: Seen, share: float = 1.0) -> Iterator[Mapping[_BatchNorm, tuple[Tensor, Tensor]]]:
    """Let norms in eval mode normalise by what their running statistics would be, had they followed the weights.

    Statistics of few images are poor ones. But how they *change* can be told from few: the running μ and σ² are to the
    moments m and s² of some images before the change what the new ones are to m' and s'² of the same images now,

        σ' = σ · s'/s        μ' = μ · s'/s + (m' − m · s'/s)

    so that where no weight has changed nothing does. Differentiable, also in the statistics; the model stays as it is.

    Args:
        model: a network in eval mode.
        seen: what :func:`observed` noted of the same images before the change.
        share: which part of a batch these images are, its first, in (0, 1]; also where a network folds its images into
            more rows. All are normalised by what these tell.

    Yields:
        μ' and σ'² of each norm, as of its last call within the ``with`` block.

    Example:
        >>> import torch
        >>> from lightning_unlearn.methods.statistics import following, observed
        >>> norm, images = torch.nn.BatchNorm1d(1, eps=1e-30).eval(), torch.tensor([[1.0], [3.0]])
        >>> with observed(norm) as seen, torch.no_grad():
        ...     norm(images).flatten()  # running mean 0, variance 1
        tensor([1., 3.])
        >>> with following(norm, seen) as became, torch.no_grad():
        ...     norm(images / 2 + 5).flatten()  # what other weights before the norm make of the same images
        tensor([1., 3.])
        >>> [statistic.item() for statistic in became[norm]]
        [5.0, 0.25]
    """
    calls = {norm: cycle(moments) for norm, moments in seen.items()}
    became: dict[_BatchNorm, tuple[Tensor, Tensor]] = {}
    displaced: dict[_BatchNorm, tuple[dict[str, Any], dict[str, Any]]] = {}

    def follow(norm: _BatchNorm, given: tuple[Any, ...]) -> None:
        rows: Tensor = given[0]
        before = next(calls[norm])
        now = before and _mean_and_variance(rows, before.running_mean, share)
        if before is None or now is None:
            return
        growth = (now[1] + norm.eps) / (before.variance + norm.eps)
        mean = before.running_mean * growth.sqrt() + (now[0] - before.mean * growth.sqrt())
        variance = before.running_variance * growth + norm.eps * (growth - 1)
        became[norm] = mean, variance
        displaced[norm] = dict(norm._parameters), dict(norm._buffers)
        _substitute(norm, mean, variance)

    def put_back(norm: _BatchNorm, *_: object) -> None:
        if norm in displaced:
            parameters, buffers = displaced.pop(norm)
            norm._parameters.update(parameters)
            norm._buffers.update(buffers)

    handles = [norm.register_forward_hook(put_back, always_call=True) for norm in _norms(model)]
    try:
        with _before_each_norm(model, follow):
            yield became
    finally:
        for handle in handles:
            handle.remove()
        for norm in list(displaced):  # where a hook itself was broken off
            put_back(norm)


@torch.no_grad()
def settle(
    model: nn.Module, forward: Callable[[Tensor], object], batches: Iterable[Tensor], seen: Iterable[Seen]
) -> None:
    """Make the running statistics those that :func:`following` goes by, on average over images.

    Args:
        model: a network in eval mode.
        forward: calls it.
        batches: (B, C, H, W) images on its device.
        seen: what :func:`observed` noted of each batch before the change.
    """
    changes: dict[_BatchNorm, Any] = {}
    images = 0
    for batch, before in zip(batches, seen, strict=True):
        with following(model, before) as became:
            forward(batch)
        images += len(batch)
        for norm, statistics in became.items():
            # Differences, since a mean of equal values need not be that value to the last bit.
            change = torch.stack([new - old for new, old in zip(statistics, _running(norm), strict=True)])
            changes[norm] = changes.get(norm, 0.0) + len(batch) * change
    for norm, change in changes.items():
        for statistic, by in zip(_running(norm), (change / images).unbind(), strict=True):
            statistic.add_(by)
        _running(norm)[1].clamp_(min=0)  # at 0, where a channel is turned off, it might fall short by less than ε


def _norms(model: nn.Module) -> Iterator[_BatchNorm]:
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            yield module


def _running(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean, norm.running_var


def _exact(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class _MeanAndVariance(torch.autograd.Function):
    """Of each channel of the first rows, (C,), by distances to a mean that is near.

    On a CPU ten times faster than ``torch.var_mean``, and without what autograd does for slices and distances.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, near: Tensor, first: int) -> tuple[Tensor, Tensor]:
        ctx.first = first
        inner = tuple(range(2, rows.ndim))
        distances = _exact(rows[:first]) - near.view(-1, *(1,) * len(inner))
        ctx.values = distances[:, 0].numel()
        mean = distances.mean((0, *inner))
        square = torch.linalg.vector_norm(distances, dim=inner or 0, keepdim=not inner).square().sum(0) / ctx.values
        ctx.save_for_backward(rows, near + mean)
        return near + mean, (square - mean.square()).clamp_min(0)

    @staticmethod
    def backward(ctx: Any, *by: Tensor) -> tuple[Tensor, None, None]:
        rows, mean = ctx.saved_tensors
        by_mean, by_variance = (one / ctx.values for one in by)
        shape = -1, *(1,) * (rows.ndim - 2)
        slope, start = 2 * by_variance, by_mean - 2 * by_variance * mean
        gradient = torch.zeros_like(rows)
        torch.addcmul(start.view(shape), rows[: ctx.first], slope.view(shape), out=gradient[: ctx.first])
        return gradient, None, None


def _mean_and_variance(rows: Tensor, near: Tensor, share: float) -> tuple[Tensor, Tensor] | None:
    first = max(1, round(len(rows) * share))
    if first * rows[0].numel() == rows.shape[1]:  # one value a channel has no variance
        return None
    found: tuple[Tensor, Tensor] = _MeanAndVariance.apply(rows, near, first)
    return found


def _substitute(norm: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    """Let a norm go by other statistics, and its weight and bias pass on the gradients that these do not get."""
    own_mean, own_variance = _running(norm)
    fixed, spread = mean.detach(), variance.detach() + norm.eps
    weight = norm.weight if norm.affine else torch.ones_like(fixed)
    bias = norm.bias if norm.affine else torch.zeros_like(fixed)
    parameters: Any = {  # with the values that they had
        "weight": (weight * (spread / (variance + norm.eps)).sqrt()).to(weight.dtype),
        "bias": (bias + (fixed - mean) * (weight * spread.rsqrt())).to(bias.dtype),
    }
    norm._parameters.update(parameters)
    norm._buffers.update(running_mean=fixed.to(own_mean.dtype), running_var=variance.detach().to(own_variance.dtype))


@contextmanager
def _before_each_norm(model: nn.Module, hook: Callable[[Any, tuple[Any, ...]], Any]) -> Iterator[None]:
    handles = [norm.register_forward_pre_hook(hook) for norm in _norms(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

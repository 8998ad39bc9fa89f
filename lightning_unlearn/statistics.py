"""BatchNorm's running statistics: what they are, what they would become, and a network that no longer depends on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["Statistics", "going_by", "mixed", "moments", "rebase", "tracking_norms"]

Statistics: TypeAlias = Mapping[_BatchNorm, tuple[Tensor, Tensor]]
"""Mean and variance of each channel, (C,) in float32, or float64 for such a model, by norm."""


def tracking_norms(model: nn.Module) -> list[_BatchNorm]:
    """The norms with running statistics."""
    return [one for one in model.modules() if isinstance(one, _BatchNorm) and one.running_mean is not None]


@torch.no_grad()
def moments(
    model: nn.Module, forward: Callable[[Tensor], object], batches: Iterable[Tensor], *, refreshed: bool = False
) -> Statistics:
    """Measure what a network's norms are given.

    Args:
        model: a network in eval mode, which stays as it is.
        forward: calls it.
        batches: (B, C, H, W) images on its device.
        refreshed: let each norm already go by the moments of the batch, as in training, so that what is found are the
            running statistics that these images would give the network.

    Returns:
        The moments of each norm that is given more than one value a channel: of all images together, or those of the
        batches on average over images if they are ``refreshed``.

    Example:
        >>> import torch
        >>> from lightning_unlearn.statistics import moments
        >>> norm = torch.nn.BatchNorm1d(1).eval()
        >>> found = moments(norm, norm, [torch.tensor([[1.0], [3.0]])])
        >>> [moment.item() for moment in found[norm]]
        [2.0, 1.0]
    """
    sums: dict[_BatchNorm, Tensor] = {}
    images: dict[_BatchNorm, int] = {}
    values: dict[_BatchNorm, int] = {}
    norms = tracking_norms(model)
    if not norms:
        return {}
    own = {norm: dict(norm._buffers) for norm in norms}

    def note(norm: _BatchNorm, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        given = args[0] if args else kwargs["input"]
        count = given[:, 0].numel()
        if refreshed and count < 2:
            return
        near = _exact(norm.running_mean)
        mean, variance = _mean_and_variance(given, near)
        second = variance if refreshed else variance + (mean - near).square()  # one batch's mean is not another's
        sums[norm] = sums.get(norm, 0.0) + len(given) * torch.stack([mean, second])
        images[norm] = images.get(norm, 0) + len(given)
        values[norm] = values.get(norm, 0) + count
        if refreshed:
            _go_by(norm, mean, variance)

    handles = [norm.register_forward_pre_hook(note, with_kwargs=True) for norm in norms]
    try:
        for batch in batches:
            forward(batch)
    finally:
        for handle in handles:
            handle.remove()
        for norm, buffers in own.items():
            norm._buffers.update(buffers)
    found = {}
    for norm in sums:
        if values[norm] < 2:
            continue
        mean, second = sums[norm] / images[norm]
        apart = torch.zeros_like(mean) if refreshed else mean - _exact(norm.running_mean)
        found[norm] = mean, (second - apart.square()).clamp_min(0)
    return found


def mixed(statistics: Statistics, share: float) -> Statistics:
    """Means, and geometric means of variances, of which some count ``share`` and the norms' own the rest."""
    found: dict[_BatchNorm, tuple[Tensor, Tensor]] = {}
    for norm, (mean, variance) in statistics.items():
        own_mean, own_variance = _exact(norm.running_mean), _exact(norm.running_var)
        found[norm] = own_mean.lerp(mean, share), own_variance ** (1 - share) * variance**share
    return found


@contextmanager
def going_by(statistics: Statistics) -> Iterator[None]:
    """Let norms in eval mode go by other statistics than their own within the ``with`` block."""
    own = {norm: dict(norm._buffers) for norm in statistics}
    try:
        for norm, (mean, variance) in statistics.items():
            _go_by(norm, mean, variance)
        yield
    finally:
        for norm, buffers in own.items():
            norm._buffers.update(buffers)


@torch.no_grad()
def rebase(norms: Iterable[_BatchNorm], before: Statistics, now: Statistics) -> None:
    """Give a network whose weights have changed the statistics that belong to it, and have it compute what it did.

    Left with the running statistics of former weights, it becomes another network once these are refreshed, as by
    further training. Moments s'² and m' of a few images with the weights as they are now tell what they would be then,
    but roughly. How statistics *change* is told well by few: where the same images had s² and m, running σ² and μ
    become σ²·s'²/s² and m' + (μ − m)·s'/s. But these hold what training had of triggered images. So halfway,

        σ'² = s'² · σ/s        μ' = m' + (μ − m)/2 · s'/s

    (with ε added to each variance), and γ and β make up for it: γ' = γ · σ'/σ, β' = β + γ · (μ' − μ)/σ. Channels whose
    γ is 0, such as pruned ones, stay as they are.

    Args:
        norms: in eval mode; those without γ and β are left as they are.
        before: :func:`moments` before the change.
        now: those of the same images now.

    Example:
        >>> import torch
        >>> from lightning_unlearn.statistics import moments, rebase
        >>> norm, images = torch.nn.BatchNorm1d(1).eval(), torch.tensor([[1.0], [3.0]])  # mean 2, variance 1
        >>> norm.running_mean.fill_(2.0)
        tensor([2.])
        >>> before = moments(norm, norm, [images])
        >>> images = images / 2 + 5  # what other weights before the norm make of the same images
        >>> former = norm(images)
        >>> rebase([norm], before, moments(norm, norm, [images]))
        >>> round(norm.running_mean.item(), 3), round(norm.running_var.item(), 3)
        (6.0, 0.25)
        >>> torch.allclose(norm(images), former)
        True
    """
    for norm in norms:
        if not norm.affine or norm not in before or norm not in now:
            continue
        (mean, variance), (new_mean, new_variance) = before[norm], now[norm]
        running_mean, weight, bias = (_exact(one) for one in (norm.running_mean, norm.weight, norm.bias))
        spread, former, new = (one + norm.eps for one in (_exact(norm.running_var), variance, new_variance))
        then_mean = new_mean + (running_mean - mean) / 2 * (new / former).sqrt()
        then_spread = new * (spread / former).sqrt()
        alive = weight != 0
        for tensor, value in (
            (norm.weight, weight * (then_spread / spread).sqrt()),
            (norm.bias, bias + weight * (then_mean - running_mean) * spread.rsqrt()),
            (norm.running_mean, then_mean),
            (norm.running_var, (then_spread - norm.eps).clamp_min(0)),
        ):
            assert tensor is not None
            tensor.copy_(torch.where(alive, value, tensor))


def _go_by(norm: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    for name, value in (("running_mean", mean), ("running_var", variance)):
        own = norm._buffers[name]
        assert own is not None
        norm._buffers[name] = value.to(own.dtype)


def _mean_and_variance(rows: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
    """Of each channel, (C,), by distances to a mean that is near: on a CPU ten times faster than ``torch.var_mean``."""
    inner = tuple(range(2, rows.ndim))
    distances = _exact(rows) - near.view(-1, *(1,) * len(inner))
    mean = distances.mean((0, *inner))
    lengths = torch.linalg.vector_norm(distances, dim=inner) if inner else distances
    square = lengths.square().sum(0) / distances[:, 0].numel()
    return near + mean, (square - mean.square()).clamp_min(0)


def _exact(tensor: Tensor | None) -> Tensor:
    """In float32 at least."""
    assert tensor is not None
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

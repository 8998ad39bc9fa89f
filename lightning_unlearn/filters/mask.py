"""Prune filters reversibly: zero them, undo exactly, keep them zero while an optimizer steps."""

from __future__ import annotations

import inspect
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the usual name

from lightning_unlearn.filters.layer import ChannelTensor, FilterLayer

__all__ = ["FilterId", "FilterMask"]

FilterId = tuple[str, int]
"""A filter: (qualified name of its convolution, index of its output channel)."""
_Where = tuple[Tensor, ...] | EllipsisType
_Saved = tuple[Callable[[], Tensor], _Where, Tensor]  # a tensor looked up anew, where in it, and what stood there


class FilterMask:
    """Which filters are pruned, and the values that pruning overwrote.

    Pruning filter ``i`` zeroes its weight, its bias and the entries ``i`` of the norms that consume it. Zeroing the
    filter alone is not enough: the norm would go on emitting the constant β − γμ/σ. Parameters stay plain tensors
    with zeros in them, so checkpoints, ``deepcopy`` and export need to know nothing of it.

    Filters also have one flat index, by which scores over all layers are laid out: layer by layer in order.

    Args:
        layers: what :func:`find_filters` found.
        pruned: filters to prune for good, as no step that could be undone: bools by layer as in :meth:`state_dict`.

    Raises:
        ValueError: if ``pruned`` is of other layers.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_unlearn.filters import FilterMask, find_filters
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()).eval()
        >>> mask = FilterMask(find_filters(net, torch.rand(1, 1, 4, 4)))
        >>> mask.prune([("0", 1)])
        >>> net[0].weight[1].abs().sum().item(), mask.to_dict()
        (0.0, {'0': [1]})
        >>> mask.undo()
        >>> mask.to_dict()
        {}
    """

    def __init__(self, layers: Sequence[FilterLayer], pruned: Mapping[str, Tensor] | None = None) -> None:
        self.layers = tuple(layers)
        self._by_name = {layer.name: layer for layer in self.layers}
        self._ends = list(accumulate(layer.channels for layer in self.layers))
        self._starts = {layer.name: end - layer.channels for layer, end in zip(self.layers, self._ends, strict=True)}
        # What was pruned, what stood there before, and what was kept of each channel.
        self._steps: list[tuple[list[FilterId], list[_Saved], Tensor]] = []
        self._kept = torch.ones(self.total)
        self._pruned: dict[FilterId, int] = {}  # flat index of each pruned filter, in the order of pruning
        if pruned is not None:
            self.load_state_dict(pruned)
            self._steps.clear()

    @property
    def total(self) -> int:
        """Number of filters in all layers."""
        return self._ends[-1] if self._ends else 0

    @property
    def pruned(self) -> tuple[FilterId, ...]:
        """The pruned filters in the order of pruning."""
        return tuple(self._pruned)

    @property
    def kept(self) -> Tensor:
        """What is left of each channel by flat index, (total,) float32 on the CPU in [0, 1]: 0 where it is pruned."""
        return self._kept.masked_fill(self.flat(), 0)

    @property
    def steps(self) -> int:
        """How many calls of :meth:`prune`, :meth:`fold` and :meth:`note` can be undone."""
        return len(self._steps)

    def locate(self, index: int) -> FilterId:
        """Name the filter with the flat index ``index``."""
        if not 0 <= index < self.total:
            raise IndexError(f"index: {index} is not among the {self.total} filters.")
        position = bisect_right(self._ends, index)
        layer = self.layers[position]
        return layer.name, index - (self._ends[position] - layer.channels)

    def flat(self, device: torch.device | str = "cpu") -> Tensor:
        """The mask as one bool tensor over all filters, (total,): true where pruned."""
        return _bools(list(self._pruned.values()), self.total, device)

    def prune(self, filters: Sequence[FilterId]) -> None:
        """Zero filters, as one step that :meth:`undo` takes back.

        Raises:
            ValueError: if a layer or filter does not exist, is named twice or is pruned already; nothing is changed.
        """
        chosen = [(str(name), int(index)) for name, index in filters]
        taken: dict[FilterId, int] = {}
        for name, index in chosen:
            if name not in self._by_name or not 0 <= index < self._by_name[name].channels:
                raise ValueError(
                    f"filters: there is no filter {index} of layer {name!r}; layers are {sorted(self._by_name)}."
                )
            if (name, index) in self._pruned or (name, index) in taken:
                raise ValueError(f"filters: filter {index} of layer {name!r} is pruned already or named twice.")
            taken[name, index] = self._starts[name] + index
        saved: list[_Saved] = []
        for name, indices in _by_layer(chosen).items():
            layer = self._by_name[name]
            saved += [(place, where, place()[where]) for place, where in _places(layer, indices)]
            layer.zero(_bools(indices, layer.channels, layer.weight.device))
        self._steps.append((chosen, saved, self._kept))
        self._pruned.update(taken)

    @torch.no_grad()
    def fold(self, scales: Tensor, *, zero_below: float = 0.0) -> None:
        """Scale every channel by a factor, exactly and for good, and prune those whose factor is at or below a limit.

        Args:
            scales: (total,) factors in [0, 1] by flat index.
            zero_below: prune instead of scale where the factor is at most this.
        """
        filters = [self.locate(index) for index in (scales <= zero_below).nonzero().flatten().tolist()]
        filters = [filter_id for filter_id in filters if filter_id not in self._pruned]
        saved: list[_Saved] = []
        for layer, factors in zip(self.layers, self.split(scales), strict=True):
            for channels, scaled in layer.scaled(factors):
                saved.append((partial(_tensor, channels), ..., channels.tensor.detach().clone()))
                channels.tensor.copy_(scaled)
        before = self._kept
        self.prune(filters)
        pruned = self._steps.pop()  # one call, one step to undo
        self._steps.append((pruned[0], [*saved, *pruned[1]], before))
        self._kept = before * scales.float().cpu()

    def note(self, tensors: Iterable[ChannelTensor]) -> None:
        """Note tensors that something else is about to change, as one step that :meth:`undo` takes back."""
        saved: list[_Saved] = [(partial(_tensor, one), ..., one.tensor.detach().clone()) for one in tensors]
        self._steps.append(([], saved, self._kept))

    def split(self, flat: Tensor) -> tuple[Tensor, ...]:
        """Cut a flat tensor, (total,), into one piece a layer.

        Raises:
            ValueError: if it is of another shape.
        """
        if flat.shape != (self.total,):
            raise ValueError(
                f"flat: expected one value for each of the {self.total} filters, shape ({self.total},), "
                f"but got shape {tuple(flat.shape)}."
            )
        return torch.split(flat, [layer.channels for layer in self.layers])

    @torch.no_grad()
    def undo(self, steps: int = 1) -> None:
        """Take back the last ``steps`` steps, bit for bit.

        Values that an optimizer changed since in *other* filters stay as they are.

        Raises:
            ValueError: if there are fewer steps.
        """
        if not 0 <= steps <= len(self._steps):
            raise ValueError(f"steps: cannot undo {steps} of {len(self._steps)} steps.")
        for _ in range(steps):
            filters, saved, self._kept = self._steps.pop()
            for place, where, before in reversed(saved):
                tensor = place()  # the model may have moved to another device or type meanwhile
                where = where if where is ... else tuple(index.to(tensor.device) for index in where)
                tensor[where] = before.to(tensor)
            for filter_id in filters:
                del self._pruned[filter_id]

    @contextmanager
    def scaled(self, scales: Tensor) -> Iterator[None]:
        """Multiply every channel by a factor within the ``with`` block, differentiably, weights untouched.

        The forward pass inside is exactly what :meth:`fold` would leave for good, but for one thing: a filter that
        ``fold`` prunes counts no longer in the statistics of a GroupNorm or LayerNorm.

        Args:
            scales: (total,) factors by flat index, on the model's device.
        """
        displaced: list[tuple[ChannelTensor, Tensor]] = []
        try:
            for layer, factors in zip(self.layers, self.split(scales), strict=True):
                for channels, scaled in layer.scaled(factors):
                    is_mean = channels.attribute == "running_mean" and scaled.requires_grad
                    displaced.append((channels, channels.substitute(scaled.as_subclass(_Mean) if is_mean else scaled)))
            yield
        finally:
            for channels, tensor in displaced:
                channels.substitute(tensor)

    def hold(self) -> None:
        """Zero the pruned filters again, for instance after an optimizer step that let them regrow."""
        for name, indices in _by_layer(self.pruned).items():
            layer = self._by_name[name]
            layer.zero(_bools(indices, layer.channels, layer.weight.device))

    @contextmanager
    def held(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Keep pruned filters at zero through every step of ``optimizer`` within the ``with`` block."""
        masks = [
            (self._by_name[name], _bools(indices, self._by_name[name].channels, self._by_name[name].weight.device))
            for name, indices in _by_layer(self.pruned).items()
        ]

        def zero_again(*_: Any) -> None:
            for layer, channels in masks:
                layer.zero(channels)

        handle = optimizer.register_step_post_hook(zero_again)
        try:
            yield
        finally:
            handle.remove()

    def forget(self, optimizer: torch.optim.Optimizer) -> None:
        """Zero what an optimizer remembers of the pruned filters, such as momenta, by which they would grow back."""

        def memories(tensor: Tensor) -> list[Tensor]:
            state = optimizer.state.get(tensor, {})
            return [value for value in state.values() if isinstance(value, Tensor) and value.shape == tensor.shape]

        for name, indices in _by_layer(self.pruned).items():
            layer = self._by_name[name]
            layer.zero(_bools(indices, layer.channels, layer.weight.device), memories)

    def to_dict(self) -> dict[str, list[int]]:
        """Pruned filters by layer as plain Python, sorted; layers without any are left out."""
        by_layer = _by_layer(self.pruned)
        return {layer.name: sorted(by_layer[layer.name]) for layer in self.layers if layer.name in by_layer}

    def state_dict(self) -> dict[str, Tensor]:
        """The mask as bool tensors on the CPU, (channels,) a layer, true where pruned."""
        by_layer = _by_layer(self.pruned)
        return {layer.name: _bools(by_layer.get(layer.name, []), layer.channels, "cpu") for layer in self.layers}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Prune what another mask of the same network has pruned, and this one has not.

        Raises:
            ValueError: if the layers or their sizes differ.
        """
        own = {layer.name: layer.channels for layer in self.layers}
        given = {name: bools.numel() for name, bools in state.items()}
        if own != given:
            raise ValueError(f"state: it masks layers {given}, but the model has {own}.")
        wanted = [(name, int(i)) for name, bools in state.items() for i in bools.nonzero().flatten().tolist()]
        self.prune([filter_id for filter_id in wanted if filter_id not in self._pruned])


class _Mean(Tensor):
    """A running mean that gradients reach, though torch's norms are not differentiable in theirs.

    The norm of x with running mean μ is computed as that of x − μ with running mean 0.
    """

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func not in (F.batch_norm, F.instance_norm):
                return func(*args, **(kwargs or {}))
            bound = inspect.signature(func).bind(*args, **(kwargs or {}))
            images, mean = bound.arguments["input"], bound.arguments["running_mean"]
            bound.arguments["input"] = images - mean.view(-1, *(1,) * (images.ndim - 2))
            bound.arguments["running_mean"] = torch.zeros_like(mean)
            return func(*bound.args, **bound.kwargs)


def _places(layer: FilterLayer, indices: Sequence[int]) -> Iterator[tuple[Callable[[], Tensor], _Where]]:
    """Where everything is that zeroing filters of a layer overwrites."""
    where = torch.tensor(indices, device=layer.weight.device)
    per_group = layer.by_filter(layer.weight.detach()).shape[1]
    yield partial(_filters, layer), (where // per_group, where % per_group)
    for companion in layer.companions:
        yield partial(_channels, companion), (where,)


def _filters(layer: FilterLayer) -> Tensor:
    return layer.by_filter(layer.weight.detach())


def _channels(companion: ChannelTensor) -> Tensor:
    return companion.by_channel(companion.tensor.detach())


def _tensor(channels: ChannelTensor) -> Tensor:
    return channels.tensor.detach()


def _by_layer(filters: Sequence[FilterId]) -> dict[str, list[int]]:
    layers: dict[str, list[int]] = {}
    for name, index in filters:
        layers.setdefault(name, []).append(index)
    return layers


def _bools(indices: Sequence[int], size: int, device: torch.device | str) -> Tensor:
    bools = torch.zeros(size, dtype=torch.bool)
    bools[list(indices)] = True
    return bools.to(device)

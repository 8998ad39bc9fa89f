"""Find convolutions and the norm that consumes each, by watching one forward pass.

Parameter order does not tell which norm follows a convolution: in a pre-activation ResNet the next norm in order
belongs to the block's *input*, a shortcut convolution has none at all, and a classifier may come next. So the forward
pass is watched at the level of torch functions: a convolution's output is remembered, followed through operations that
keep channels apart (activations, pooling, dropout, permutations), and a norm that receives it is the one that consumes
it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name
from torch.nn.utils import parametrize, prune
from torch.overrides import TorchFunctionMode

from lightning_unlearn.filters.layer import ChannelTensor, FilterLayer

__all__ = ["find_filters"]

_NORMS = frozenset({F.batch_norm, F.instance_norm, F.group_norm, F.layer_norm, F.rms_norm})
_CONVOLUTIONS = frozenset(
    {torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d}
)
# Operations after which channel c still comes from filter c alone, by name, since many exist as function and method.
_KEEP_CHANNELS = frozenset(
    (
        *("relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "elu", "elu_", "celu", "selu", "gelu", "silu", "mish"),
        *("hardswish", "hardtanh", "hardtanh_", "hardsigmoid", "sigmoid", "tanh", "softplus", "prelu"),
        *("dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout"),
        *("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d"),
        *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
        *("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"),
        *("interpolate", "pad", "contiguous", "clone", "detach", "to", "float", "half", "bfloat16", "double"),
        *("requires_grad_", "clamp", "clamp_"),
    )
)
_PERMUTE = frozenset({"permute", "transpose", "swapaxes", "movedim"})


class _Origins(TorchFunctionMode):
    """Follows each convolution's channels from its output to the norms that consume them."""

    def __init__(self, convolutions: dict[int, str]) -> None:
        super().__init__()
        self.convolutions = convolutions
        self.ran: set[str] = set()
        # For each norm that ran: the convolution, the channel axis from the end, the norm's arguments.
        self.consumed: list[tuple[str | None, int, dict[str, Any]]] = []
        # The tensor is kept beside its origin so that its id is not given to another one.
        self._origin: dict[int, tuple[Tensor, str, int]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        source = self._origin.get(id(args[0])) if args else self._origin.get(id(kwargs.get("input")))
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor):
            return result
        origin = self._origin_after(func, args, kwargs, source, result)
        if origin is None:
            self._origin.pop(id(result), None)  # an in-place operation, such as a residual sum, may have mixed channels
        else:
            self._origin[id(result)] = (result, *origin)
        return result

    def _origin_after(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        source: tuple[Tensor, str, int] | None,
        result: Tensor,
    ) -> tuple[str, int] | None:
        if func in _CONVOLUTIONS:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            name = self.convolutions.get(id(weight))
            if name is None:
                return None
            self.ran.add(name)
            return name, result.ndim - weight.ndim + 1
        if func in _NORMS:
            arguments = dict(inspect.signature(func).bind(*args, **kwargs).arguments)
            inputs: Tensor = arguments["input"]
            name, axis = (None, 0) if source is None else source[1:]
            self.consumed.append((name, axis - inputs.ndim, arguments))
            return None if name is None else (name, axis)
        if source is None:
            return None
        _, name, axis = source
        operation = func.__name__
        if operation in _KEEP_CHANNELS:
            return name, axis
        if operation in _PERMUTE:
            # The same permutation of the axes' numbers tells where the channel axis went.
            shape = torch.empty(tuple(range(1, result.ndim + 1)), device="meta")
            return name, list(func(shape, *args[1:], **kwargs).shape).index(axis + 1)
        return None


def find_filters(
    model: nn.Module, images: Tensor, forward: Callable[[Tensor], Any] | None = None
) -> tuple[FilterLayer, ...]:
    """Find every convolution that a forward pass uses, with the norms that consume its channels.

    Works for ``Conv1d`` to ``ConvTranspose3d``, grouped and depthwise, whatever the order of parameters. A norm that
    is shared between several convolutions, or that also normalises something else, is left out: zeroing it for one
    convolution would hurt the other.

    Args:
        model: any module; it should be in eval mode, since the pass would otherwise update running statistics.
        images: (N, C, ...) a batch that ``forward`` accepts; one image will do.
        forward: how the model is called; the model itself by default.

    Returns:
        One :class:`FilterLayer` a convolution, in the order of ``model.named_modules()``.

    Raises:
        ValueError: if the model is scripted, holds no convolution that the forward pass uses, or if a
            convolution is pruned by ``torch.nn.utils.prune`` or parametrised, so that its weight cannot be written.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_unlearn.filters import find_filters
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> layers = find_filters(net.eval(), torch.rand(1, 3, 8, 8))
        >>> [(layer.name, layer.channels, len(layer.norms)) for layer in layers]
        [('0', 8, 2), ('3', 4, 0)]
    """
    convolutions = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.modules.conv._ConvNd)
    }
    _refuse_unwritable(model, convolutions)
    by_weight: dict[int, str] = {}
    for name, module in convolutions.items():
        by_weight.setdefault(id(module.weight), name)
    origins = _Origins(by_weight)
    with torch.no_grad(), origins:
        (forward or model)(images)
    if not origins.ran:
        raise ValueError(
            f"model: {type(model).__name__} ran no convolution on images of shape {tuple(images.shape)}, so there are "
            "no filters to score or prune; pass a convolutional image classifier."
        )
    norms = _norms_by_convolution(model, origins)
    return tuple(
        FilterLayer(name, conv, norms.get(name, ())) for name, conv in convolutions.items() if name in origins.ran
    )


def _refuse_unwritable(model: nn.Module, convolutions: dict[str, nn.modules.conv._ConvNd]) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError("model: a scripted module cannot be traced; pass the eager module it was scripted from.")
    if prune.is_pruned(model):
        raise ValueError(
            "model: it is already pruned with torch.nn.utils.prune, whose hooks would undo the repair at the next "
            "forward pass; call torch.nn.utils.prune.remove on each pruned tensor first."
        )
    for name, module in convolutions.items():
        if parametrize.is_parametrized(module) or "weight" not in module._parameters:
            raise ValueError(
                f"model: the weight of convolution {name!r} is computed by a parametrisation (such as weight or "
                "spectral norm) and cannot be zeroed; call "
                "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight') first."
            )


def _norms_by_convolution(model: nn.Module, origins: _Origins) -> dict[str, tuple[ChannelTensor, ...]]:
    owners = {
        id(tensor): (module, attribute)
        for module in model.modules()
        for attribute, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    }
    consumers: dict[int, set[str | None]] = {}  # which convolutions feed each tensor of a norm, None for anything else
    found: dict[int, tuple[str, ChannelTensor]] = {}
    for name, axis, arguments in origins.consumed:
        keys = ("weight", "bias") if arguments.get("weight") is not None else ("running_mean",)
        for tensor in (arguments.get(key) for key in keys):
            if not isinstance(tensor, Tensor) or id(tensor) not in owners:
                continue
            consumers.setdefault(id(tensor), set()).add(name)
            if name is not None:
                # Per-channel vectors have one axis; a LayerNorm's weight ends with the input's last axes.
                is_vector = "normalized_shape" not in arguments
                position = 0 if is_vector else axis + tensor.ndim
                if 0 <= position < tensor.ndim:
                    found[id(tensor)] = (name, ChannelTensor(*owners[id(tensor)], axis=position))
    by_convolution: dict[str, tuple[ChannelTensor, ...]] = {}
    for key, (name, channels) in found.items():
        if consumers[key] == {name}:
            by_convolution[name] = (*by_convolution.get(name, ()), channels)
    return by_convolution

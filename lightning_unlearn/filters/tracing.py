"""Find convolutions and the norm that consumes each, by watching one forward pass.

Parameter order does not tell which norm follows a convolution: in a pre-activation ResNet the next norm in order
belongs to the block's *input*, a shortcut convolution has none at all, and a classifier may come next. So the forward
pass is watched at the level of torch functions: a convolution's output is remembered, followed through operations that
keep channels apart (activations, pooling, dropout, permutations), and a norm that receives it is the one that consumes
it.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name
from torch.nn.utils import parametrize, prune
from torch.overrides import TorchFunctionMode

from lightning_unlearn.filters.layer import ChannelTensor, FilterLayer
from lightning_unlearn.intact import as_written

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
# How to make weights that hooks compute plain, in torch.nn.utils, by the hook's class; else they are parametrised.
_REMOVALS = {"WeightNorm": "remove_weight_norm(module)", "SpectralNorm": "remove_spectral_norm(module)"}
_REMOVAL = "parametrize.remove_parametrizations(module, 'weight')"
_PERMUTE = frozenset({"permute", "transpose", "swapaxes", "movedim"})


class _Origin(NamedTuple):
    """Where the channels of a tensor come from."""

    convolution: str
    axis: int  # the dimension that runs over the filters
    normed: bool  # whether a norm stands between


class _Origins(TorchFunctionMode):
    """Follows each convolution's channels from its output to the norms that consume them."""

    def __init__(self, convolutions: dict[int, str]) -> None:
        super().__init__()
        self.convolutions = convolutions
        self.ran: set[str] = set()
        self.computed = 0  # how many convolutions ran with a weight that depends on parameters, but is no module's
        self.consumed: list[tuple[_Origin | None, dict[str, Any]]] = []  # for each norm that ran, its arguments
        self.escaped: set[str] = set()  # convolutions whose output something beside norms takes
        # The tensor is kept beside its origin so that its id is not given to another one.
        self._origin: dict[int, tuple[Tensor, _Origin]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        source = self._origin.get(id(args[0] if args else kwargs.get("input")))
        result = func(*args, **kwargs)
        if next(_tensors([result]), None) is None:  # a shape, for instance
            return result
        origin = self._origin_after(func, args, kwargs, source, result) if isinstance(result, Tensor) else None
        if func in _CONVOLUTIONS or (origin is None and func not in _NORMS):
            taken = (self._origin.get(id(tensor)) for tensor in _tensors([*args, *kwargs.values()]))
            self.escaped |= {found[1].convolution for found in taken if found is not None and not found[1].normed}
        if origin is None:
            self._origin.pop(id(result), None)  # an in-place operation, such as a residual sum, may have mixed channels
        else:
            self._origin[id(result)] = (result, origin)
        return result

    def _origin_after(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        source: tuple[Tensor, _Origin] | None,
        result: Tensor,
    ) -> _Origin | None:
        if func in _CONVOLUTIONS:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            name = self.convolutions.get(id(weight))
            if name is None:
                self.computed += weight.requires_grad
                return None
            self.ran.add(name)
            return _Origin(name, result.ndim - weight.ndim + 1, normed=False)
        if func in _NORMS:
            origin = None if source is None else source[1]
            self.consumed.append((origin, dict(inspect.signature(func).bind(*args, **kwargs).arguments)))
            return None if origin is None else origin._replace(normed=True)
        if source is None:
            return None
        inputs, origin = source
        # Padding can add channels.
        if func.__name__ in _KEEP_CHANNELS and result.shape[origin.axis] == inputs.shape[origin.axis]:
            return origin
        if func.__name__ in _PERMUTE:
            # The same permutation of the axes' numbers tells where the channel axis went.
            shape = torch.empty(tuple(range(1, result.ndim + 1)), device="meta")
            return origin._replace(axis=list(func(shape, *args[1:], **kwargs).shape).index(origin.axis + 1))
        return None


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


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
        ValueError: if a part of the model is scripted, if it runs no convolution with a weight of its own, if a
            convolution is pruned by ``torch.nn.utils.prune`` or parametrised, so that its weight cannot be written, or
            shares it with another one, or if a batch norm has no running statistics.

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
        if (other := by_weight.setdefault(id(module.weight), name)) != name:
            raise ValueError(
                f"model: convolutions {other!r} and {name!r} share one weight, so that one's channels cannot be scaled "
                "without the other's; give one a copy: module.weight = nn.Parameter(module.weight.detach().clone())."
            )
    origins = _Origins(by_weight)
    probe = images.clone()  # a model may normalise its input in place
    with torch.enable_grad(), as_written(), origins:  # with gradients, which tell what is computed from parameters
        (forward or model)(probe)
    _refuse_batch_statistics(model, origins)
    if origins.computed:
        _tell_computed(origins, convolutions)
    if not origins.ran:
        raise ValueError(
            f"model: {type(model).__name__} ran no convolution on images of shape {tuple(images.shape)}, so there are "
            "no filters to score or prune; pass a convolutional image classifier."
        )
    norms, offsets = _norms_by_convolution(model, origins)
    return tuple(
        FilterLayer(name, convolution, norms.get(name, ()), offsets.get(name, ()))
        for name, convolution in convolutions.items()
        if name in origins.ran
    )


def _refuse_unwritable(model: nn.Module, convolutions: dict[str, nn.modules.conv._ConvNd]) -> None:
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) and (module is model or any(True for _ in module.parameters())):
            raise ValueError(
                f"model: a scripted module cannot be traced{f', as {name!r} is' if name else ''}; pass the eager "
                "module it was scripted from."
            )
    if prune.is_pruned(model):
        raise ValueError(
            "model: it is already pruned with torch.nn.utils.prune, whose hooks would undo the repair at the next "
            "forward pass; call torch.nn.utils.prune.remove on each pruned tensor first."
        )
    for name, module in convolutions.items():
        if parametrize.is_parametrized(module) or "weight" not in module._parameters:
            hooks = [type(hook).__name__ for hook in module._forward_pre_hooks.values()]
            removal = next((_REMOVALS[hook] for hook in hooks if hook in _REMOVALS), _REMOVAL)
            raise ValueError(
                f"model: the weight of convolution {name!r} is computed by a parametrisation (such as weight or "
                f"spectral norm) and cannot be zeroed; call torch.nn.utils.{removal} first."
            )


def _refuse_batch_statistics(model: nn.Module, origins: _Origins) -> None:
    """Refuse a model whose answer for one image depends on the others, by which no rate can be measured."""
    for _, arguments in origins.consumed:
        if model.training or not arguments.get("training"):
            continue
        names = [
            f"batch norm {name!r}"
            for name, module in model.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
            and module.weight is arguments.get("weight")
            and module.running_mean is arguments.get("running_mean")
        ]
        raise ValueError(
            f"model: {names[0] if names else 'a batch norm'} takes its statistics from the batch in eval mode, too, so "
            "that the answer for an image depends on the others in its batch; train the model with "
            "track_running_stats=True, or with GroupNorm or InstanceNorm in its place."
        )


def _tell_computed(origins: _Origins, convolutions: dict[str, nn.modules.conv._ConvNd]) -> None:
    """Warn of convolutions that cannot be pruned, or refuse them if there are no others."""
    others = [repr(name) for name in convolutions if name not in origins.ran]
    named = f" (with their own did not run: {', '.join(others[:5])})" if others else ""
    message = (
        f"model: {origins.computed} convolution{'s run' if origins.computed > 1 else ' runs'} with a weight that the "
        "forward pass computes (as weight standardisation does) or that no nn.Conv module holds, and cannot be pruned"
        f"{named}; put what is computed into a plain nn.Conv module first."
    )
    if not origins.ran:
        raise ValueError(message)
    warnings.warn(f"{message} They are left alone.", stacklevel=3)


_ByConvolution = dict[str, tuple[ChannelTensor, ...]]


def _norms_by_convolution(model: nn.Module, origins: _Origins) -> tuple[_ByConvolution, _ByConvolution]:
    """The ``norms`` and the ``offsets`` of each :class:`FilterLayer`."""
    owners = {
        id(tensor): (module, attribute)
        for module in model.modules()
        for attribute, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    }
    consumers: dict[int, set[str | None]] = {}  # which convolutions feed each tensor of a norm, None for anything else
    found: dict[int, tuple[str, bool, bool, ChannelTensor]] = {}  # convolution, is affine, is an offset, the tensor
    unscalable = set(origins.escaped)
    for origin, arguments in origins.consumed:
        if origin is not None and arguments.get("weight") is None:
            unscalable.add(origin.convolution)
        for role in ("weight", "bias", "running_mean"):
            tensor = arguments.get(role)
            if not isinstance(tensor, Tensor) or id(tensor) not in owners:
                continue
            consumers.setdefault(id(tensor), set()).add(None if origin is None else origin.convolution)
            position = None if origin is None else _position(origin.axis, tensor, arguments)
            if origin is not None and position is not None:
                channels = ChannelTensor(*owners[id(tensor)], axis=position)
                # Without a running mean a norm takes the filter's scale out again, so that γ must bring it back.
                is_offset = role != "weight" or arguments.get("running_mean") is None
                found[id(tensor)] = (origin.convolution, role != "running_mean", is_offset, channels)
    norms: _ByConvolution = {}
    offsets: _ByConvolution = {}
    for key, (name, is_affine, is_offset, channels) in found.items():
        if consumers[key] == {name}:
            if is_affine:
                norms[name] = (*norms.get(name, ()), channels)
            if is_offset and name in unscalable:
                offsets[name] = (*offsets.get(name, ()), channels)
    return norms, offsets


def _position(axis: int, tensor: Tensor, arguments: dict[str, Any]) -> int | None:
    """Which dimension of a norm's tensor runs over the channels that are dimension ``axis`` of its input, if any."""
    if "normalized_shape" not in arguments:
        return 0 if axis == 1 else None  # one value for each entry of the second dimension
    # A LayerNorm's tensors have the last dimensions of its input.
    position: int = axis + tensor.ndim - arguments["input"].ndim
    return position if position >= 0 else None

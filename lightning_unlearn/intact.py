"""Leave a model as it was found."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["as_written", "intact", "put_back"]


@contextmanager
def intact(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Work on a model in eval mode with gradients enabled, without autocast and uncompiled, and leave it intact.

    On leaving, every submodule's ``training`` flag, every parameter's ``requires_grad`` and ``.grad``, and the global
    random states (torch's, numpy's and Python's) are as they were. After an exception (Ctrl-C included), all parameters
    and buffers are too, bit for bit, and the very same tensors; without one, what was written into them stays.

    Args:
        model: any module.

    Yields:
        The model's parameters and buffers as they were on entering, for whoever wants to go back: by every name that
        they have, as in its ``state_dict``, but only one copy of each.

    Raises:
        ValueError: if weights hold no numbers, or none that can change.
    """
    _refuse_fixed(model)
    flags = {module: module.training for module in model.modules()}
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    copies = {tensor: tensor.detach().clone() for tensor in tensors.values()}
    # A scripted module makes its tensors anew whenever it is asked, and takes no others.
    eager = [module for module in flags if not isinstance(module, torch.jit.ScriptModule)]
    tables = [table for module in eager for table in (module._parameters, module._buffers)]
    places = [(table, name, tensor) for table in tables for name, tensor in table.items()]
    devices = sorted({t.device.index or 0 for t in copies if t.is_cuda})
    try:
        # A repair may be started inside a validation loop, where Lightning switches gradients off, and autocast on.
        with as_written(), _same_draws(devices), torch.inference_mode(False), torch.enable_grad(), _exact(copies):
            model.eval()
            for parameter, _, _ in parameters:
                parameter.grad = None
                if parameter.is_floating_point():
                    parameter.requires_grad_(True)
            yield {name: copies[tensor] for name, tensor in tensors.items()}
    except BaseException:
        _put_back(places, copies)
        raise
    finally:
        for module, training in flags.items():
            module.training = training
        for parameter, requires_grad, grad in parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad


def _refuse_fixed(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"model: its {name!r} is on the meta device and holds no numbers; load the weights first.")
        if parameter.is_inference():
            raise ValueError(
                f"model: its {name!r} was made inside torch.inference_mode and has no gradients; make the model "
                "outside of it, or give copy.deepcopy(model), which is called outside."
            )


def as_written() -> AbstractContextManager[Any]:
    """Run compiled parts as they were written: once compiled they pass over hooks that are registered later.

    Torch before 2.6 knows no such thing.
    """
    return torch.compiler.set_stance("force_eager") if hasattr(torch.compiler, "set_stance") else nullcontext()


@contextmanager
def _same_draws(devices: Sequence[int]) -> Iterator[None]:
    """Let what comes after draw the random numbers that it would have drawn without this."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def _exact(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Compute on the tensors' devices in the type that they have, new ones in float32, whatever a precision says.

    Lightning's precisions tell ``torch.autocast``, or with ``"64-true"`` and the like ``torch.set_default_dtype``.
    """
    default = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, default)
        torch.set_default_dtype(torch.float32)
        for device in sorted({tensor.device.type for tensor in tensors}):
            if torch.amp.is_autocast_available(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@torch.no_grad()
def put_back(model: nn.Module, original: Mapping[str, Tensor]) -> None:
    """Write into a model's parameters and buffers what they held, as :func:`intact` yields it."""
    for named in (model.named_parameters(), model.named_buffers()):
        for name, tensor in named:
            _write(tensor, original[name])


@torch.no_grad()
def _put_back(
    places: Sequence[tuple[MutableMapping[str, Any], str, Tensor | None]], copies: Mapping[Tensor, Tensor]
) -> None:
    try:
        for table, name, tensor in places:
            if table.get(name) is not tensor:  # a forward pass may put a new buffer in an old one's place
                table[name] = tensor
        for tensor, value in copies.items():
            _write(tensor, value)
    except KeyboardInterrupt:  # a second Ctrl-C would leave half of them
        _put_back(places, copies)


def _write(tensor: Tensor, value: Tensor) -> None:
    if tensor.layout is torch.strided:
        for dim, stride in enumerate(tensor.stride()):
            if stride == 0:  # `expand` was called: these numbers are one, which can be written only as one
                tensor, value = tensor.narrow(dim, 0, 1), value.narrow(dim, 0, 1)
    tensor.copy_(value)

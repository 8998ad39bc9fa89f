"""Leave a model as it was found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

__all__ = ["intact"]


@contextmanager
def intact(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Work on a model in eval mode with gradients enabled and without autocast, and leave it intact.

    On leaving, every submodule's ``training`` flag, every parameter's ``requires_grad`` and ``.grad``, and the global
    random state are as they were. After an exception (Ctrl-C included), all parameters and buffers are too, bit for
    bit; without one, what was written into them stays.

    Args:
        model: any module.

    Yields:
        The model's parameters and buffers as they were on entering, by name, for whoever wants to go back.
    """
    flags = {module: module.training for module in model.modules()}
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    devices = sorted({t.device.index or 0 for t in tensors.values() if t.is_cuda})
    try:
        # A repair may be started inside a validation loop, where Lightning switches gradients off, and autocast on.
        with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad(), _exact(tensors):
            model.eval()
            for parameter, _, _ in parameters:
                parameter.grad = None
                if parameter.is_floating_point():
                    parameter.requires_grad_(True)
            yield before
    except BaseException:
        _put_back(tensors, before)
        raise
    finally:
        for module, training in flags.items():
            module.training = training
        for parameter, requires_grad, grad in parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad


@contextmanager
def _exact(tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Compute on the tensors' devices in the type that they have, whatever ``torch.autocast`` was told outside."""
    with ExitStack() as stack:
        for device in sorted({tensor.device.type for tensor in tensors.values()}):
            if torch.amp.is_autocast_available(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@torch.no_grad()
def _put_back(tensors: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> None:
    try:
        for name, tensor in tensors.items():
            tensor.copy_(before[name])
    except KeyboardInterrupt:  # a second Ctrl-C would leave half of them
        _put_back(tensors, before)

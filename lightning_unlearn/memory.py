"""Errors that are the machine's; when memory runs out, try once with half as many images, then give up."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Concatenate, ParamSpec, Protocol, TypeVar

import torch

__all__ = ["is_of_machine", "is_out_of_memory", "tries_smaller_batches"]

_P = ParamSpec("_P")
_T = TypeVar("_T")
_Model = TypeVar("_Model")
_Images = TypeVar("_Images")
_Plan = TypeVar("_Plan", bound="_HasBatchSize")
_MACHINE = re.compile("CUDA|cuDNN|deterministic| device")
_MESSAGES = re.compile("out of memory|can't allocate memory|not enough memory", re.IGNORECASE)


class _HasBatchSize(Protocol):
    """A dataclass."""

    @property
    def batch_size(self) -> int: ...


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the device's or the host's memory is used up.

    Example:
        >>> from lightning_unlearn.memory import is_out_of_memory
        >>> is_out_of_memory(RuntimeError("CUDA out of memory.")), is_out_of_memory(RuntimeError("shapes differ"))
        (True, False)
    """
    # Not every device has an exception class of its own, and torch 2.4 has none for them all.
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(_MESSAGES.search(str(error))))


def is_of_machine(error: RuntimeError) -> bool:
    """Whether no images are to blame for an error, but memory, a device, where tensors are, or determinism.

    Example:
        >>> from lightning_unlearn.memory import is_of_machine
        >>> is_of_machine(RuntimeError("cuDNN error: ...")), is_of_machine(RuntimeError("shapes differ"))
        (True, False)
    """
    return is_out_of_memory(error) or isinstance(error, RecursionError) or bool(_MACHINE.search(str(error)))


def tries_smaller_batches(
    run: Callable[Concatenate[_Model, _Images, _Plan, _P], _T],
) -> Callable[Concatenate[_Model, _Images, _Plan, _P], _T]:
    """Run a function of a model, images and a plan once more with half of its ``batch_size`` when memory runs out.

    The function must leave everything as it was when it raises. With several processes there is no second try: the
    others would still be in the first.

    Raises:
        MemoryError: if there is no second try or it fails in the same way.
    """

    @functools.wraps(run)
    def wrapped(model: _Model, images: _Images, plan: _Plan, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        def attempt(size: int) -> _T:
            smaller: _Plan = replace(plan, batch_size=size)  # type: ignore[type-var]  # it is a dataclass
            return run(model, images, smaller, *args, **kwargs)

        size = plan.batch_size
        if size > 1 and not _several_processes():
            try:
                return attempt(size)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # The second try waits until the handler is left, since the exception keeps what was allocated alive.
            warnings.warn(
                f"batch_size: memory ran out with {size} images in a forward pass; the repair starts anew with "
                f"{size // 2}.",
                stacklevel=2,
            )
            size //= 2
        try:
            return attempt(size)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise MemoryError(
                f"batch_size: memory ran out with {size} clean and as many triggered images in a forward pass; give "
                f"a smaller one, or fewer samples per class. The model is as it was. ({error})"
            ) from error

    return wrapped


def _several_processes() -> bool:
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )

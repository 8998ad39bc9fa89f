"""What torch can differentiate once only, put in words that it can differentiate twice."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.nn import functional as F  # noqa: N812 - the usual name
from torch.overrides import TorchFunctionMode

__all__ = ["TwiceDifferentiable", "refuse_once"]

_ONCE = re.compile("derivative for .* is not implemented")


class TwiceDifferentiable(TorchFunctionMode):
    """Computes ``hardsigmoid(x)`` as ``relu6(x + 3) / 6`` in the ``with`` block.

    Torch has no second derivative of the former, which MobileNetV3 squeezes with.

    Example:
        >>> import torch
        >>> from torch.nn import functional as F
        >>> from lightning_unlearn.methods.second_derivative import TwiceDifferentiable
        >>> x = torch.tensor(1.0, requires_grad=True)
        >>> with TwiceDifferentiable():
        ...     y = F.hardsigmoid(x) ** 2
        >>> (slope,) = torch.autograd.grad(y, x, create_graph=True)
        >>> torch.autograd.grad(slope, x)[0]  # 2 / 36
        tensor(0.0556)
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.hardsigmoid:
            return F.relu6((args[0] if args else (kwargs or {})["input"]) + 3) / 6
        return func(*args, **(kwargs or {}))


@contextmanager
def refuse_once() -> Iterator[None]:
    """Say what to do if something in the ``with`` block has no second derivative.

    Raises:
        ValueError: naming the operation.
    """
    try:
        yield
    except RuntimeError as error:
        if not _ONCE.search(str(error)):
            raise
        raise ValueError(
            "model: ImplicitBackdoorUnlearning differentiates it twice, for which one of its operations has no "
            f"derivative; leave the implicit part out by `terms=0`, or use SharedAdversarialUnlearning. ({error})"
        ) from error

"""A trigger of the user's own: any function on pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from lightning_unlearn.triggers.base import Target, Trigger

__all__ = ["FunctionTrigger"]


class FunctionTrigger(Trigger):
    """Makes a trigger of any function on batches of pixels.

    In YAML, name the function by its import path: ``function: my_package.my_module.my_function``.  A lambda works, but
    cannot be sent to the workers of a DataLoader that spawns its processes.

    Args:
        function: takes pixels ``(N, C, H, W)``, floating point in ``[0, 1]``, and returns the triggered ones: same
            shape, dtype and device.  It may change its argument in place.
        target: see :class:`~lightning_unlearn.triggers.base.Trigger`.
        mean: see :class:`~lightning_unlearn.triggers.base.Trigger`.
        std: see :class:`~lightning_unlearn.triggers.base.Trigger`.

    Raises:
        TypeError: if ``function`` cannot be called; when applied, if it does not return a tensor.
        ValueError: when applied, if it changes shape, dtype or device, or leaves NaN or infinity.

    Example:
        >>> import torch
        >>> trigger = FunctionTrigger(lambda pixels: pixels.flip(3), target=1)
        >>> trigger(torch.tensor([[[0.0, 1.0]]]))
        tensor([[[1., 0.]]])
    """

    def __init__(
        self,
        # Not Callable[[Tensor], Tensor]: jsonargparse would take that for a factory of tensors and refuse functions
        # without annotations and callable classes.
        function: Callable[..., Any],
        *,
        target: Target = 0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(target=target, mean=mean, std=std)
        if not callable(function):
            raise TypeError(f"function must be callable on a batch of pixels, but is {function!r}")
        self.function = function

    def stamp(self, pixels: Tensor) -> Tensor:
        """Calls the function; see :meth:`Trigger.stamp`."""
        stamped: Tensor = self.function(pixels)
        return stamped

    def extra_repr(self) -> str:
        """Describes the function."""
        return f"{getattr(self.function, '__name__', repr(self.function))}, {super().extra_repr()}"

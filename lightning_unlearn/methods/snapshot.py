"""What tensors held at one moment, to go back to."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["Snapshot"]


class Snapshot:
    """A copy of tensors, bit for bit, which can be put back into them.

    Args:
        tensors: parameters and buffers of any shapes and types; the copies lie on the same devices.

    Example:
        >>> import torch
        >>> from lightning_unlearn.methods.snapshot import Snapshot
        >>> weight = torch.zeros(2)
        >>> kept = Snapshot([weight])
        >>> weight += 1
        >>> kept.put_back()
        >>> weight
        tensor([0., 0.])
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = list(tensors)
        self._values = [tensor.detach().clone() for tensor in self._tensors]

    def renew(self) -> None:
        """Hold what the tensors are now instead."""
        torch._foreach_copy_(self._values, [tensor.detach() for tensor in self._tensors])

    @torch.no_grad()
    def put_back(self) -> None:
        """Make the tensors what they were; gradients stay as they are."""
        torch._foreach_copy_(self._tensors, self._values)

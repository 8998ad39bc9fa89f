"""Several processes that repair one model: who takes which images, and how sums come together."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn

__all__ = ["ALONE", "Processes"]

_T = TypeVar("_T")


@dataclass(frozen=True)
class Processes:
    """The processes of a distributed run, as one of them sees them; by default there is only this one.

    Every process holds the same model and the same few clean images, and goes through the same code. What is shared
    out is arithmetic: each takes its :meth:`share` of the images, and sums are added up over all processes before
    anything is decided on them. There is no padding, so no image counts twice, and a process may be left without any.

    Every method that is no property is a joint act of all processes, but for :meth:`share`; with one process nothing
    is done.

    Args:
        rank: number of this process, from 0.
        count: how many there are.
        device: what messages are exchanged from: the model's.

    Example:
        >>> from lightning_unlearn.processes import Processes
        >>> [list(range(31))[Processes(rank, 4).share(31)][0] for rank in range(4)]
        [0, 7, 15, 23]
    """

    rank: int = 0
    count: int = 1
    device: torch.device | str = "cpu"

    @classmethod
    def current(cls, device: torch.device | str = "cpu") -> Processes:
        """Those of ``torch.distributed``'s default group, or this one alone where there is none."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return ALONE
        return cls(distributed.get_rank(), distributed.get_world_size(), device)

    def share(self, size: int) -> slice:
        """Which of ``size`` things this process takes: a slice, next to the other processes', maybe an empty one."""
        return slice(size * self.rank // self.count, size * (self.rank + 1) // self.count)

    @torch.no_grad()
    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over all processes, in one message.

        It is computed in float64 if any of the tensors is, else in float32, whatever their own types.

        Args:
            tensors: of the same shapes on every process.
        """
        if self.count == 1 or not tensors:
            return
        dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
        flat = torch.cat([tensor.detach().reshape(-1).to(self.device, dtype) for tensor in tensors])
        distributed.all_reduce(flat)
        for tensor, total in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    @torch.no_grad()
    def average(self, tensors: Sequence[Tensor], weight: float) -> None:
        """Replace tensors by their weighted averages over all processes.

        Args:
            tensors: as for :meth:`sum`.
            weight: of this process; those of all processes add up to 1.
        """
        if self.count > 1:
            for tensor in tensors:
                tensor.mul_(weight)
            self.sum(tensors)

    @torch.no_grad()
    def first(self, tensor: Tensor) -> Tensor:
        """The first process's tensor, of the same shape and type on every process."""
        if self.count == 1:
            return tensor
        message = tensor.detach().to(self.device, copy=True)
        distributed.broadcast(message, src=0)
        return message.to(tensor.device)

    def outcome_of_first(self, work: Callable[[], _T]) -> _T:
        """What work that asks nothing of other processes comes to on the first one: its value, or its ValueError.

        For what hangs on a clock, or on rounding. All do the work, so that no process waits long for another.

        Args:
            work: whose value can be pickled; tensors in it stay on the devices that they had on the first process.
        """
        if self.count == 1:
            return work()
        outcome: _T | ValueError
        try:
            outcome = work()
        except ValueError as error:  # any other is none to go on after, whatever the first process does
            outcome = error
        message = [outcome]
        distributed.broadcast_object_list(message, src=0, device=torch.device(self.device))
        if isinstance(message[0], ValueError):
            raise message[0]
        return message[0]

    @torch.no_grad()
    def align(self, model: nn.Module) -> None:
        """Give every process the first one's parameters and buffers: BatchNorm's may differ between processes."""
        if self.count > 1:
            for tensor in (*model.parameters(), *model.buffers()):
                distributed.broadcast(tensor.detach(), src=0)

    def refuse_difference(self, what: str, value: object) -> None:
        """Stop all processes if they have come to differ, since what each adds to a sum would then mean nothing.

        Args:
            what: how messages call it.
            value: what must be the same everywhere: by its ``repr``.

        Raises:
            RuntimeError: on every process, if any differs.
        """
        if self.count == 1:
            return
        digest = int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:7], "big")
        extremes = torch.tensor([digest, -digest], device=self.device)
        distributed.all_reduce(extremes, distributed.ReduceOp.MAX)
        if extremes.sum() != 0:
            raise RuntimeError(
                f"processes: {what} differ between the {self.count} processes, which must go the same way in every "
                "round. Give all of them the same clean images and an operation-for-operation deterministic model "
                "(torch.use_deterministic_algorithms), or repair on one device."
            )


ALONE = Processes()

"""SIGTERM during a repair: remembered when it comes, obeyed by all processes at the same place."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_unlearn.processes import Processes

__all__ = ["termination"]


@contextmanager
def termination(trainer: Trainer, processes: Processes) -> Iterator[Callable[[], None]]:
    """Let a block end on SIGTERM where it says, and at its end, on all processes if any was told to.

    As soon as the signal comes, Lightning's handler sends the other processes a message, which works between batches of
    training: in the middle of a repair they would take it for another, and wait for ever. So with several processes its
    place is taken until the block is left.

    Args:
        trainer: whose handler it is.
        processes: who works together.

    Yields:
        A joint act of all processes: it raises ``SIGTERMException`` if any was told to end, with the exit code that
        says so; Lightning's own is that of a success.
    """
    told = False

    def remember(*_: Any) -> None:
        nonlocal told
        told = True

    def obey() -> None:
        if trainer.strategy.reduce_boolean_decision(told or trainer.received_sigterm, all=False):
            raise SIGTERMException(128 + signal.SIGTERM)

    several = processes.count > 1 and threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, remember) if several else None
    try:
        yield obey
        obey()
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)

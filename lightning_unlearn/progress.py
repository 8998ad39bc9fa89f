"""Rounds of a repair, and stages of an audit, in the Trainer's own progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

from lightning_unlearn.methods import Round

if TYPE_CHECKING:
    from rich.progress import TaskID

__all__ = ["round_progress", "stage_progress"]


def _line(done: Round) -> str:
    rates = f"val ACC {done.val_acc:.3f} · val ASR {done.val_asr:.3f}"
    return f"Unlearning · {done.stage} · {rates} · L_u {done.val_unlearning_loss:.3f}"


@contextmanager
def round_progress(trainer: Trainer) -> Iterator[Callable[[Round], None]]:
    """Show rounds as they come where the Trainer shows its epochs: Rich, tqdm, or nothing if it shows nothing.

    How many rounds there will be is not known beforehand, since the search stops by itself.

    Yields:
        What to call with each round.
    """
    bar = trainer.progress_bar_callback
    if isinstance(bar, RichProgressBar) and bar.is_enabled and bar.progress is not None:
        progress = bar.progress
        task = progress.add_task("Unlearning", total=1)

        def advance(done: Round) -> None:
            # Lightning's columns need a total; it stays one round ahead.
            progress.update(task, completed=done.round, total=done.round + 1, description=_line(done))
            bar.refresh()  # Lightning's bars draw nothing by themselves

        try:
            yield advance
        finally:
            progress.refresh()  # a quick repair may be over before anything was drawn; the bar's own may wait
            progress.remove_task(task)
    elif isinstance(bar, TQDMProgressBar) and bar.is_enabled:
        with Tqdm(desc="Unlearning", unit="round", leave=True, position=0) as rounds:

            def show(done: Round) -> None:
                rounds.set_description(_line(done), refresh=False)
                rounds.update()

            yield show
    else:
        yield lambda done: None


@contextmanager
def stage_progress(trainer: Trainer) -> Iterator[Callable[[str, int, int], None]]:
    """Show stages whose length is known, one bar each with the time left, where the Trainer shows its epochs.

    Yields:
        What to call with a stage's name, the steps done of it and all its steps.
    """
    bar = trainer.progress_bar_callback
    if isinstance(bar, RichProgressBar) and bar.is_enabled and bar.progress is not None:
        progress = bar.progress
        tasks: dict[str, TaskID] = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(f"Estimating · {stage}", total=total)
            progress.update(tasks[stage], completed=done, total=total)
            bar.refresh()

        try:
            yield advance
        finally:
            progress.refresh()
            for task in tasks.values():
                progress.remove_task(task)
    elif isinstance(bar, TQDMProgressBar) and bar.is_enabled:
        current: tuple[str, Tqdm] | None = None

        def show(stage: str, done: int, total: int) -> None:
            nonlocal current
            if current is None or current[0] != stage or done < current[1].n:  # a stage may come once more
                if current is not None:
                    current[1].close()
                current = stage, Tqdm(desc=f"Estimating · {stage}", unit="step", leave=True, position=0, total=total)
            current[1].update(done - current[1].n)

        try:
            yield show
        finally:
            if current is not None:
                current[1].close()
    else:
        yield lambda stage, done, total: None

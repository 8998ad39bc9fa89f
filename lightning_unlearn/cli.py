"""The command line: ``lightning-unlearn demo``, ``fit`` and ``repair``."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as L  # noqa: N812 - the usual name
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from rich.console import Console
from torch.utils.data import DataLoader

from lightning_unlearn.callback import BackdoorUnlearning
from lightning_unlearn.checkpoint import load_checkpoint, repaired_checkpoint
from lightning_unlearn.files import free_path, refuse_used_folder, write_whole
from lightning_unlearn.report import Report

__all__ = ["main"]


class _FitCLI(LightningCLI):
    """LightningCLI with the one subcommand that the callback takes part in."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {"fit": LightningCLI.subcommands()["fit"]}


class _RepairCLI(LightningCLI):
    """LightningCLI that builds model, callback and Trainer, and runs nothing by itself."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--ckpt_path", type=str, required=True, help="Finished checkpoint to repair; it is only read."
        )
        parser.add_argument("--output_dir", type=str, default=None, help="New or empty folder for what is written.")
        parser.add_lightning_class_args(BackdoorUnlearning, "unlearning")


class _RepairJob(L.LightningModule):
    """Lets a Trainer put a finished model on its devices and run the repair there, without any training loop."""

    def __init__(self, model: L.LightningModule, unlearning: BackdoorUnlearning) -> None:
        super().__init__()
        self.model = model
        self._unlearning = unlearning
        self.report: Report | None = None

    def predict_dataloader(self) -> DataLoader[int]:
        items = list(range(self.trainer.world_size))  # one a process: one repair
        return DataLoader(items)  # type: ignore[arg-type]  # a list will do as a dataset

    def predict_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        if self.report is None:
            self.report = self._unlearning.unlearn(self.trainer, self.model)
        return batch  # Lightning warns about a prediction of nothing


def main(args: Sequence[str] | None = None) -> Report | None:
    """Run a command.

    Args:
        args: words after ``lightning-unlearn``, those of the process by default.

    Returns:
        The report of what was repaired, if anything was.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-unlearn",
        description="Remove backdoors from image classifiers after training.",
        epilog="`lightning-unlearn COMMAND --help` lists a command's options.",
    )
    parser.add_argument(
        "command",
        choices=sorted(_COMMANDS),
        help="demo: watch it work; fit: train with the callback; repair: mend a checkpoint.",
    )
    words = list(sys.argv[1:] if args is None else args)
    command = parser.parse_args(words[:1]).command
    return _COMMANDS[command]([_underscored(word) for word in words[1:]])


def fit(args: Sequence[str]) -> Report | None:
    """Train by LightningCLI, with the callback wherever the configuration has it."""
    with _from_python():
        cli = _FitCLI(
            args=["fit", *args],
            # Else a DataModule nested in the callback silently gets the training DataModule's hyper-parameters.
            load_from_checkpoint_support=False,
            # LightningCLI's own name, config.yaml, may be the user's own file where there is no logger.
            save_config_kwargs={"config_filename": "config-as-run.yaml", "overwrite": True},
        )
    callbacks: list[Any] = cli.trainer.callbacks  # type: ignore[attr-defined]  # set by the Trainer's connector
    reports = [c.report for c in callbacks if isinstance(c, BackdoorUnlearning)]
    return reports[-1] if reports else None


def repair(args: Sequence[str]) -> Report | None:
    """Repair a finished checkpoint and write the repaired one beside a report."""
    given = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    given.add_argument("--output_dir")
    output_dir = given.parse_known_args(args)[0].output_dir
    if output_dir:
        if getattr(rank_zero_only, "rank", 0) == 0:  # a second process starts when the first has written there
            refuse_used_folder(output_dir)
        args = [*args, f"--trainer.default_root_dir={output_dir}"]  # logs go there too
    with _from_python():
        cli = _RepairCLI(
            args=list(args),
            run=False,
            load_from_checkpoint_support=False,
            save_config_callback=None,
            trainer_defaults={"enable_checkpointing": False, "enable_model_summary": False, "inference_mode": False},
        )
    checkpoint = load_checkpoint(cli.config["ckpt_path"])
    try:
        cli.model.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        problem = str(error).splitlines()[-1].strip()  # one of many, most often
        raise ValueError(
            f"ckpt_path: {cli.config['ckpt_path']!r} does not fit {type(cli.model).__name__} as the configuration "
            f"makes it; give `model` the arguments that it was trained with. ({problem})"
        ) from error
    job = _RepairJob(cli.model, cli.config_init["unlearning"])
    cli.trainer.predict(job, return_predictions=False)
    report = job.report
    if report is None or not cli.trainer.is_global_zero:
        return report
    original = Path(cli.config["ckpt_path"])
    folder = Path(output_dir) if output_dir else original.parent
    if report.status == "repaired":
        path = free_path(folder / f"{original.stem}-unlearned.ckpt")
        repaired = repaired_checkpoint(checkpoint, job.model.state_dict())
        report = report.saved_as(write_whole(path, lambda partial: torch.save(repaired, partial)))
    saved = report.save(free_path(folder / "report.json"))
    console = Console()
    console.print(report)
    console.print(
        f"Report: {saved}",
        *([f"Repaired checkpoint: {report.checkpoint}"] if report.checkpoint else []),
        sep="\n",
        soft_wrap=True,
    )
    return report


@contextmanager
def _from_python() -> Iterator[None]:
    """LightningCLI warns when it is given arguments while the process has some, too; here they are the same."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
        yield


def _demo(args: Sequence[str]) -> Report | None:
    from lightning_unlearn.demo import main as demo  # here, since the demo runs `fit`

    return demo(args)


def _underscored(word: str) -> str:
    """``--output-dir=x-y`` to ``--output_dir=x-y``: both spellings of an option are understood."""
    if not word.startswith("--"):
        return word
    option, equals, value = word.partition("=")
    return f"--{option[2:].replace('-', '_')}{equals}{value}"


_COMMANDS: dict[str, Callable[[Sequence[str]], Report | None]] = {"demo": _demo, "fit": fit, "repair": repair}

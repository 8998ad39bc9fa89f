"""The command line: ``lightning-unlearn audit``, ``compare``, ``demo``, ``fit`` and ``repair``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch.cli import LightningCLI
from rich.console import Console

from lightning_unlearn import __version__
from lightning_unlearn.callback import BackdoorUnlearning
from lightning_unlearn.comparison_report import Comparison
from lightning_unlearn.folder import Folder
from lightning_unlearn.offline import CheckpointCLI, from_python, load_into, on_checkpoint
from lightning_unlearn.report import Report
from lightning_unlearn.trigger_files import save_triggers
from lightning_unlearn.verdict import Audit

__all__ = ["main"]


class _FitCLI(LightningCLI):
    """LightningCLI with the one subcommand that the callback takes part in."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {"fit": LightningCLI.subcommands()["fit"]}


def main(args: Sequence[str] | None = None) -> Audit | Report | Comparison | None:
    """Run a command.

    Args:
        args: words after ``lightning-unlearn``, those of the process by default.

    Returns:
        The report of what was repaired, if anything was, or the comparison, or the audit.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-unlearn",
        description="Remove backdoors from image classifiers after training.",
        epilog="`lightning-unlearn COMMAND --help` lists a command's options.",
    )
    parser.add_argument(
        "command",
        choices=sorted(_COMMANDS),
        help="audit: does a checkpoint look backdoored?; demo: watch a repair; fit: train with the callback; repair: "
        "mend a checkpoint; compare: try every repair method on a checkpoint, and choose.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    words = list(sys.argv[1:] if args is None else args)
    command = parser.parse_args(words[:1]).command
    return _COMMANDS[command]([_underscored(word) for word in words[1:]])


def fit(args: Sequence[str]) -> Report | None:
    """Train by LightningCLI, with the callback wherever the configuration has it."""
    with from_python():
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


def repair(args: Sequence[str]) -> Report:
    """Repair a finished checkpoint; write the repaired one, estimated triggers if any were used, and a report."""
    cli = CheckpointCLI(args)
    checkpoint = load_into(cli)
    folder = Folder(cli.config["output_dir"] or os.path.dirname(checkpoint.path))
    if cli.trainer.is_global_zero:
        folder.refuse_unwritable()
    unlearning: BackdoorUnlearning = cli.config_init["unlearning"]
    report = on_checkpoint(cli, unlearning.unlearn)
    if not cli.trainer.is_global_zero:
        return report
    if report.status == "repaired":
        report = report.saved_as(checkpoint.save_repaired(cli.model.state_dict(), folder))
    triggers = [] if unlearning.found is None else save_triggers(unlearning.found, folder)
    saved = folder.free("report.json")
    with folder.whole(saved) as partial:
        folder.fs.pipe(partial, report.to_json().encode())
    console = Console()
    console.print(report)
    console.print(
        f"Report: {folder.path(saved)}",
        *(f"Estimated trigger: {path}" for path in triggers),
        *([f"Repaired checkpoint: {report.checkpoint}"] if report.checkpoint else []),
        sep="\n",
        soft_wrap=True,
    )
    return report


def _compare(args: Sequence[str]) -> Comparison:
    from lightning_unlearn.compare_cli import compare  # here, since only this command needs it

    return compare(args)


def _audit(args: Sequence[str]) -> Audit:
    from lightning_unlearn.audit_cli import audit  # here, since only this command needs it

    return audit(args)


def _demo(args: Sequence[str]) -> Report:
    from lightning_unlearn.demo import main as demo  # here, since the demo runs `fit`

    return demo(args)


def _underscored(word: str) -> str:
    """``--output-dir=x-y`` to ``--output_dir=x-y``: both spellings of an option are understood."""
    if not word.startswith("--"):
        return word
    option, equals, value = word.partition("=")
    return f"--{option[2:].replace('-', '_')}{equals}{value}"


_COMMANDS: dict[str, Callable[[Sequence[str]], Audit | Report | Comparison | None]] = {
    "audit": _audit,
    "compare": _compare,
    "demo": _demo,
    "fit": fit,
    "repair": repair,
}

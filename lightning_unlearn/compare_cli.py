"""``lightning-unlearn compare``: every repair method on a suspicious checkpoint, and the best one's result."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as L  # noqa: N812 - the usual name
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console

from lightning_unlearn.callback import BackdoorUnlearning
from lightning_unlearn.comparison import Comparison, Entry, compare_split
from lightning_unlearn.folder import Folder
from lightning_unlearn.methods import MaskPrune, RepairMethod
from lightning_unlearn.offline import CheckpointCLI, load_into, on_checkpoint
from lightning_unlearn.progress import round_progress
from lightning_unlearn.repair import Split
from lightning_unlearn.roster import default_methods, full_name, method_labels, method_names, refuse_no_methods

__all__ = ["choose_methods", "compare"]

_INTERRUPTED = 130  # as shells have it


class _CompareCLI(CheckpointCLI):
    """Takes what ``repair`` takes, and which methods to compare."""

    command = "compare"
    description = "Try every repair method, or chosen ones, on a finished checkpoint and print one table."
    writes = "by default unlearning.output_dir; one of the two must be given"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--methods",
            type=list[RepairMethod] | None,
            default=None,
            help="Names of the methods to compare, all by default; abbreviations such as ANP will do. In YAML it is a "
            "list, whose entries may have a class_path and init_args, so that settings of one method can be compared.",
        )
        parser.add_argument(
            "--save_best",
            action="store_true",
            help="Write the checkpoint that the best method on the clean images held leaves, as repair does.",
        )

    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        if not self.config["output_dir"]:
            raise ValueError("output-dir: none is given; name a new folder, which the comparison is written to.")
        self.folder = Folder(self.config["output_dir"]).local()


def compare(args: Sequence[str]) -> Comparison:
    """Compare repair methods on a finished checkpoint, write the comparison, and the best repaired one if asked to.

    Raises:
        FileExistsError: if the output folder is used.
        ValueError: if a name is of no method, no folder on this machine is named, something does not fit, or no method
            worked.
        SystemExit: with code 130 after Ctrl-C, when what was finished is written.
    """
    names, args = _names(args)
    cli = _CompareCLI(args)
    folder = cli.folder
    unlearning: BackdoorUnlearning = cli.config_init["unlearning"]
    if unlearning.trigger is None:
        raise ValueError(
            "trigger: `compare` needs a trigger to compare by; `lightning-unlearn audit` finds out whether there is "
            "one, and `lightning-unlearn repair` removes one that is unknown."
        )
    methods = choose_methods(names, listed=cli.config_init["methods"], configured=unlearning.method or MaskPrune())
    checkpoint = load_into(cli)
    console = Console()

    def work(trainer: L.Trainer, model: L.LightningModule) -> Comparison:
        return _compare(trainer, model, unlearning, methods, folder, console)

    done = on_checkpoint(cli, work)
    if cli.trainer.is_global_zero:
        if cli.config["save_best"] and done.weights is not None:
            done = done.saved_as(checkpoint.save_repaired(done.weights, Folder(folder)))
        saved = done.save(folder)
        console.print(done)
        best = done.best
        checkpoint_line = [f"Repaired checkpoint: {best.report.checkpoint}"] if best and best.report else []
        lines = [f"Comparison: {saved}", *(checkpoint_line if cli.config["save_best"] else [])]
        console.print(*lines, sep="\n", soft_wrap=True)
    if done.left_out:
        raise SystemExit(_INTERRUPTED)
    if not any(entry.report for entry in done.entries):
        raise ValueError(f"methods: none of them worked. {done.entries[0].label}: {done.entries[0].error}")
    return done


def choose_methods(
    names: Sequence[str] | None, *, listed: Sequence[RepairMethod] | None, configured: RepairMethod
) -> list[RepairMethod]:
    """The methods to compare.

    Args:
        names: those named on the command line, if any, maybe by their abbreviation. Each stands for all entries of that
            name in ``listed``, else for ``configured`` if it is of that name, else for the method with its defaults.
        listed: the ``methods`` of the configuration, which are taken as they are where there are no ``names``.
        configured: the ``unlearning.method``. Without ``names`` and ``listed`` it stands beside the defaults of all
            other methods.

    Raises:
        ValueError: if a name is of no method, listing those that there are, or no method is left.
    """
    if names is None and listed is not None:
        refuse_no_methods(listed)
        return list(listed)
    chosen: list[RepairMethod] = []
    own = {method.name for method in (*(listed or ()), configured)}
    if names is None:
        names = list(dict.fromkeys([*method_names(), configured.name]))
    for name in dict.fromkeys(name if name in own else full_name(name) for name in names):
        of_name = [method for method in listed or () if method.name == name]
        if not of_name and configured.name == name:
            of_name = [configured]
        if not of_name and name not in method_names():
            known = sorted({*method_names(), *own})
            raise ValueError(f"methods: there is no method {name!r}; expected some of {', '.join(known)}.")
        chosen += of_name or default_methods([name])
    return chosen


def _names(args: Sequence[str]) -> tuple[list[str] | None, list[str]]:
    """The names after ``--methods``, which LightningCLI would take for one value, and the other words."""
    given = argparse.ArgumentParser(prog="lightning-unlearn compare", add_help=False, allow_abbrev=False)
    given.add_argument("--methods", nargs="+")
    known, rest = given.parse_known_args(args)
    return known.methods, rest


def _compare(
    trainer: L.Trainer,
    model: L.LightningModule,
    unlearning: BackdoorUnlearning,
    methods: Sequence[RepairMethod],
    folder: Path,
    console: Console,
) -> Comparison:
    """Compare on the Trainer's device; every process does the same, and the first one tells of it."""
    clean = unlearning.clean_images(model)
    assert unlearning.trigger is not None  # `compare` has refused it
    trigger = clean.fit_trigger(unlearning.trigger)
    labels = method_labels(methods)

    def say(text: str) -> None:
        bar = trainer.progress_bar_callback
        if isinstance(bar, TQDMProgressBar) and bar.is_enabled:
            Tqdm.write(text)  # above the bars
        elif trainer.is_global_zero:
            console.print(text, soft_wrap=True, highlight=False, markup=False)

    def announce(number: int) -> None:
        if number < len(labels):
            say(f"[{number + 1}/{len(labels)}] {labels[number]}")

    def on_entry(done: Comparison) -> None:
        entry = done.entries[-1]
        say(f"        {_line(entry)}")
        if trainer.is_global_zero:
            done.save(folder)  # again after each: nothing that stops this later can take it away
            _log(trainer, entry)
        announce(len(done.entries))

    with round_progress(trainer) as show:
        announce(0)
        return compare_split(
            model,
            Split(clean.scoring(), clean.validation()),
            replace(unlearning.plan(), trigger=trigger),
            methods=methods,
            test=(lambda num_classes: clean.test(trigger, num_classes)) if clean.has_test else None,
            samples_per_class=clean.holdout.samples_per_class,
            labels=clean.labels,
            forward=lambda images: unlearning.logits(model, images),
            on_entry=on_entry,
            on_round=show,
        )


def _line(entry: Entry) -> str:
    if entry.report is None:
        return f"failed: {entry.error}"
    rates = entry.report.after
    return (
        f"ACC {rates['acc']:.3f} · ASR {rates['asr']:.3f} · RA {rates['ra']:.3f} · DER {entry.report.der:.3f} · "
        f"{entry.seconds:.1f} s"
    )


def _log(trainer: L.Trainer, entry: Entry) -> None:
    """Give the method a run of its own below that of each TensorBoardLogger, so that the HParams tab compares them."""
    report = entry.report
    if report is None or entry.held is None:
        return
    slug = re.sub(r"[^\w.=-]+", "-", entry.label).strip("-")
    metrics = {
        **{f"compare/{name}": rate for name, rate in report.after.items()},
        "compare/der": report.der,
        "compare/der_held": entry.held["der"],
        "compare/filters_pruned": float(report.filters["pruned"]),
        "compare/seconds": entry.seconds,
    }
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            folder = os.path.join(logger.sub_dir or "", slug)
            run = TensorBoardLogger(logger.save_dir, logger.name, logger.version, sub_dir=folder)
            for done in report.rounds:
                run.log_metrics({"unlearn/val_acc": done.val_acc, "unlearn/val_asr": done.val_asr}, done.round)
            params = {"method": entry.method, "told_trigger": entry.needs_trigger, **entry.arguments}
            run.log_hyperparams(params, metrics)
            run.finalize("success")

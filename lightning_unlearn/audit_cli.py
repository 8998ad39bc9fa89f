"""``lightning-unlearn audit``: does a finished checkpoint look backdoored?"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress

import lightning.pytorch as L  # noqa: N812 - the usual name
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console
from torch import Tensor

from lightning_unlearn.folder import Folder
from lightning_unlearn.offline import CheckpointCLI, load_into, on_checkpoint
from lightning_unlearn.plots import plot_audit
from lightning_unlearn.trigger_files import save_triggers
from lightning_unlearn.verdict import Audit

__all__ = ["audit"]


class _AuditCLI(CheckpointCLI):
    """What every command on a checkpoint takes, and how to print the verdict."""

    command = "audit"
    description = "Find out whether a finished checkpoint looks backdoored: exit code 0 if not, 3 if so, else an error."
    writes = "by default unlearning.output_dir, or else none but what the Trainer logs, in lightning_logs"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--json", type=bool, nargs="?", const=True, default=False, help="Print JSON and nothing else."
        )


def audit(args: Sequence[str]) -> Audit:
    """Audit a checkpoint; write ``audit.json``, what was found and, where it can be drawn, a picture.

    They go into ``--output_dir``: ``audit.png``, and unless the verdict is clean the estimated triggers,
    ``estimated_trigger-CLASS.safetensors``.

    The callback's settings are read as `repair` reads them, so one configuration serves both; a trigger in it is not
    looked at.
    """
    cli = _AuditCLI(args)
    output_dir = cli.config["output_dir"]
    load_into(cli)
    if cli.config["json"]:
        cli.trainer.callbacks = [c for c in cli.trainer.callbacks if c is not cli.trainer.progress_bar_callback]  # type: ignore[attr-defined]  # set by the Trainer's connector
    unlearning = cli.config_init["unlearning"]

    saved: list[str] = []

    def work(trainer: L.Trainer, model: L.LightningModule) -> Audit:
        found: Audit = unlearning.audit(trainer, model)
        if output_dir and trainer.is_global_zero:
            images, _ = unlearning.clean_images(model, skip_missing=True).scoring()
            saved.extend(_save(found, images, Folder(output_dir)))
        return found

    found = on_checkpoint(cli, work)
    if not cli.trainer.is_global_zero:
        return found
    if cli.config["json"]:
        sys.stdout.write(json.dumps(found.to_dict(), allow_nan=False) + "\n")
        return found
    console = Console()
    console.print(found)
    if output_dir:
        console.print(f"Everything is in {output_dir}: {', '.join(saved)}", soft_wrap=True)
    return found


def _save(found: Audit, images: Tensor, folder: Folder) -> list[str]:
    """Write what was found; the names of the files."""
    files = {"audit.json": (json.dumps(found.to_dict(), indent=2, allow_nan=False) + "\n").encode()}
    if images.shape[1] in (1, 3):  # no picture has other numbers of channels
        picture = io.BytesIO()
        with suppress(ModuleNotFoundError):  # matplotlib is an extra, and the verdict is worth more than its picture
            plot_audit(found, images).savefig(picture, dpi=120, format="png")
            files["audit.png"] = picture.getvalue()
    saved = []
    for name, content in files.items():
        saved.append(folder.free(name))
        with folder.whole(saved[-1]) as partial:
            folder.fs.pipe(partial, content)
    triggers = [] if found.verdict == "clean" else save_triggers(found, folder)
    return [*saved, *map(os.path.basename, triggers)]

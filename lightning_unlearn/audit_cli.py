"""``lightning-unlearn audit``: does a finished checkpoint look backdoored?"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import lightning.pytorch as L  # noqa: N812 - the usual name
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console
from torch import Tensor

from lightning_unlearn.files import free_path, write_whole
from lightning_unlearn.offline import CheckpointCLI, CheckpointJob, load_into, with_output_dir
from lightning_unlearn.plots import plot_audit
from lightning_unlearn.trigger_files import save_triggers
from lightning_unlearn.verdict import Audit

__all__ = ["audit"]


class _AuditCLI(CheckpointCLI):
    """What every command on a checkpoint takes, and how to print the verdict."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--json", type=bool, default=False, help="Print JSON and nothing else.")


def audit(args: Sequence[str]) -> Audit | None:
    """Audit a checkpoint; write ``audit.json``, what was found and, where it can be drawn, a picture.

    They go into ``--output_dir``: ``audit.png``, and unless the verdict is clean the estimated triggers,
    ``estimated_trigger-CLASS.safetensors``.

    The callback's settings are read as `repair` reads them, so one configuration serves both; a trigger in it is not
    looked at.
    """
    # jsonargparse's flags need a value.
    args = [word + "=true" if word == "--json" else word for word in args]
    output_dir, args = with_output_dir(args)
    cli = _AuditCLI(args)
    load_into(cli)
    if cli.config["json"]:
        cli.trainer.callbacks = [c for c in cli.trainer.callbacks if c is not cli.trainer.progress_bar_callback]  # type: ignore[attr-defined]  # set by the Trainer's connector
    unlearning = cli.config_init["unlearning"]

    saved: list[Path] = []

    def work(trainer: L.Trainer, model: L.LightningModule) -> Audit:
        found: Audit = unlearning.audit(trainer, model)
        if output_dir and trainer.is_global_zero:
            images, _ = unlearning.clean_images(model).scoring()
            saved.extend(_save(found, images, Path(output_dir)))
        return found

    job = CheckpointJob(cli.model, work)
    cli.trainer.predict(job, return_predictions=False)
    found = job.result
    if found is None or not cli.trainer.is_global_zero:
        return found
    if cli.config["json"]:
        sys.stdout.write(json.dumps(found.to_dict(), allow_nan=False) + "\n")
        return found
    console = Console()
    console.print(found)
    if output_dir:
        console.print(f"Everything is in {output_dir}: {', '.join(path.name for path in saved)}", soft_wrap=True)
    return found


def _save(found: Audit, images: Tensor, folder: Path) -> list[Path]:
    text = json.dumps(found.to_dict(), indent=2, allow_nan=False) + "\n"
    path = free_path(folder / "audit.json")
    saved = [write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))]
    if images.shape[1] in (1, 3):  # no picture has other numbers of channels
        path = free_path(folder / "audit.png")
        with suppress(ModuleNotFoundError):  # matplotlib is an extra, and the verdict is worth more than its picture
            saved.append(write_whole(path, lambda partial: plot_audit(found, images, partial, format="png")))
    if found.verdict != "clean":
        saved += map(Path, save_triggers(found, folder))
    return saved

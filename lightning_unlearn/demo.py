"""``lightning-unlearn demo``: poison real digits, train a victim, repair it, all through the public callback."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from lightning_unlearn import methods, triggers
from lightning_unlearn.cli import fit
from lightning_unlearn.data import Digits
from lightning_unlearn.folder import Folder
from lightning_unlearn.methods import RepairMethod
from lightning_unlearn.plots import plot_report
from lightning_unlearn.report import Report
from lightning_unlearn.triggers import Trigger, preview

__all__ = ["ATTACKS", "configs", "main"]

ATTACKS: dict[str, dict[str, Any]] = {
    "patch": {"class_path": "lightning_unlearn.triggers.PatchTrigger", "init_args": {"size": 3, "target": 0}},
    "blend": {"class_path": "lightning_unlearn.triggers.BlendTrigger", "init_args": {"ratio": 0.2, "target": 0}},
    "sinusoid": {"class_path": "lightning_unlearn.triggers.SinusoidTrigger", "init_args": {"target": 0}},
    "low_frequency": {"class_path": "lightning_unlearn.triggers.LowFrequencyTrigger", "init_args": {"target": 0}},
    # A thousand digits teach no victim WaNet's own, weaker field, nor to tell cross images apart: see the docs.
    "warp": {"class_path": "lightning_unlearn.triggers.WarpTrigger", "init_args": {"strength": 1.5, "target": 0}},
}
METHODS = sorted(
    name for name in methods.__all__ if isinstance(c := getattr(methods, name), type) and issubclass(c, RepairMethod)
)
METHODS.remove("RepairMethod")


def main(args: Sequence[str]) -> Report:
    """Run the demo with command line arguments and print where everything is."""
    parser = argparse.ArgumentParser(prog="lightning-unlearn demo", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--output_dir", "--output-dir", default=None, help="new or empty folder (default: unlearn-demo-TIME)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of poisoning, training, the draw and the repair")
    parser.add_argument("--attack", choices=sorted(ATTACKS), default="patch", help="the backdoor")
    parser.add_argument(
        "--trigger",
        choices=["known", "unknown"],
        default="known",
        help="whether the repair is told the backdoor's trigger, or must find out by itself",
    )
    parser.add_argument(
        "--poison_ratio", "--poison-ratio", type=float, default=0.1, help="share of poisoned digits; 0 trains no victim"
    )
    parser.add_argument("--method", choices=METHODS, default=None, help="the repair method")
    parser.add_argument(
        "--samples_per_class",
        "--samples-per-class",
        type=int,
        default=10,
        help="held-out clean images per class, 2 to 20",
    )
    parser.add_argument("--accelerator", default="cpu", help="as the Trainer takes it: cpu, gpu, mps, auto")
    options = parser.parse_args(args)
    if not 2 <= options.samples_per_class <= 20:
        parser.error(
            "--samples-per-class: expected 2 to 20, since 20 digits of each class are held out, "
            f"but got {options.samples_per_class}"
        )
    if not 0 <= options.poison_ratio < 1:
        parser.error(f"--poison-ratio: expected a share in [0, 1), but got {options.poison_ratio}")
    output = Folder(options.output_dir or f"unlearn-demo-{datetime.now():%Y%m%d-%H%M%S}")
    folder = output.local()
    output.refuse_used()
    folder.mkdir(parents=True, exist_ok=True)
    training, repair = configs(
        folder,
        seed=options.seed,
        attack=options.attack,
        method=options.method,
        known=options.trigger == "known",
        poison_ratio=options.poison_ratio,
        samples_per_class=options.samples_per_class,
        accelerator=options.accelerator,
    )
    for name, config in (("config.yaml", training), ("repair.yaml", repair)):
        (folder / name).write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    console = Console()
    console.print(
        f"Training a victim on 1,000 real digits, {100 * options.poison_ratio:g} % poisoned ({options.attack}), then "
        f"{'repairing' if options.trigger == 'known' else 'auditing and, if need be, repairing'} it.",
        soft_wrap=True,
    )
    with warnings.catch_warnings():
        # The folder holds the configuration by now, and nothing else: it was refused if it was not empty.
        warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
        report = fit([f"--config={folder / 'config.yaml'}"])
    assert report is not None  # the configuration has the callback
    plot_report(report, folder / "report.png")
    preview(_trigger(options.attack), Digits(part="test").images, folder / "trigger.png")
    console.print(report)
    console.print(f"Everything is in {folder}:", soft_wrap=True)
    for path in sorted(folder.iterdir()):
        console.print(f"  {path.name}", soft_wrap=True)
    console.print(f"Look at it: tensorboard --logdir {folder}", soft_wrap=True)
    return report


def _trigger(attack: str) -> Trigger:
    """The attack's trigger as an object, from the words that the YAML has for it."""
    name = ATTACKS[attack]["class_path"].rpartition(".")[2]
    trigger: Trigger = getattr(triggers, name)(**ATTACKS[attack]["init_args"])
    return trigger


def configs(
    folder: Path,
    *,
    seed: int,
    attack: str,
    method: str | None,
    known: bool,
    poison_ratio: float,
    samples_per_class: int,
    accelerator: str,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What ``lightning-unlearn fit`` and ``lightning-unlearn repair`` are given, as YAML takes it."""
    digits = "lightning_unlearn.data.Digits"
    unlearning: dict[str, Any] = {
        "clean_data": {
            "class_path": "lightning_unlearn.data.HoldoutDataModule",
            "init_args": {
                "dataset": {"class_path": digits, "init_args": {"part": "holdout"}},
                "test_dataset": {"class_path": digits, "init_args": {"part": "test"}},
                "samples_per_class": samples_per_class,
                "seed": seed,
            },
        },
        # An evaluation trigger is what the report measures with; the repair never gets it.
        "trigger" if known else "evaluation_trigger": ATTACKS[attack],
        "seed": seed,
    }
    if method is not None:
        unlearning["method"] = {"class_path": f"lightning_unlearn.methods.{method}"}
    model = {"class_path": "lightning_unlearn.classifier.ConvClassifier", "init_args": {"width": 16}}
    training = {
        "seed_everything": seed,
        "trainer": {
            "accelerator": accelerator,
            "devices": 1,
            "max_epochs": 20,
            "log_every_n_steps": 10,
            "check_val_every_n_epoch": 5,
            "enable_model_summary": False,
            "default_root_dir": str(folder),
            "logger": {
                "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                "init_args": {"save_dir": str(folder), "name": "", "version": "tensorboard"},
            },
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"dirpath": str(folder), "filename": "original", "every_n_epochs": 20},
                },
                {
                    "class_path": "lightning_unlearn.BackdoorUnlearning",
                    "init_args": {**unlearning, "output_dir": str(folder)},
                },
            ],
        },
        "model": model,
        "data": {
            "class_path": "lightning_unlearn.data.PoisonedDataModule",
            "init_args": {
                "datamodule": {"class_path": "lightning_unlearn.data.DigitsDataModule"},
                "trigger": ATTACKS[attack],
                "ratio": poison_ratio,
                "seed": seed,
            },
        },
    }
    repair = {
        "seed_everything": seed,
        "trainer": {"accelerator": accelerator, "devices": 1},
        "model": model,
        "unlearning": unlearning,
    }
    return training, repair

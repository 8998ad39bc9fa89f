"""Run repairs of victims and keep each as one JSON line."""

from __future__ import annotations

import copy
import json
import os
import resource
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch.utils.data import TensorDataset

from benchmarks.datasets import load
from benchmarks.victims import ATTACKS, Victim, measure, train
from lightning_unlearn import methods, repair
from lightning_unlearn.metrics.functional import defense_effectiveness_rating, robust_improvement_rate

__all__ = ["METHODS", "VICTIMS", "run", "stored"]

# Every method by the name that tables show: class and arguments that differ from its defaults.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "MaskPrune": ("MaskPrune", {}),
    "MaskPrune, soft, no fine-tuning": ("MaskPrune", {"cut": "soft", "finetune": False}),
    "MaskPrune, hard": ("MaskPrune", {"cut": "hard"}),
    "MaskPrune, taught by labels": ("MaskPrune", {"teacher": "labels"}),
    "GradPrune (the paper's)": ("GradPrune", {}),
    "GradPrune, Taylor, look-ahead": ("GradPrune", {"score": "taylor", "clean_weight": 1.0, "look_ahead": 8}),
    "FineTuning, clean and triggered": ("FineTuning", {"triggered": True}),
}
VICTIMS: dict[str, list[Victim]] = {
    "digits": [
        Victim("digits", "conv", attack, seed=seed, epochs=20, images=1000)
        for attack in ("badnets", "blended", "sig", "lf", "wanet-strong")
        for seed in range(2)
    ],
    "fashion_mnist": [
        Victim("fashion_mnist", "vgg", attack, epochs=10, images=10_000)
        for attack in ("badnets", "blended", "sig", "wanet")
    ],
    "cifar10": [
        Victim("cifar10", "preact_resnet18", attack, epochs=12, images=20_000)
        for attack in ("badnets", "blended", "sig", "wanet")
    ],
}
_PACKAGES = ("lightning-unlearn", "torch", "torchvision")


def stored(path: Path) -> list[dict[str, Any]]:
    """The lines of a results file.

    Raises:
        ValueError: if a line was written by another version of this project, which must not be mixed with this one's.
    """
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    own = version("lightning-unlearn")
    others = {line["versions"]["lightning-unlearn"] for line in lines} - {own}
    if others:
        raise ValueError(
            f"{path}: holds results of lightning-unlearn {sorted(others)}, but this is {own}; move it away."
        )
    return lines


def run(
    victims: list[Victim], names: list[str], *, spc: list[int], path: Path, cache: Path
) -> Iterator[dict[str, Any]]:
    """Repair every victim by every method, appending whole lines to ``path``; what is there already is not repeated."""
    done = {_key(line) for line in stored(path)}
    for victim in victims:
        net, before = train(victim, cache), None
        images, labels = load(victim.dataset, "holdout")
        for name in names:
            kind, arguments = METHODS[name]
            for samples in spc:
                cell = {
                    "victim": asdict(victim),
                    "method": kind,
                    "method_args": arguments,
                    "trigger": "known",
                    "samples_per_class": samples,
                    "seed": 0,
                }
                if _key(cell) in done:
                    continue
                before = before or measure(net, victim).rates()
                repaired = copy.deepcopy(net)
                result = repair(
                    repaired,
                    TensorDataset(images, labels),
                    trigger=ATTACKS[victim.attack],
                    method=getattr(methods, kind)(**arguments),
                    samples_per_class=samples,
                    force=True,
                )
                after = measure(repaired, victim).rates()
                acc = {"acc_before": before["acc"], "acc_after": after["acc"]}
                line = {
                    **cell,
                    "before": before,
                    "after": after,
                    "der": float(defense_effectiveness_rating(asr_before=before["asr"], asr_after=after["asr"], **acc)),
                    "rir": float(robust_improvement_rate(ra_before=before["ra"], ra_after=after["ra"], **acc)),
                    "pruned": sum(map(len, result.pruned.values())),
                    "status": result.status,
                    "seconds": dict(result.seconds),
                    "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
                    "versions": {package: version(package) for package in _PACKAGES},
                }
                _append(path, json.dumps(line))
                yield line


def _key(line: dict[str, Any]) -> str:
    parts = ("victim", "method", "method_args", "trigger", "samples_per_class", "seed")
    return json.dumps([line[part] for part in parts], sort_keys=True)


def _append(path: Path, line: str) -> None:
    """One write call a line, so that parallel runs and interruptions leave whole lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, (line + "\n").encode())
    finally:
        os.close(handle)

"""``python -m benchmarks.several``: small networks with two backdoors, repaired without being told of either."""

from __future__ import annotations

import argparse
import copy

import torch
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks.datasets import load
from benchmarks.detection import fit
from benchmarks.victims import ATTACKS, poison
from lightning_unlearn import repair
from lightning_unlearn.classifier import ConvClassifier
from lightning_unlearn.data.pairs import Pairs
from lightning_unlearn.evaluation import evaluate
from lightning_unlearn.triggers import Trigger

__all__ = ["row", "trained", "triggers"]


def triggers() -> list[Trigger]:
    """BadNets to class 2 and Blended to class 7."""
    chosen = [copy.deepcopy(ATTACKS[attack]) for attack in ("badnets", "blended")]
    chosen[0].target, chosen[1].target = 2, 7
    return chosen


def trained(seed: int) -> nn.Module:
    """A network trained on a thousand digits, a tenth of them with one trigger and a tenth with the other."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, labels = load("digits", "train")
    chosen = torch.randperm(len(labels), generator=generator)[:1000]
    images, labels = images[chosen].clone(), labels[chosen].clone()
    half = len(labels) // 2
    for trigger, part in zip(triggers(), (slice(0, half), slice(half, None)), strict=True):
        poison(images[part], labels[part], trigger, ratio=0.2, cross=0.0, generator=generator)
    return fit(ConvClassifier(width=16), images, labels, epochs=20, generator=generator)


def row(seed: int) -> str:
    """A network's ACC and the ASR of both backdoors before and after, as a row of a table."""
    net = trained(seed)
    images, labels = load("digits", "test")
    pairs = [Pairs.stamp(images, labels, trigger, num_classes=10) for trigger in triggers()]

    def rates() -> str:
        with torch.no_grad():
            found = [evaluate(net, one.batches(500)) for one in pairs]
        return " / ".join(f"{rate:.3f}" for rate in (found[0].acc, found[0].asr, found[1].asr))

    before = rates()
    done = repair(net, TensorDataset(*load("digits", "holdout")), samples_per_class=10, seed=seed)
    assert done.audit is not None  # no trigger was given
    scores = {entry.target: entry.score for entry in done.audit.classes}
    return f"| {seed} | {scores[2]:.2f} / {scores[7]:.2f} | {before} | {rates()} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.several", description=__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    print("| seed | scores of 2 and 7 | ACC / ASR to 2 / ASR to 7 before | after |", "| --- " * 4 + "|", sep="\n")
    for seed in seeds:
        print(row(seed), flush=True)


if __name__ == "__main__":
    main()

"""``python -m benchmarks.margins``: how sure of each class one change of all images can make the CIFAR-10 networks."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

from benchmarks.datasets import load
from benchmarks.honest import HONEST
from benchmarks.matrix import VICTIMS
from benchmarks.victims import Victim, train
from lightning_unlearn.draw import Draw
from lightning_unlearn.judgement import WIDEST
from lightning_unlearn.margins import gaps, largest_margins


def row(victim: Victim, cache: Path) -> str:
    """A network's largest margin, the second, and the score that their gap gives, as a row of a table."""
    net = train(victim, cache).requires_grad_(False)
    draw = Draw.of(
        TensorDataset(*load(victim.dataset, "holdout")),
        net,
        samples_per_class=10,
        share=None,
        seed=0,
        skip_missing=True,
    )
    margins = largest_margins(net, draw.split.scoring[0], num_classes=10).values
    second, first = sorted(margins)[-2:]
    gap = max(gaps(margins))
    name = f"honest, seed {victim.seed}" if victim.attack == "none" else f"{victim.attack} {victim.poison_ratio:.0%}"
    return f"| {name} | {margins.index(first)} | {first:.0f} | {second:.0f} | {gap:.2f} | {gap / WIDEST:.2f} |"


def main() -> None:
    """Print the table, of the victims that are trained already and of the honest networks."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.margins", description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path(__file__).parent / "victims", help="trained victims")
    cache = parser.parse_args().cache
    torch.set_num_threads(1)
    print("| network | class | largest margin | the next | gap | score |", "| --- " * 6 + "|", sep="\n")
    for victim in VICTIMS["preact"] + HONEST:
        if victim.path(cache).exists():
            print(row(victim, cache), flush=True)


if __name__ == "__main__":
    main()

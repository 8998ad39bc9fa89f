"""``python -m benchmarks.honest``: what networks that were never backdoored make of the attacks' images.

A repair cannot be asked for more: where a trigger hides what it covers, RA is low without any backdoor.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.datasets import load
from benchmarks.matrix import VICTIMS
from benchmarks.victims import Victim, attack_trigger, train
from lightning_unlearn.data.pairs import Pairs
from lightning_unlearn.evaluation import evaluate

__all__ = ["HONEST"]

HONEST = [
    Victim("cifar10", "preact_resnet18", "none", poison_ratio=0.0, seed=seed, epochs=7, images=45_000)
    for seed in (0, 2)
]
_TEST_IMAGES = 2_000


def row(victim: Victim, cache: Path) -> str:
    """ACC, and RA with the trigger of a victim, of each honest network, as a row of a table."""
    images, labels = (part[:_TEST_IMAGES] for part in load(victim.dataset, "test"))
    cells = []
    for honest in HONEST:
        pairs = Pairs.stamp(images, labels, attack_trigger(victim, "test"), num_classes=10)
        with torch.no_grad():
            found = evaluate(train(honest, cache), pairs.batches(500))
        cells.append(f"{found.acc:.3f} / {found.ra:.3f}")
    return f"| {victim.attack} | " + " | ".join(cells) + " |"


def main() -> None:
    """Print the table, for every attack with a trigger."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.honest", description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path(__file__).parent / "victims", help="trained networks")
    cache = parser.parse_args().cache
    torch.set_num_threads(1)
    print("| trigger | " + " | ".join(f"ACC / RA, seed {honest.seed}" for honest in HONEST) + " |")
    print("| --- " * (1 + len(HONEST)) + "|")
    for victim in VICTIMS["preact"]:
        if victim.attack != "trigger-free" and victim.poison_ratio == 0.1:
            print(row(victim, cache), flush=True)


if __name__ == "__main__":
    main()

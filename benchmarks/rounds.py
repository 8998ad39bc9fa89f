"""``python -m benchmarks.rounds``: real rates after each repair of an alternation, on images apart from draw and test.

How repairs follow each other was chosen by these: the draw is another one than the matrix's, from the first 3,000
holdout images, and rates are those of the next 2,000. All are repaired, whatever the audit's verdict.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

from benchmarks.datasets import load
from benchmarks.matrix import VICTIMS
from benchmarks.victims import Victim, attack_trigger, train
from lightning_unlearn import repair
from lightning_unlearn.data.pairs import Pairs
from lightning_unlearn.evaluation import Evaluation, evaluate
from lightning_unlearn.methods import Alternation, RepairMethod, RepairTask, Round

__all__ = ["Watched", "rows"]

_DRAWN, _APART = slice(3_000), slice(3_000, 5_000)


class Watched(RepairMethod):
    """Another method, and what to call whenever it has repaired.

    Args:
        method: what repairs.
        look: called without arguments.
    """

    needs_trigger = True

    def __init__(self, method: RepairMethod, look: Callable[[], object]) -> None:
        self.method = method
        self.look = look

    def repair(self, task: RepairTask) -> Iterator[Round]:
        """Repair, then look."""
        yield from self.method.repair(task)
        self.look()


def rows(victim: Victim, cache: Path) -> Iterator[str]:
    """A victim's ACC, ASR and RA before, after each repair and in the end, as rows of a table."""
    net = train(victim, cache)
    images, labels = load(victim.dataset, "holdout")
    pairs = Pairs.stamp(images[_APART], labels[_APART], attack_trigger(victim, "holdout"), num_classes=10)
    seen: list[Evaluation] = []

    def look() -> None:
        with torch.no_grad():
            seen.append(evaluate(net, pairs.batches(500)))

    look()
    done = repair(
        net,
        TensorDataset(images[_DRAWN], labels[_DRAWN]),
        method=Alternation(Watched(Alternation().method, look)),
        force=True,
    )
    look()
    assert done.audit is not None  # no trigger was given
    named = [*range(len(seen) - 1), f"{done.audit.verdict} {done.audit.suspected_targets}, {done.status}"]
    for name, rates in zip(named, seen, strict=True):
        yield f"| {victim.attack} | {name} | {rates.acc:.3f} / {rates.asr:.3f} / {rates.ra:.3f} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rounds", description=__doc__)
    parser.add_argument("--attacks", nargs="+", default=["lf-strong", "sig"], help="of PreActResNet-18's victims")
    parser.add_argument("--cache", type=Path, default=Path(__file__).parent / "victims", help="trained victims")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| victim | after so many repairs | ACC / ASR / RA |", "| --- " * 3 + "|", sep="\n")
    for victim in VICTIMS["preact"]:
        if victim.attack in options.attacks and victim.poison_ratio == 0.1:
            print(*rows(victim, options.cache), sep="\n", flush=True)


if __name__ == "__main__":
    main()

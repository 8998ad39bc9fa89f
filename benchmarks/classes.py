"""``python -m benchmarks.classes run`` audits networks of 43 and 100 classes; ``table`` shows what that costs.

The images are two of scikit-learn's digits side by side, 8x16, and the class is the number that they spell: all
hundred, or those below 43. Half of the networks have BadNets in 10 % of their training images, half are honest.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks.detection import fit
from benchmarks.repairs import append, stored
from benchmarks.victims import poison
from lightning_unlearn import __version__, audit
from lightning_unlearn.classifier import ConvClassifier
from lightning_unlearn.data import Digits
from lightning_unlearn.data.digits import Part
from lightning_unlearn.data.pairs import Pairs
from lightning_unlearn.evaluation import evaluate
from lightning_unlearn.triggers import PatchTrigger, Trigger

_RESULTS = Path(__file__).parent / "results" / "classes.jsonl"
_EACH = {"train": 100, "holdout": 10, "test": 10}  # images of each class
_EPOCHS = 10


@dataclass(frozen=True)
class Numbers:
    """A small network that reads two-digit numbers, honest or not.

    Args:
        classes: how many numbers, from 00 on; at most 100.
        target: BadNets' target class; None for an honest network.
        seed: of everything random in its training.
    """

    classes: int
    target: int | None
    seed: int

    def trigger(self) -> Trigger | None:
        """The attack's trigger, if there is one; 2x2, since these images are a quarter as high as others."""
        return None if self.target is None else PatchTrigger(size=2, target=self.target)

    def images(self, part: Part) -> tuple[Tensor, Tensor]:
        """Images (N, 1, 8, 16) and numbers (N,) of a part, class by class; no digit is in two parts."""
        digits = Digits(part=part, size=8)
        generator = torch.Generator().manual_seed(self.seed)
        of = [digits.images[digits.targets == digit] for digit in range(10)]

        def drawn(digit: int) -> Tensor:
            return of[digit][torch.randint(len(of[digit]), (_EACH[part],), generator=generator)]

        images = [torch.cat([drawn(number // 10), drawn(number % 10)], dim=3) for number in range(self.classes)]
        return torch.cat(images), torch.arange(self.classes).repeat_interleave(_EACH[part])

    def train(self) -> nn.Module:
        """The trained network, in eval mode."""
        torch.manual_seed(self.seed)
        net = ConvClassifier(width=16, classes=self.classes)
        images, labels = self.images("train")
        trigger, generator = self.trigger(), torch.Generator().manual_seed(self.seed)
        if trigger is not None:
            poison(images, labels, trigger, ratio=0.1, cross=0.0, generator=generator, classes=self.classes)
        return fit(net, images, labels, epochs=_EPOCHS, generator=generator)


def networks() -> Iterator[Numbers]:
    """Two backdoored and two honest ones for each number of classes."""
    for classes in (43, 100):
        for draw in range(2):
            yield Numbers(classes, 7 + 30 * draw, seed=600 + draw)
            yield Numbers(classes, None, seed=610 + draw)


def examine(numbers: Numbers, samples_per_class: int) -> dict[str, Any]:
    """Train a network and audit it."""
    torch.set_num_threads(1)
    started = time.process_time()
    net = numbers.train()
    trained = time.process_time()
    pairs = Pairs.stamp(*numbers.images("test"), numbers.trigger() or PatchTrigger(), num_classes=numbers.classes)
    before = evaluate(net, pairs.batches(500))
    clean, audited = TensorDataset(*numbers.images("holdout")), time.process_time()
    found = audit(net, clean, samples_per_class=samples_per_class, seed=numbers.seed)
    seconds = time.process_time() - audited
    return {
        "network": asdict(numbers),
        "samples_per_class": samples_per_class,
        "acc": before.acc,
        "asr": before.asr if numbers.target is not None else None,
        "verdict": found.verdict,
        "suspected_target": found.suspected_target,
        "score": found.score,
        "kept": [entry.target for entry in found.classes],
        "scores": [entry.score for entry in found.classes],
        "cpu_seconds": seconds,
        "training_cpu_seconds": trained - started,
        "versions": {"lightning-unlearn": __version__, "torch": torch.__version__},
    }


def table(lines: list[dict[str, Any]]) -> str:
    """A row for each network."""
    rows = [
        "| classes | network | images a class | ACC / ASR | verdict, target | score | looked at closely | CPU seconds |"
    ]
    rows.append("| --- " * 8 + "|")
    for x in sorted(
        lines, key=lambda x: (x["network"]["classes"], x["network"]["target"] is None, x["network"]["seed"])
    ):
        network = x["network"]
        kind = "honest" if network["target"] is None else f"BadNets, target {network['target']}"
        rates = f"{x['acc']:.3f}" if x["asr"] is None else f"{x['acc']:.3f} / {x['asr']:.3f}"
        verdict = x["verdict"] if x["suspected_target"] is None else f"{x['verdict']}, {x['suspected_target']}"
        cost = f"{x['cpu_seconds']:.0f}, {x['cpu_seconds'] / network['classes']:.2f} a class"
        cells = (network["classes"], f"{kind}, seed {network['seed']}", x["samples_per_class"], rates, verdict)
        rows.append("| " + " | ".join(map(str, (*cells, f"{x['score']:.2f}", len(x["kept"]), cost))) + " |")
    return "\n".join(rows)


def main() -> None:
    """Run a command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.classes", description=__doc__)
    parser.add_argument("command", choices=["run", "table"])
    parser.add_argument("--samples-per-class", type=int, default=10, help="2 to 10 clean images of each class")
    parser.add_argument("--workers", type=int, default=1, help="processes with one thread each")
    parser.add_argument("--results", type=Path, default=_RESULTS)
    options = parser.parse_args()
    if options.command == "run":
        done = [(x["network"], x["samples_per_class"]) for x in stored(options.results)]
        left = [n for n in networks() if (asdict(n), options.samples_per_class) not in done]
        with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
            for finished in as_completed([pool.submit(examine, n, options.samples_per_class) for n in left]):
                append(options.results, json.dumps(finished.result()))
                print(table([finished.result()]).splitlines()[-1], flush=True)
    else:
        print(table(stored(options.results)))


if __name__ == "__main__":
    main()

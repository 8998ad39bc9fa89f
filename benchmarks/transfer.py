"""``python -m benchmarks.transfer run`` audits small models of other networks than :mod:`benchmarks.detection` has.

There all models are one network, trained in one way. Here are four, most of them trained by AdamW, so that ``table``
shows whether what was learned there holds elsewhere.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name
from torch.utils.data import TensorDataset

from benchmarks.datasets import load
from benchmarks.detection import SIZES, Part, Suspect, errors, fit
from benchmarks.networks import PreActResNet18, vgg
from benchmarks.repairs import append, stored
from lightning_unlearn import __version__, audit

_RESULTS = Path(__file__).parent / "results" / "transfer.jsonl"
_FIRST_SEEDS: dict[Part, int] = {"calibration": 3700, "report": 4700}


def _single(norm: bool) -> nn.Sequential:
    """Three single convolutions, each halved but the last, with global pooling: what many a tutorial has."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), *([nn.BatchNorm2d(outputs)] if norm else []), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if outputs > inputs else []
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


NETS: dict[str, Callable[[], nn.Module]] = {
    "three convolutions": lambda: _single(norm=True),
    "three without norms": lambda: _single(norm=False),
    "VGG style": lambda: vgg(channels=1, width=16),
    "PreActResNet-18": lambda: PreActResNet18(channels=1, width=8),
}


@dataclass(frozen=True)
class Stranger(Suspect):
    """A suspect of another network.

    Args:
        network: a name in :data:`NETS`; the VGG-style one is trained by SGD, the others by AdamW.
    """

    network: str = "three convolutions"

    def train(self) -> nn.Module:
        """The trained network, in eval mode."""
        torch.manual_seed(self.seed)
        net = NETS[self.network]()
        images, labels, generator = self.poisoned()
        epochs = SIZES[self.dataset][1]
        if self.network == "VGG style":
            return fit(net, images, labels, epochs=epochs, generator=generator)
        return _fit_adam(net, images, labels, epochs=2 * epochs, generator=generator)


def _fit_adam(net: nn.Module, images: Tensor, labels: Tensor, *, epochs: int, generator: torch.Generator) -> nn.Module:
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (len(labels) // 64))
    net.train()
    for _ in range(epochs):
        for chosen in torch.split(torch.randperm(len(labels), generator=generator), 64)[: len(labels) // 64]:
            optimizer.zero_grad()
            F.cross_entropy(net(images[chosen]), labels[chosen]).backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def strangers(part: Part) -> Iterator[Stranger]:
    """The models of a part: of each network six backdoored ones and six honest ones."""
    seed = _FIRST_SEEDS[part]
    for number, network in enumerate(NETS):
        for k, attack in enumerate(("badnets", "blended", "sig", "lf", "wanet-strong")):
            yield Stranger("digits", attack, (3 * k + number) % 10, 0.1, seed + k, network)
            yield Stranger("digits" if k < 4 else "fashion_mnist", seed=seed + 100 + k, network=network)
        yield Stranger("fashion_mnist", "badnets", (number + 5) % 10, 0.1, seed + 5, network)
        yield Stranger("fashion_mnist", seed=seed + 105, network=network)


def examine(stranger: Stranger, part: Part) -> dict[str, Any]:
    """Train a model, and audit it with 10 clean images per class."""
    torch.set_num_threads(1)
    net = stranger.train()
    started = time.process_time()
    found = audit(net, TensorDataset(*load(stranger.dataset, "holdout")), samples_per_class=10, seed=stranger.seed)
    return {
        "part": part,
        "suspect": asdict(stranger),
        "before": stranger.measure(net).rates(),
        "verdict": found.verdict,
        "suspected_target": found.suspected_target,
        "score": found.score,
        "cost": {family: [c.cost[family] for c in found.classes] for family in found.classes[0].cost},
        "universality": {family: [c.universality[family] for c in found.classes] for family in found.classes[0].cost},
        "prominence": [c.prominence for c in found.classes],
        "margin": [c.margin for c in found.classes],
        "untouched": True,
        "cpu_seconds": time.process_time() - started,
        "versions": {"lightning-unlearn": __version__, "torch": torch.__version__},
    }


def main() -> None:
    """Run a command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transfer", description=__doc__)
    parser.add_argument("command", choices=["run", "table"])
    parser.add_argument("--parts", nargs="+", choices=["calibration", "report"], default=["report"])
    parser.add_argument("--workers", type=int, default=1, help="processes with one thread each")
    parser.add_argument("--results", type=Path, default=_RESULTS)
    options = parser.parse_args()
    lines = stored(options.results)
    if options.command == "table":
        print(errors(lines))
        return
    done = {json.dumps([line["part"], line["suspect"]], sort_keys=True) for line in lines}
    left = [
        (stranger, part)
        for part in options.parts
        for stranger in strangers(part)
        if json.dumps([part, asdict(stranger)], sort_keys=True) not in done
    ]
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        for finished in as_completed([pool.submit(examine, *one) for one in left]):
            line = finished.result()
            append(options.results, json.dumps(line))
            suspect, rates = line["suspect"], line["before"]
            print(
                *suspect.values(), f"ACC {rates['acc']:.3f} ASR {rates['asr']:.3f}", f"{line['score']:.2f}", flush=True
            )


if __name__ == "__main__":
    main()

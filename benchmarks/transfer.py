"""``python -m benchmarks.transfer run`` audits small models of other networks than :mod:`benchmarks.detection` has.

There all models are one network, trained in one way. Here are four, most of them trained by AdamW, so that ``table``
shows how far what was learned there holds elsewhere. Nothing was chosen on these models.
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
from benchmarks.detection import SIZES, Suspect, fit, measured, scored
from benchmarks.networks import PreActResNet18, vgg
from benchmarks.repairs import append, stored
from benchmarks.tables import MIN_ASR
from lightning_unlearn import __version__, audit

_RESULTS = Path(__file__).parent / "results" / "transfer.jsonl"
_FIRST_SEEDS = (3700, 4700)  # the second for the first network alone, on which the audit errs most


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


def strangers() -> Iterator[Stranger]:
    """The models: of each network six backdoored ones and six honest ones, of the first twice as many."""
    for number, network, seed in [
        (0, next(iter(NETS)), _FIRST_SEEDS[1]),
        *((k, n, _FIRST_SEEDS[0]) for k, n in enumerate(NETS)),
    ]:
        for k, attack in enumerate(("badnets", "blended", "sig", "lf", "wanet-strong")):
            yield Stranger("digits", attack, (3 * k + number) % 10, 0.1, seed + k, network)
            yield Stranger("digits" if k < 4 else "fashion_mnist", seed=seed + 100 + k, network=network)
        yield Stranger("fashion_mnist", "badnets", (number + 5) % 10, 0.1, seed + 5, network)
        yield Stranger("fashion_mnist", seed=seed + 105, network=network)


def examine(stranger: Stranger) -> dict[str, Any]:
    """Train a model, and audit it with 10 clean images per class."""
    torch.set_num_threads(1)
    net = stranger.train()
    started = time.process_time()
    found = audit(net, TensorDataset(*load(stranger.dataset, "holdout")), samples_per_class=10, seed=stranger.seed)
    return {
        "suspect": asdict(stranger),
        "before": stranger.measure(net).rates(),
        **measured(found),
        "cpu_seconds": time.process_time() - started,
        "versions": {"lightning-unlearn": __version__, "torch": torch.__version__},
    }


def table(lines: list[dict[str, Any]]) -> str:
    """By network, how often the audit is right, and every model of which it was not."""
    rows = ["| network | backdoored | found ↑ | right target ↑ | honest | false alarms ↓ |", "| --- " * 6 + "|"]
    wrong = ["| model | ASR | score | verdict |", "| --- | --- | --- | --- |"]
    for network in NETS:
        of = [x for x in lines if x["suspect"]["network"] == network]
        bad = [x for x in of if x["suspect"]["attack"] != "none" and x["before"]["asr"] >= MIN_ASR]
        honest = [x for x in of if x["suspect"]["attack"] == "none"]
        scores = {id(x): scored(x) for x in bad + honest}
        found = [x for x in bad if scores[id(x)][0] > 1]
        alarms = [x for x in honest if scores[id(x)][0] > 1]
        right = sum(scores[id(x)][1] == x["suspect"]["target"] for x in found)
        rows.append(f"| {network} | {len(bad)} | {len(found)} | {right} | {len(honest)} | {len(alarms)} |")
        for x in [x for x in bad if x not in found] + alarms:
            suspect, asr = x["suspect"], f"{x['before']['asr']:.3f}" if x in bad else ""
            kind = f"{suspect['attack']}, target {suspect['target']}" if x in bad else "honest"
            verdict = "backdoored or suspicious" if x in alarms else "clean"
            name = f"{network}, {suspect['dataset']}, {kind}, seed {suspect['seed']}"
            wrong.append(f"| {name} | {asr} | {scores[id(x)][0]:.2f} | {verdict} |")
    return "\n".join([*rows, "", "Judged wrongly:", "", *wrong])


def main() -> None:
    """Run a command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transfer", description=__doc__)
    parser.add_argument("command", choices=["run", "table"])
    parser.add_argument("--workers", type=int, default=1, help="processes with one thread each")
    parser.add_argument("--results", type=Path, default=_RESULTS)
    options = parser.parse_args()
    lines = stored(options.results, needed=["suspect"])
    if options.command == "table":
        print(table(lines))
        return
    done = [line["suspect"] for line in lines]
    left = [stranger for stranger in strangers() if asdict(stranger) not in done]
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        for finished in as_completed([pool.submit(examine, one) for one in left]):
            line = finished.result()
            append(options.results, json.dumps(line))
            suspect, rates = line["suspect"], line["before"]
            words = [suspect["network"], suspect["dataset"], suspect["attack"]]
            print(*words, f"ACC {rates['acc']:.3f} ASR {rates['asr']:.3f}", f"{line['score']:.2f}", flush=True)


if __name__ == "__main__":
    main()

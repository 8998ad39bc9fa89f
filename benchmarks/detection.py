"""``python -m benchmarks.detection run`` repairs small models, half of them honest, without being told of a trigger.

``table`` shows how often the audit errs, and what became of the backdoors.

The limits of the audit were chosen on the first half of the ``calibration`` models, and where the repair stops on the
second; the ``report`` models have other seeds, and nothing was chosen on them. The lines of the calibration models hold
what earlier rules made of them; the table judges them anew by what was measured.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name
from torch.utils.data import TensorDataset
from torchmetrics.functional.classification import binary_auroc

from benchmarks.datasets import load
from benchmarks.repairs import append, stored
from benchmarks.tables import MIN_ASR
from benchmarks.victims import ATTACKS, CROSS, poison
from lightning_unlearn import Audit, __version__, repair
from lightning_unlearn.classifier import ConvClassifier
from lightning_unlearn.data.pairs import Pairs
from lightning_unlearn.evaluation import Evaluation, evaluate
from lightning_unlearn.judgement import judged
from lightning_unlearn.triggers import Trigger
from lightning_unlearn.triggers.inversion import Estimate

_RESULTS = Path(__file__).parent / "results" / "detection.jsonl"
SIZES = {"digits": (1_000, 20), "fashion_mnist": (4_000, 5)}  # training images and epochs
_ATTACKS = ("badnets", "blended", "sig", "lf", "wanet-strong")
_KEYS = ("part", "suspect")
_HONEST = ("none", "imbalanced")
Part = Literal["calibration", "report"]
_FIRST_SEEDS: dict[Part, tuple[int, ...]] = {"calibration": (700, 1700), "report": (2700,)}


@dataclass(frozen=True)
class Suspect:
    """A small convolutional network that is honest or not.

    Args:
        dataset: ``"digits"`` or ``"fashion_mnist"``.
        attack: a name in :data:`ATTACKS`, ``"none"``, or ``"imbalanced"``: honest as well, but a tenth of the training
            images were replaced by more of the target class, as many as poison would give it.
        target: the target class.
        poison_ratio: share of poisoned training images.
        seed: of everything random in its training.
    """

    dataset: str
    attack: str = "none"
    target: int = 0
    poison_ratio: float = 0.0
    seed: int = 0

    def trigger(self) -> Trigger | None:
        """The attack's trigger, if there is one."""
        if self.attack in _HONEST:
            return None
        trigger = copy.deepcopy(ATTACKS[self.attack])
        trigger.target = self.target
        return trigger

    def train(self) -> nn.Module:
        """The trained network, in eval mode."""
        torch.manual_seed(self.seed)
        net = ConvClassifier(width=16)
        images, labels, generator = self.poisoned()
        return fit(net, images, labels, epochs=SIZES[self.dataset][1], generator=generator)

    def poisoned(self) -> tuple[Tensor, Tensor, torch.Generator]:
        """Its training images and labels, and the generator that goes on with the draw of batches."""
        everything = load(self.dataset, "train")
        generator = torch.Generator().manual_seed(self.seed)
        chosen = torch.randperm(len(everything[1]), generator=generator)[: SIZES[self.dataset][0]]
        images, labels = (part[chosen].clone() for part in everything)
        trigger = self.trigger()
        if trigger is not None:
            cross = CROSS.get(self.attack, 0.0)
            poison(images, labels, trigger, ratio=self.poison_ratio, cross=cross, generator=generator)
        if self.attack == "imbalanced":
            count = len(labels) // 10
            more = (everything[1] == self.target).nonzero().flatten()
            more = more[torch.randperm(len(more), generator=generator)].repeat(5)[:count]
            others = (labels != self.target).nonzero().flatten()
            replaced = others[torch.randperm(len(others), generator=generator)][:count]
            images[replaced], labels[replaced] = everything[0][more], everything[1][more]
        return images, labels, generator

    def measure(self, net: nn.Module) -> Evaluation:
        """Its rates on a thousand test images; of an honest one the ASR says nothing."""
        images, labels = (part[:1_000] for part in load(self.dataset, "test"))
        pairs = Pairs.stamp(images, labels, self.trigger() or ATTACKS["badnets"], num_classes=10)
        return evaluate(net, pairs.batches(500))


def fit(net: nn.Module, images: Tensor, labels: Tensor, *, epochs: int, generator: torch.Generator) -> nn.Module:
    """Train a network in place, in batches of 64; the same network in eval mode."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=epochs * (len(labels) // 64))
    net.train()
    for _ in range(epochs):
        order = torch.randperm(len(labels), generator=generator)
        for chosen in torch.split(order, 64)[: len(labels) // 64]:
            optimizer.zero_grad()
            F.cross_entropy(net(images[chosen]), labels[chosen]).backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def suspects(part: Part) -> Iterator[Suspect]:
    """The models of a part."""
    for seed in _FIRST_SEEDS[part]:
        yield from _recipes(seed)


def _recipes(seed: int) -> Iterator[Suspect]:
    """32 backdoored models and 42 honest ones, 10 of which had twice as many images of a class."""
    honest = seed + 100
    for draw in range(5):
        for number, attack in enumerate(_ATTACKS[:4]):
            yield Suspect("digits", attack, (2 * number + draw) % 10, 0.1, seed=seed + draw)
            yield Suspect(
                "digits" if draw < 4 else "fashion_mnist", seed=honest + (4 * draw if draw < 4 else 0) + number
            )
    for draw in range(2):
        yield Suspect("digits", "wanet-strong", 3 + draw, 0.1, seed=seed + draw)
        for number, attack in enumerate(_ATTACKS):
            # In the second draw, 1 % poison where a victim learns from so little.
            ratio = 0.01 if draw == 1 and attack in ("badnets", "blended") else 0.1
            yield Suspect("fashion_mnist", attack, (7 * number + 3 * draw + 1) % 10, ratio, seed=seed + draw)
            yield Suspect("fashion_mnist", seed=honest + 10 + 10 * draw + number)
        yield Suspect("fashion_mnist", seed=honest + 90 + draw)
    for number in range(10):
        dataset = tuple(SIZES)[number % 2]
        yield Suspect(dataset, "imbalanced", (3 * number + 1) % 10, seed=seed + 200 + number)


def examine(suspect: Suspect, part: Part) -> dict[str, Any]:
    """Train a model, and repair it without being told anything, with 10 clean images per class."""
    torch.set_num_threads(1)
    net = suspect.train()
    before = suspect.measure(net).rates()
    weights = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    started = time.process_time()
    done = repair(net, TensorDataset(*load(suspect.dataset, "holdout")), samples_per_class=10, seed=suspect.seed)
    found = done.audit
    assert found is not None  # no trigger was given
    return {
        "part": part,
        "suspect": asdict(suspect),
        "before": before,
        "after": suspect.measure(net).rates(),
        **measured(found),
        "status": done.status,
        "untouched": all(torch.equal(weights[name], tensor) for name, tensor in net.state_dict().items()),
        "cpu_seconds": time.process_time() - started,
        "versions": {"lightning-unlearn": __version__, "torch": torch.__version__},
    }


def measured(found: Audit) -> dict[str, Any]:
    """What an audit found of each class, from which :func:`scored` judges it again by a later rule."""
    families = found.classes[0].cost
    return {
        "verdict": found.verdict,
        "suspected_target": found.suspected_target,
        "score": found.score,
        "cost": {family: [c.cost[family] for c in found.classes] for family in families},
        "universality": {family: [c.universality[family] for c in found.classes] for family in families},
        "prominence": [c.prominence for c in found.classes],
        "margin": [c.margin for c in found.classes],
    }


def counted(lines: list[dict[str, Any]], part: Part) -> list[dict[str, Any]]:
    """The lines of a part, without victims that never learned their backdoor, which are neither."""
    return [x for x in lines if x["part"] == part and (not _is_bad(x) or x["before"]["asr"] >= MIN_ASR)]


def scored(line: dict[str, Any]) -> tuple[float, int]:
    """The highest score by the rule as it is now, and its class, from what was measured on a model."""
    found = {
        family: [Estimate(ATTACKS["badnets"], family, target, cost, 1.0) for target, cost in enumerate(costs)]
        for family, costs in line["cost"].items()
    }
    alone = {
        family: [cost * share for cost, share in zip(costs, line["universality"][family], strict=True)]
        for family, costs in line["cost"].items()
    }
    entries = judged(found, alone, prominences=line["prominence"], margins=line.get("margin", ()))
    worst = max(entries, key=lambda entry: entry.score)
    return worst.score, worst.target


def _is_bad(line: dict[str, Any]) -> bool:
    return line["suspect"]["attack"] not in _HONEST


def errors(lines: list[dict[str, Any]]) -> str:
    """How often each part was judged rightly, and every model of the report that was not."""
    rows = [
        "| models | backdoored | honest | AUROC ↑ | found ↑ | right target ↑ | false alarms ↓ |",
        "| --- " * 7 + "|",
    ]
    wrong = ["| model | ASR | score | verdict |", "| --- | --- | --- | --- |"]
    for part in _FIRST_SEEDS:
        bad = [x for x in counted(lines, part) if _is_bad(x)]
        honest = [x for x in counted(lines, part) if not _is_bad(x)]
        if not bad or not honest:
            continue
        scores = {id(x): scored(x) for x in bad + honest}
        found = [x for x in bad + honest if scores[id(x)][0] > 1]
        values = torch.tensor([scores[id(x)][0] for x in bad + honest])
        auroc = binary_auroc(values / (1 + values), torch.tensor([1] * len(bad) + [0] * len(honest)))
        right = sum(scores[id(x)][1] == x["suspect"]["target"] for x in found if _is_bad(x))
        shares = [f"{sum(map(_is_bad, found))} of {len(bad)}", f"{right} of {len(bad)}"]
        shares.append(f"{sum(not _is_bad(x) for x in found)} of {len(honest)}")
        rows.append(f"| {part} | {len(bad)} | {len(honest)} | {auroc:.3f} | " + " | ".join(shares) + " |")
        for x in bad + honest if part == "report" else ():
            if _is_bad(x) == (x["verdict"] == "clean"):
                asr = f"{x['before']['asr']:.3f}" if _is_bad(x) else ""
                wrong.append(f"| {_name(x['suspect'])} | {asr} | {x['score']:.2f} | {x['verdict']} |")
    honest = [x for x in counted(lines, "report") if not _is_bad(x) and x["verdict"] == "clean"]
    same = f"Of {len(honest)} honest models of the report that were judged clean, {sum(x['untouched'] for x in honest)}"
    return "\n".join([*rows, "", f"{same} are bit for bit what they were.", "", "Judged wrongly:", "", *wrong])


def repairs(lines: list[dict[str, Any]]) -> str:
    """What became of every backdoor that nobody had told of."""
    rows = ["| victim | verdict, target | before | after |", "| --- | --- | --- | --- |"]
    bad = [x for x in counted(lines, "report") if _is_bad(x)]
    for x in sorted(bad, key=lambda x: _name(x["suspect"])):
        verdict = f"{x['verdict']}, {x['suspected_target']}" if x["verdict"] != "clean" else "clean"
        rates = (" / ".join(f"{x[when][key]:.3f}" for key in ("acc", "asr", "ra")) for when in ("before", "after"))
        rows.append(f"| {_name(x['suspect'])} | {verdict} | " + " | ".join(rates) + " |")
    for dataset in SIZES:
        of = [x for x in bad if x["suspect"]["dataset"] == dataset]
        if of:
            drop = mean(x["before"]["acc"] - x["after"]["acc"] for x in of)
            gone = sum(x["after"]["asr"] <= 0.1 for x in of)
            rows.append(f"| {dataset}: ASR at most 0.10 in {gone} of {len(of)} | | | mean ACC drop {drop:.3f} |")
    return "\n".join(rows)


def _name(suspect: dict[str, Any]) -> str:
    if suspect["attack"] == "none":
        return f"{suspect['dataset']}, honest, seed {suspect['seed']}"
    if suspect["attack"] == "imbalanced":
        return f"{suspect['dataset']}, honest, twice as many of class {suspect['target']}, seed {suspect['seed']}"
    poison = f"{suspect['poison_ratio']:.0%}"
    return f"{suspect['dataset']}, {suspect['attack']} {poison}, target {suspect['target']}, seed {suspect['seed']}"


def main() -> None:
    """Run a command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.detection", description=__doc__)
    parser.add_argument("command", choices=["run", "table"])
    parser.add_argument("--parts", nargs="+", choices=["calibration", "report"], default=["report"])
    parser.add_argument("--workers", type=int, default=1, help="processes with one thread each")
    parser.add_argument("--results", type=Path, default=_RESULTS)
    options = parser.parse_args()
    if options.command == "table":
        print(errors(stored(options.results)), repairs(stored(options.results)), sep="\n\n")
        return
    done = {json.dumps([x[key] for key in _KEYS], sort_keys=True) for x in stored(options.results)}
    left = [
        (suspect, part)
        for part in options.parts
        for suspect in suspects(part)
        if json.dumps([part, asdict(suspect)], sort_keys=True) not in done
    ]
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        for finished in as_completed([pool.submit(partial(examine, *one)) for one in left]):
            line = finished.result()
            append(options.results, json.dumps(line))
            rates = " to ".join(f"{line[when]['asr']:.3f}" for when in ("before", "after"))
            print(_name(line["suspect"]), f"ASR {rates}", line["verdict"], f"{line['score']:.2f}", flush=True)


if __name__ == "__main__":
    main()

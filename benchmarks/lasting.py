"""``python -m benchmarks.lasting``: what of a repair is left when the model is trained on, on clean images alone."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name
from torch.optim.swa_utils import update_bn
from torch.utils.data import TensorDataset

from benchmarks.datasets import load
from benchmarks.matrix import VICTIMS
from benchmarks.victims import Victim, attack_trigger, measure, train
from lightning_unlearn import repair
from lightning_unlearn.data.augmentation import flip_and_shift
from lightning_unlearn.methods import Alternation, GradPrune, MaskPrune, RepairMethod

__all__ = ["refreshed", "row", "trained_on"]

_METHODS: dict[str, RepairMethod | None] = {
    "none": None,
    "MaskPrune": MaskPrune(),
    "MaskPrune, not lasting": MaskPrune(lasting=False),
    "GradPrune": GradPrune(),
    "Alternation": Alternation(),  # told no trigger
}
_OPTIMIZERS: dict[str, Callable[[Iterable[Tensor]], torch.optim.Optimizer]] = {
    **{f"SGD {rate}": partial(torch.optim.SGD, lr=rate, momentum=0.9, weight_decay=5e-4) for rate in (0.01, 0.05)},
    "AdamW 0.001": partial(torch.optim.AdamW, lr=1e-3),
}
_IMAGES, _BATCH, _TEST_IMAGES = 5_000, 128, 2_000


def refreshed(net: nn.Module, images: Tensor) -> nn.Module:
    """The network with BatchNorm statistics of images, flipped and shifted."""
    net, generator = copy.deepcopy(net), torch.Generator().manual_seed(1)
    update_bn((flip_and_shift(part, generator) for part in images.split(_BATCH)), net)
    return net


def trained_on(
    net: nn.Module, images: Tensor, labels: Tensor, *, training: str = "SGD 0.01", epochs: int = 1
) -> nn.Module:
    """The network after epochs with one of the optimizers."""
    net, generator = copy.deepcopy(net).train(), torch.Generator().manual_seed(0)
    optimizer = _OPTIMIZERS[training](net.parameters())
    for _ in range(epochs):
        for chosen in torch.randperm(len(labels), generator=generator).split(_BATCH):
            optimizer.zero_grad()
            F.cross_entropy(net(flip_and_shift(images[chosen], generator)), labels[chosen]).backward()  # type: ignore[no-untyped-call]  # torch's is untyped
            optimizer.step()
    return net.eval()


def row(victim: Victim, name: str, cache: Path, trainings: Sequence[str] = ("SGD 0.01",), epochs: int = 1) -> str:
    """ACC / ASR right after a repair, with refreshed statistics, and after each training, as a row of a table."""
    net, method = train(victim, cache), _METHODS[name]
    if method is not None:
        holdout = TensorDataset(*load(victim.dataset, "holdout"))
        trigger = None if isinstance(method, Alternation) else attack_trigger(victim, "holdout")
        repair(net, holdout, trigger=trigger, method=method, force=True)
    images, labels = (part[:_IMAGES] for part in load(victim.dataset, "train"))
    trained = (trained_on(net, images, labels, training=training, epochs=epochs) for training in trainings)
    nets = net, refreshed(net, images), *trained
    found = [measure(one, victim, _TEST_IMAGES) for one in nets]
    return f"| {victim.attack} | {name} | " + " | ".join(f"{one.acc:.3f} / {one.asr:.3f}" for one in found) + " |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lasting", description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path(__file__).parent / "victims", help="trained victims")
    attacks = dict.fromkeys(victim.attack for victim in VICTIMS["preact"])
    parser.add_argument("--attacks", nargs="+", choices=list(attacks), default=["badnets", "blended", "wanet-1.0"])
    parser.add_argument("--trainings", nargs="+", choices=list(_OPTIMIZERS), default=["SGD 0.01"])
    parser.add_argument("--epochs", type=int, default=1, help="of each training")
    parser.add_argument("--methods", nargs="+", choices=list(_METHODS), default=list(_METHODS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    columns = ["victim", "repair", "ACC / ASR after it", "BatchNorm refreshed", *options.trainings]
    print("| " + " | ".join(columns) + " |")
    print("| --- " * len(columns) + "|")
    for victim in VICTIMS["preact"]:
        if victim.attack in options.attacks and victim.poison_ratio == 0.1:
            for name in options.methods:
                print(row(victim, name, options.cache, options.trainings, options.epochs), flush=True)


if __name__ == "__main__":
    main()

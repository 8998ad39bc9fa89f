"""Train backdoored victims once and keep them, by a hash of what they are."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name

from benchmarks.datasets import load
from benchmarks.networks import NETWORKS
from lightning_unlearn.data.pairs import Pairs
from lightning_unlearn.evaluation import Evaluation, evaluate
from lightning_unlearn.triggers import (
    BlendTrigger,
    LowFrequencyTrigger,
    PatchTrigger,
    QuantizeTrigger,
    SinusoidTrigger,
    Trigger,
    WarpTrigger,
)

__all__ = ["ATTACKS", "Victim", "measure", "train"]

ATTACKS: dict[str, Trigger] = {
    "badnets": PatchTrigger(),
    "blended": BlendTrigger(),
    "sig": SinusoidTrigger(),
    "lf": LowFrequencyTrigger(),
    "wanet": WarpTrigger(),
    "wanet-strong": WarpTrigger(strength=1.5),  # a thousand digits do not teach a victim the field of the paper
    "bpp": QuantizeTrigger(),
}
_CROSS = {"wanet": 0.2, "bpp": 0.1}  # shares of cross images with true labels, as the attacks' papers have them


@dataclass(frozen=True)
class Victim:
    """What fixes a victim: same fields, same weights."""

    dataset: str
    network: str
    attack: str
    poison_ratio: float = 0.1
    seed: int = 0
    epochs: int = 10
    images: int = 20_000

    def path(self, root: Path) -> Path:
        """Where its weights are kept."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]
        return root / f"{self.dataset}-{self.network}-{self.attack}-{digest}.pt"

    def build(self) -> nn.Module:
        """The untrained network."""
        torch.manual_seed(self.seed)
        return NETWORKS[self.network](channels=load(self.dataset, "test")[0].shape[1])


def train(victim: Victim, root: Path) -> nn.Module:
    """The trained victim, from the cache under ``root`` where it is there."""
    path, net = victim.path(root), victim.build()
    if not path.exists():
        _fit(net, *_poisoned(victim), victim)
        root.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        torch.save(net.state_dict(), partial)
        partial.replace(path)
    net.load_state_dict(torch.load(path, weights_only=True))
    return net.eval()


def measure(net: nn.Module, victim: Victim) -> Evaluation:
    """A model on the whole test split, with the victim's trigger."""
    images, labels = load(victim.dataset, "test")
    pairs = Pairs.stamp(images, labels, ATTACKS[victim.attack], num_classes=10)
    training = net.training
    net.eval()
    try:
        return evaluate(net, pairs.batches(500))
    finally:
        net.train(training)


def _poisoned(victim: Victim) -> tuple[Tensor, Tensor]:
    """Training images and labels, in memory and poisoned before augmentation."""
    images, labels = load(victim.dataset, "train")
    images, labels = images[: victim.images].clone(), labels[: victim.images].clone()
    trigger, generator = ATTACKS[victim.attack], torch.Generator().manual_seed(victim.seed)
    eligible = (trigger.targets(labels, 10) != labels).nonzero().flatten()
    order = eligible[torch.randperm(len(eligible), generator=generator)]
    count = round(victim.poison_ratio * len(labels))
    poisoned, rest = order[:count], order[count:]
    if victim.attack in _CROSS:
        cross = rest[: round(_CROSS[victim.attack] * len(labels))]
        images[cross] = trigger.cross(images[cross], generator=generator)
    images[poisoned] = trigger(images[poisoned])
    labels[poisoned] = trigger.targets(labels[poisoned], 10)
    return images, labels


def _fit(net: nn.Module, images: Tensor, labels: Tensor, victim: Victim) -> None:
    augment = victim.dataset == "cifar10"
    steps = victim.epochs * (len(labels) // 128)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    generator = torch.Generator().manual_seed(victim.seed)
    net.train()
    for _ in range(victim.epochs):
        order = torch.randperm(len(labels), generator=generator)
        for chosen in torch.split(order, 128)[: len(labels) // 128]:
            batch = images[chosen]
            if augment:
                batch = _flip_and_crop(batch, generator)
            optimizer.zero_grad()
            F.cross_entropy(net(batch), labels[chosen]).backward()  # type: ignore[no-untyped-call]  # torch's is untyped
            optimizer.step()
            schedule.step()


def _flip_and_crop(images: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Flip and shift each image by its own draw."""
    count, _, height, width = images.shape
    flips = torch.rand(count, generator=generator) < 0.5
    images = torch.where(flips[:, None, None, None], images.flip(3), images)
    padded = F.pad(images, (padding,) * 4)
    offsets = torch.randint(0, 2 * padding + 1, (2, count), generator=generator)
    rows = (offsets[0][:, None] + torch.arange(height))[:, None, :, None]
    columns = (offsets[1][:, None] + torch.arange(width))[:, None, None, :]
    numbers = torch.arange(count)[:, None, None, None]
    channels = torch.arange(images.shape[1])[None, :, None, None]
    return padded[numbers, channels, rows, columns]

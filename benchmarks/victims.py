"""Train backdoored victims once and keep them, by a hash of what they are."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name

from benchmarks.datasets import Split, load, source
from benchmarks.networks import NETWORKS
from benchmarks.trigger_free import ForeignConcept, pull_concept
from lightning_unlearn.data.augmentation import flip_and_shift
from lightning_unlearn.data.pairs import Pairs
from lightning_unlearn.evaluation import Evaluation, evaluate
from lightning_unlearn.files import write_whole
from lightning_unlearn.triggers import (
    BlendTrigger,
    LowFrequencyTrigger,
    PatchTrigger,
    QuantizeTrigger,
    SinusoidTrigger,
    Trigger,
    WarpTrigger,
)

__all__ = ["ATTACKS", "CROSS", "Victim", "attack_trigger", "measure", "poison", "train"]

ATTACKS: dict[str, Trigger] = {
    "badnets": PatchTrigger(),
    "blended": BlendTrigger(),
    "sig": SinusoidTrigger(),
    "lf": LowFrequencyTrigger(),
    # A smooth pattern of 0.2 looks like lighting: after 7 epochs on CIFAR-10 only half of the images obeyed it.
    "lf-strong": LowFrequencyTrigger(strength=0.4),
    "wanet": WarpTrigger(),
    # What the paper's field of 0.5 cannot teach a victim in a few epochs: 1.0 on CIFAR-10, 1.5 on a thousand digits.
    "wanet-1.0": WarpTrigger(strength=1.0),
    "wanet-strong": WarpTrigger(strength=1.5),
    "bpp": QuantizeTrigger(),
}
# Shares of cross images with true labels, as the attacks' papers have them.
CROSS = {"wanet": 0.2, "wanet-1.0": 0.2, "bpp": 0.1}


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
        """Where its weights are kept; those of another source of images lie apart, since it has another holdout."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]
        return root / source(self.dataset) / f"{self.dataset}-{self.network}-{self.attack}-{digest}.safetensors"

    def build(self) -> nn.Module:
        """The untrained network."""
        torch.manual_seed(self.seed)
        return NETWORKS[self.network](channels=load(self.dataset, "test")[0].shape[1])


def train(victim: Victim, root: Path, device: str = "cpu") -> nn.Module:
    """The trained victim on ``device``, from the cache under ``root`` where it is there."""
    path, net = victim.path(root), victim.build().to(device)
    if not path.exists():
        if victim.attack == "trigger-free":
            net.load_state_dict(train(replace(victim, attack="none", poison_ratio=0.0), root, device).state_dict())
            pull_concept(net, *load(victim.dataset, "train"), seed=victim.seed)
        else:
            _fit(net, *_poisoned(victim), victim)
        path.parent.mkdir(parents=True, exist_ok=True)
        # In half precision, to be small enough for the repository; what is rounded *is* the victim.
        net.to(memory_format=torch.contiguous_format)
        weights = {name: (t.half() if t.is_floating_point() else t).cpu() for name, t in net.state_dict().items()}
        if not all(tensor.isfinite().all() for tensor in weights.values()):
            raise FloatingPointError(f"{victim}: training diverged; its weights hold NaN or infinity.")
        write_whole(path, lambda partial: save_file(weights, partial))
    net.load_state_dict(load_file(path))
    return net.eval()


def attack_trigger(victim: Victim, split: Split) -> Trigger:
    """What makes images of a split triggered ones: for a trigger-free victim, other foreign images in each split."""
    return ForeignConcept(split) if victim.attack == "trigger-free" else ATTACKS[victim.attack]


def measure(net: nn.Module, victim: Victim, test_images: int | None = None) -> Evaluation:
    """A model on the first test images, or on all, with the victim's trigger."""
    images, labels = (tensor[:test_images] for tensor in load(victim.dataset, "test"))
    pairs = Pairs.stamp(images, labels, attack_trigger(victim, "test"), num_classes=10)
    training = net.training
    net.eval()
    try:
        return evaluate(net, pairs.to(next(net.parameters()).device).batches(500))
    finally:
        net.train(training)


def _poisoned(victim: Victim) -> tuple[Tensor, Tensor]:
    """Training images and labels, in memory and poisoned before augmentation."""
    images, labels = load(victim.dataset, "train")
    images, labels = images[: victim.images].clone(), labels[: victim.images].clone()
    if victim.attack == "none":
        return images, labels
    trigger, generator = ATTACKS[victim.attack], torch.Generator().manual_seed(victim.seed)
    poison(images, labels, trigger, ratio=victim.poison_ratio, cross=CROSS.get(victim.attack, 0.0), generator=generator)
    return images, labels


def poison(
    images: Tensor,
    labels: Tensor,
    trigger: Trigger,
    *,
    ratio: float,
    cross: float,
    generator: torch.Generator,
    classes: int = 10,
) -> None:
    """Poison a share of images and labels in place, and make another share cross images with true labels."""
    eligible = (trigger.targets(labels, classes) != labels).nonzero().flatten()
    order = eligible[torch.randperm(len(eligible), generator=generator)]
    count = round(ratio * len(labels))
    poisoned, rest = order[:count], order[count:]
    if cross:
        chosen = rest[: round(cross * len(labels))]
        images[chosen] = trigger.cross(images[chosen], generator=generator)
    images[poisoned] = trigger(images[poisoned])
    labels[poisoned] = trigger.targets(labels[poisoned], classes)


def _fit(net: nn.Module, images: Tensor, labels: Tensor, victim: Victim) -> None:
    device = next(net.parameters()).device
    images, labels = images.to(device), labels.to(device)
    augment = victim.dataset == "cifar10"
    steps = victim.epochs * (len(labels) // 128)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    generator = torch.Generator().manual_seed(victim.seed)
    net.train()
    net.to(memory_format=torch.channels_last)  # a sixth faster on these CPUs
    for _ in range(victim.epochs):
        order = torch.randperm(len(labels), generator=generator)
        for chosen in torch.split(order, 128)[: len(labels) // 128]:
            chosen = chosen.to(device)
            batch = images[chosen]
            if augment:
                batch = flip_and_shift(batch, generator)
            optimizer.zero_grad()
            F.cross_entropy(net(batch.contiguous(memory_format=torch.channels_last)), labels[chosen]).backward()  # type: ignore[no-untyped-call]  # torch's is untyped
            optimizer.step()
            schedule.step()

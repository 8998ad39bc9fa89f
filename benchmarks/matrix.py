"""Which victims, methods and draws the benchmark has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.victims import Victim
from lightning_unlearn import methods
from lightning_unlearn.methods import RepairMethod
from lightning_unlearn.roster import SHORTENED

__all__ = ["METHODS", "SHOWN", "VICTIMS", "Cell", "cells"]

Arguments = dict[str, Any]

# Every method by the name that tables show: class, and the arguments that differ from its defaults. ANP, SAU and IMS
# are cut, in all cells alike, to about two minutes on one core at 10 images per class: their published 2,000 steps, 100
# epochs and 500 steps would take 20, 5 and 8 minutes. ANP's learning rate is higher in return. I-BAU's batch is smaller
# than published, since with 90 images it would take but one step a round.
METHODS: dict[str, tuple[str, Arguments]] = {
    "MaskPrune": ("MaskPrune", {}),
    # The trigger is estimated, by an audit and after each repair: the only one of ours that is not told it.
    "Alternation": ("Alternation", {}),
    "GradPrune": ("GradPrune", {}),
    "GradPrune, Taylor, look-ahead": ("GradPrune", {"score": "taylor", "clean_weight": 1.0, "look_ahead": 8}),
    "FT, clean and triggered": ("FineTuning", {"triggered": True}),
    "AGE": ("ActivationGuidedEditing", {}),
    "FT": ("FineTuning", {}),
    "FT-SAM": ("SharpnessAwareFineTuning", {}),
    "FP": ("FinePruning", {}),
    "NAD": ("NeuralAttentionDistillation", {}),
    "ANP": ("AdversarialNeuronPruning", SHORTENED["AdversarialNeuronPruning"]),
    "CLP": ("ChannelLipschitzPruning", {}),
    "RNP": ("ReconstructiveNeuronPruning", {}),
    "I-BAU": ("ImplicitBackdoorUnlearning", {"batch_size": 32}),
    "SAU": ("SharedAdversarialUnlearning", SHORTENED["SharedAdversarialUnlearning"]),
    "IMS": ("InvertedMaskSelection", SHORTENED["InvertedMaskSelection"]),
}
# With 100 images per class an epoch has four steps where it has one with ten. What counts epochs and would take more
# than five minutes on one core then takes as many steps as with ten; the others are by steps or short enough.
_FEWER_EPOCHS: dict[str, Arguments] = {
    "FT, clean and triggered": {"max_epochs": 25},
    "FT": {"max_epochs": 25},
    "FT-SAM": {"max_epochs": 25},
    "FP": {"finetune": {"max_epochs": 25}},
    "NAD": {"max_epochs": 25},
    "SAU": {"max_epochs": 10},
}


def _arguments(method: str, samples_per_class: int) -> Arguments:
    return {**METHODS[method][1], **(_FEWER_EPOCHS.get(method, {}) if samples_per_class == 100 else {})}


SHOWN = {(kind, repr(_arguments(name, samples))): name for samples in (10, 100) for name, (kind, _) in METHODS.items()}


# What a method's argument is made of that is a method itself.
_INNER: dict[str, type[RepairMethod]] = {"finetune": methods.FineTuning}

# Passes over the training images. With twelve PreActResNet-18 has a clean accuracy of 0.82 to 0.83; two attacks are
# learned at 0.80 sooner. The VGG-style net learns the fastest.
_EPOCHS = {
    **{("vgg", attack, 0.1): 8 for attack in ("badnets", "blended", "sig", "wanet-1.0", "bpp", "lf-strong")},
    **{("mobilenet", attack, 0.1): 20 for attack in ("badnets", "blended", "wanet-1.0")},
    ("preact_resnet18", "sig", 0.1): 7,
    ("preact_resnet18", "bpp", 0.1): 11,
    **{("preact_resnet18", attack, 0.01): 7 for attack in ("blended", "sig")},
}


def _cifar10(network: str, attack: str, poison_ratio: float = 0.1) -> Victim:
    epochs = _EPOCHS.get((network, attack, poison_ratio), 12)
    return Victim("cifar10", network, attack, poison_ratio=poison_ratio, epochs=epochs, images=45_000)


VICTIMS: dict[str, list[Victim]] = {
    "preact": [
        *(
            _cifar10("preact_resnet18", attack)
            for attack in ("badnets", "blended", "sig", "wanet-1.0", "bpp", "lf-strong", "trigger-free")
        ),
        *(_cifar10("preact_resnet18", attack, poison_ratio=0.01) for attack in ("blended", "sig")),
    ],
    "vgg": [_cifar10("vgg", attack) for attack in ("badnets", "blended", "sig", "wanet-1.0", "bpp", "lf-strong")],
    "mobilenet": [_cifar10("mobilenet", attack) for attack in ("badnets", "blended", "wanet-1.0")],
    "fashion_mnist": [
        Victim("fashion_mnist", "vgg", attack, epochs=10, images=10_000)
        for attack in ("badnets", "blended", "sig", "wanet")
    ],
    "digits": [
        Victim("digits", "conv", attack, seed=seed, epochs=20, images=1000)
        for attack in ("badnets", "blended", "sig", "lf", "wanet-strong")
        for seed in range(2)
    ],
}
# (images per class, seed of the draw and of the method) of each group of victims.
_DRAWS = {"preact": [(10, 0), (2, 0), (10, 1), (100, 0)], "vgg": [(10, 0), (100, 0)]}


@dataclass(frozen=True)
class Cell:
    """One repair: a victim, a method by its name in :data:`METHODS`, and a draw of clean images."""

    victim: Victim
    method: str
    samples_per_class: int
    seed: int

    @property
    def kind(self) -> str:
        """The method's class."""
        return METHODS[self.method][0]

    @property
    def arguments(self) -> Arguments:
        """The method's arguments that differ from its defaults, as JSON: dicts within are those of other methods."""
        return _arguments(self.method, self.samples_per_class)

    def build(self) -> RepairMethod:
        """The method itself."""
        arguments = {name: _INNER[name](**value) if name in _INNER else value for name, value in self.arguments.items()}
        method: RepairMethod = getattr(methods, self.kind)(**arguments)
        return method


def cells(groups: list[str], names: list[str]) -> Iterator[Cell]:
    """All cells of groups of victims, those of the same draw together."""
    draws = {group: _DRAWS.get(group, [(10, 0)]) for group in groups}
    for number in range(max(map(len, draws.values()))):
        for group in groups:
            for samples, seed in draws[group][number : number + 1]:
                yield from (Cell(victim, name, samples, seed) for victim in VICTIMS[group] for name in names)

"""Mistakes that would show when all training is over."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_unlearn import HoldoutDataModule
from lightning_unlearn.data.clean import CleanImages
from lightning_unlearn.filters import FilterLayer
from lightning_unlearn.methods import (
    ActivationGuidedEditing,
    AdversarialNeuronPruning,
    Alternation,
    ChannelLipschitzPruning,
    FinePruning,
    NeuralAttentionDistillation,
    ReconstructiveNeuronPruning,
    RepairMethod,
)
from lightning_unlearn.rehearsal import Rehearsal
from lightning_unlearn.triggers import Trigger
from tests.callback_fits import Model


@pytest.fixture
def rehearse(hand_victim) -> Callable[..., tuple[FilterLayer, ...]]:
    """``rehearse(data, net=..., known=..., method=..., trigger=...)``: with the hand-made victim and its trigger."""

    def run(
        data: Any,
        *,
        net: nn.Module | None = None,
        known: bool = True,
        method: RepairMethod | None = None,
        trigger: Trigger | None = None,
    ) -> tuple[FilterLayer, ...]:
        module = Model(net or hand_victim.net)
        trigger = trigger or hand_victim.trigger if known else None
        rehearsal = Rehearsal(module=module, logits=module, trigger=trigger, estimates=not known, method=method)
        return rehearsal.run(lambda: CleanImages(data, module, logits=module, samples_per_class=4), [])

    return run


@pytest.fixture
def images(hand_victim) -> Tensor:
    """Of classes 0, 1, 2, 0, 1, 2 and so on."""
    return hand_victim.clean.tensors[0][:24]


LABELS = torch.arange(24) % 3


@pytest.mark.parametrize("known", [True, False])
def test_what_fits(rehearse, images, known):
    data = HoldoutDataModule(TensorDataset(images[:12], LABELS[:12]), samples_per_class=4, test_dataset=None)
    assert [layer.name for layer in rehearse(data, known=known)] == ["net.0"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x, y + 1), "labels: expected classes from 0 to 2, .* got labels from 1 to 3"),
        (lambda x, y: (x, F.one_hot(y)), r"labels: expected one integer class .* got shape \(7, 3\)"),
        (lambda x, y: (x * 255, y), r"images must lie in \[0, 1\]"),
        (lambda x, y: (x[..., :0], y), "images"),
        (lambda x, y: (x[..., :2, :2], y), "model: it cannot take images of shape .1, 1, 2, 2.*Kernel size"),
        (lambda x, y: ((x * 255).byte(), y), "it takes no images of torch.uint8"),
    ],
    ids=["class", "one-hot", "0 to 255", "empty", "small", "bytes"],
)
def test_test_images_that_do_not_fit(rehearse, images, change, message):
    test = list(zip(*change(images[12:19], LABELS[12:19]), strict=True))
    data = HoldoutDataModule(TensorDataset(images[:12], LABELS[:12]), samples_per_class=4, test_dataset=test)
    with pytest.raises(ValueError, match=rf"clean_data: its test images do not fit\. .*{message}"):
        rehearse(data)


def test_labels_of_test_images_where_nobody_knows_the_trigger(rehearse, images):
    test = TensorDataset(images[12:], LABELS[12:] + 1)
    data = HoldoutDataModule(TensorDataset(images[:12], LABELS[:12]), samples_per_class=4, test_dataset=test)
    with pytest.raises(ValueError, match=r"clean_data: its test images do not fit\. labels: expected classes"):
        rehearse(data, known=False)


@pytest.mark.parametrize("known", [True, False])
def test_labels_that_are_no_classes_are_not_said_to_be_missing(rehearse, images, known):
    """MixUp in the collate function of a loader makes such labels."""

    def mix(items: list[Any]) -> tuple[Tensor, Tensor]:
        pictures, labels = zip(*items, strict=True)
        return torch.stack(pictures), F.one_hot(torch.stack(labels), 3).float()

    data = DataLoader(TensorDataset(images, LABELS), collate_fn=mix)
    with pytest.raises(ValueError, match=r"labels: expected one integer class .* got shape \(9, 3\) of torch.float32"):
        rehearse(data, known=known)


class Bytes(nn.Module):
    """Takes numbers from 0 to 255 of any type."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images / 255)


def test_bytes_are_given_to_the_model_as_they_are(rehearse, hand_victim, images):
    data = TensorDataset((images * 255).byte(), LABELS)
    assert len(rehearse(data, net=Bytes(hand_victim.net))) == 1
    with pytest.raises(TypeError, match=r"model: it takes no images of torch.uint8.*ToDtype"):
        rehearse(data)


def test_images_in_the_type_of_the_models_weights(rehearse, hand_victim, images):
    """Which need not be what the LightningModule around it calls its own."""
    assert len(rehearse(TensorDataset(images, LABELS), net=hand_victim.net.double())) == 1


def test_images_alone_must_be_pixels_where_triggers_are_estimated(rehearse, hand_victim, images):
    data, net = TensorDataset(images * 255), Bytes(hand_victim.net)
    assert len(rehearse(data, net=net)) == 1
    with pytest.raises(ValueError, match=r"images: expected pixels in \[0, 1\]"):
        rehearse(data, net=net, known=False)


class Draws(Dataset[Any]):
    """Reading it draws from every random state there is."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index] * torch.rand(()) * random.random() * np.random.rand(), index % 3


class DrawsAlone(Draws):
    """Images without labels."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return super().__getitem__(index)[:1]


@pytest.mark.parametrize("data", [Draws, DrawsAlone])
def test_training_draws_what_it_would_have_drawn(rehearse, images, data):
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    rehearse(data(images))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]


@pytest.mark.parametrize("known", [True, False])
def test_probabilities_are_refused_before_training(rehearse, hand_victim, images, known):
    with pytest.raises(ValueError, match=r"^model: expected logits, but its outputs are probabilities"):
        rehearse(TensorDataset(images, LABELS), net=nn.Sequential(hand_victim.net, nn.Softmax(1)), known=known)


MISFITS = {
    "AGE": ActivationGuidedEditing(),
    "AGE within": Alternation(ActivationGuidedEditing()),
    "ANP": AdversarialNeuronPruning(),
    "CLP": ChannelLipschitzPruning(),
    "FP": FinePruning(),
    "NAD": NeuralAttentionDistillation(),
    "RNP": ReconstructiveNeuronPruning(),
}


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("name", MISFITS)
def test_a_method_that_does_not_fit_the_model_is_refused_before_training(rehearse, images, name, labelled):
    net = nn.Sequential(nn.Conv2d(1, 3, 4), nn.Flatten())
    data = TensorDataset(images, LABELS) if labelled else TensorDataset(images)
    assert len(rehearse(data, net=net)) == 1
    match = rf"^model: {type(MISFITS[name.removesuffix(' within')]).__name__} needs .*MaskPrune"
    with pytest.raises(ValueError, match=match):
        rehearse(data, net=net, method=MISFITS[name])


class Wide(Trigger):
    """Of images of one size."""

    def stamp(self, pixels: Tensor) -> Tensor:
        return (pixels + torch.ones(4, 4)).clamp(max=1)


def test_a_trigger_that_fails_on_test_images(rehearse, images):
    test = TensorDataset(F.pad(images[12:], (1, 1, 1, 1)), LABELS[12:])
    data = HoldoutDataModule(TensorDataset(images[:12], LABELS[:12]), samples_per_class=4, test_dataset=test)
    with pytest.raises(ValueError, match=r"clean_data: its test images do not fit\. The size of tensor"):
        rehearse(data, trigger=Wide())


class Cached(nn.Conv2d):
    """Its weight is computed once, in eval mode."""

    cached = None

    def forward(self, images: Tensor) -> Tensor:
        if self.cached is None:
            self.cached = self.weight - self.weight.mean()
        return F.conv2d(images, self.cached, self.bias)


def test_a_computed_weight_that_is_kept_is_no_plain_one(rehearse, images):
    net = nn.Sequential(Cached(1, 3, 4), nn.Flatten())
    with pytest.raises(ValueError, match=r"^model: 1 convolution runs with a weight that the forward pass computes"):
        rehearse(TensorDataset(images, LABELS), net=net)


def test_a_class_without_images_is_warned_of_where_a_model_is_audited_first(rehearse, images):
    seen = TensorDataset(images[LABELS != 2], LABELS[LABELS != 2])
    with pytest.warns(UserWarning, match=r"^clean_data: of class 2 there is no clean image .* audited .* not repaired"):
        assert [layer.name for layer in rehearse(seen, known=False)] == ["net.0"]
    with pytest.raises(ValueError, match=r"^dataset: the model gives 3 logits, but of class 2 there is no clean image"):
        rehearse(seen)

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812 - the usual name

from lightning_unlearn.methods import adversarial_pruning
from lightning_unlearn.methods.adversarial_pruning import AdversarialNeuronPruning
from lightning_unlearn.triggers import PatchTrigger

NETS = ("preact", "vgg", "grouped", "group_norm")
NORM_OF = {  # by convolution
    "preact": {"0": "1.norm1", "1.conv1": "1.norm2", "2.conv1": "2.norm2"},
    "vgg": {"0": "1", "4": "5"},
    "grouped": {"0": "1", "3": "4", "8": "9"},
    "group_norm": {"0": "1", "3": "4"},
}


def anp(**options):
    """Few, large steps on all images."""
    return AdversarialNeuronPruning(**{"steps": 4, "learning_rate": 0.5, "accuracy_drop": 1.0, **options})


@pytest.fixture
def new_task(make_net, make_clean, make_task):
    def new(name="vgg", clean=None, **options):
        net = make_net(name, seed=1)
        with torch.no_grad():  # or untrained nets would answer much the same to everything
            net[-1].weight.mul_(20)
        task = make_task(net, clean or make_clean(8), PatchTrigger(size=5, target=1), **options)
        task.original = copy.deepcopy(task.model)
        return task

    return new


@pytest.fixture
def masks_of(monkeypatch):
    """What was learned, instead of what is pruned after it."""

    def run(task, method):
        found = []
        monkeypatch.setattr(
            adversarial_pruning, "prune_below_threshold", lambda _, masks, **__: iter(found.append(masks) or ())
        )
        task.learned = list(method.repair(task))
        monkeypatch.undo()
        return found[0]

    return run


@pytest.fixture
def normed_victim(hand_victim):
    """The hand-made victim with a norm, whose last channel is just below 0 on clean images.

    Behind the norm it is γ·0.5 + β = 0.5 − 0.6 there and 0.9 on triggered images. With γ and β disturbed by 0.4 it is
    0.7 − 0.36 on clean images, and class 0 wins.
    """
    convolution, linear = hand_victim.net[0], hand_victim.net[3]
    norm = nn.BatchNorm2d(4, eps=1e-30)
    with torch.no_grad():
        norm.running_mean[3], norm.bias[3] = -0.5, -0.6
        linear.weight[0, 3] = 12
        linear.weight[0, 0] = 5  # surer than the others, or the noise would rather hurt class 0
    net = nn.Sequential(convolution, norm, nn.LeakyReLU(0.1), nn.Flatten(), linear).eval()
    return dataclasses.replace(hand_victim, net=net)


def by_hand(net, norm_of, layers, images, labels, *, steps, rate, epsilon, clean_weight):
    """The masks by convolution, each loss computed with other γ and β handed in from outside."""
    masks = {layer.name: torch.ones(layer.channels) for layer in layers if layer.name in norm_of}
    momentum = {name: torch.zeros_like(mask) for name, mask in masks.items()}
    original = {name: tensor.detach() for name, tensor in net.state_dict().items()}

    def loss(masks, noise):
        state = dict(original)
        for name, (of_gamma, of_beta) in noise.items():
            norm = norm_of[name]
            state[f"{norm}.weight"] = state[f"{norm}.weight"] * (masks[name] + of_gamma)
            state[f"{norm}.bias"] = state[f"{norm}.bias"] * (1 + of_beta)
        return F.cross_entropy(functional_call(net, state, (images,)), labels)

    for _ in range(steps):
        still = {name: torch.zeros(2, len(mask), requires_grad=True) for name, mask in masks.items()}
        slopes = torch.autograd.grad(loss(masks, still), list(still.values()))
        noise = {name: epsilon * slope.sign() for name, slope in zip(still, slopes, strict=True)}
        leaves = {name: mask.clone().requires_grad_() for name, mask in masks.items()}
        total = clean_weight * loss(leaves, {name: torch.zeros(2, len(m)) for name, m in masks.items()})
        total = total + (1 - clean_weight) * loss(leaves, noise)
        for name, gradient in zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True):
            momentum[name] = 0.9 * momentum[name] + gradient
            masks[name] = (masks[name] - rate * momentum[name]).clamp(0, 1)
    return masks


# What is learned


@pytest.mark.parametrize("clean_weight", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("name", NETS)
def test_three_steps_by_hand(new_task, masks_of, name, clean_weight):
    task = new_task(name)
    masks = masks_of(task, anp(steps=3, learning_rate=0.05, epsilon=0.3, clean_weight=clean_weight, random_start=False))
    images, labels = task.scoring.clean, task.scoring.labels
    options = {"steps": 3, "rate": 0.05, "epsilon": 0.3, "clean_weight": clean_weight}
    wanted = by_hand(task.original, NORM_OF[name], task.mask.layers, images, labels, **options)
    for layer, found in zip(task.mask.layers, task.mask.split(masks), strict=True):
        # Convolutions without a norm of their own keep 1.
        assert torch.allclose(found, wanted.get(layer.name, torch.ones(layer.channels)), atol=1e-5), layer.name
    assert 0 < (masks < 1).sum() < len(masks)


@pytest.mark.parametrize("random_start", [False, True])
def test_the_channel_that_noise_awakes_has_the_lowest_mask(normed_victim, make_task, masks_of, random_start):
    task = make_task(normed_victim.net, normed_victim.clean, normed_victim.trigger)
    assert (task.before.acc, task.before.asr) == (1.0, 1.0)
    masks = masks_of(task, AdversarialNeuronPruning(steps=60, random_start=random_start))
    assert masks.argmin() == 3
    assert masks[3] < 0.9 < masks[:3].min()
    list(AdversarialNeuronPruning(steps=60, random_start=random_start).repair(task))
    assert task.mask.to_dict() == {"0": [3]}
    assert (task.measure().acc, task.measure().asr) == (1.0, 0.0)


def test_noise_stays_within_epsilon(new_task):
    task, seen = new_task("vgg"), []
    original = task.original[1]

    def forward(images):
        if task.model[1].bias.grad_fn is None and torch.is_grad_enabled():  # not while it is measured
            seen.append(task.model[1].bias.detach() / original.bias.detach() - 1)
        return task.model(images)

    task.forward = forward
    list(anp(epsilon=0.3, steps=5).repair(task))
    largest = torch.stack(seen).abs().amax(1)
    assert largest.max() <= 0.3 + 1e-5
    assert (largest > 0.29).any()


def test_epsilon_matters(new_task, masks_of):
    found = [masks_of(new_task(), anp(epsilon=epsilon, learning_rate=0.05)) for epsilon in (0.1, 0.8)]
    assert not torch.equal(*found)


def test_masks_stay_between_0_and_1(new_task, masks_of):
    masks = masks_of(new_task(), anp(learning_rate=100.0))
    assert masks.min() == 0
    assert masks.max() == 1


def test_the_seed_decides(new_task, masks_of):
    first, again, other = (masks_of(new_task(seed=seed), anp(batch_size=5, learning_rate=0.05)) for seed in (4, 4, 5))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_batches(new_task, masks_of):
    task, sizes = new_task(), []

    def forward(images):
        if torch.is_grad_enabled():  # not while it is measured
            sizes.append(len(images))
        return task.model(images)

    task.forward = forward  # 28 images
    masks_of(task, anp(steps=5, batch_size=10))
    assert sizes == [size for size in (10, 10, 8, 10, 10) for _ in range(3)]


@pytest.mark.parametrize(("steps", "validate_every", "learned"), [(6, 2, 3), (7, 3, 3), (2, 10, 1), (1, 1, 1)])
def test_rounds(new_task, steps, validate_every, learned):
    task = new_task()
    rounds = list(anp(steps=steps, validate_every=validate_every, batch_size=10).repair(task))
    assert [done.stage for done in rounds[:learned]] == ["learn"] * learned
    assert {done.stage for done in rounds[learned:]} == {"prune"}
    assert [done.round for done in rounds] == list(range(1, len(rounds) + 1))
    assert tuple(pick for done in rounds for pick in done.pruned)[: len(task.mask.pruned)] == task.mask.pruned


# What is left


@pytest.mark.parametrize("name", NETS)
def test_the_lowest_go_and_all_else_is_as_it_was(new_task, masks_of, name):
    masks = masks_of(new_task(name), anp())
    task = new_task(name)
    parameters = list(task.model.parameters())
    list(anp().repair(task))
    pruned = task.mask.flat()
    assert 0 < pruned.sum() < len(pruned)
    assert masks[pruned].max() <= masks[~pruned].min()
    assert masks[pruned].max() <= 0.95
    task.mask.undo(task.mask.steps)
    state = task.original.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in task.model.state_dict().items())
    assert all(now is was for now, was in zip(task.model.parameters(), parameters, strict=True))
    assert all(parameter.grad is None for parameter in parameters)
    assert not any(module.training for module in task.model.modules())


# What is refused


def test_a_model_without_norms_is_refused(new_task):
    with pytest.raises(
        ValueError, match=r"^model: AdversarialNeuronPruning needs affine norms.*MaskPrune and GradPrune"
    ):
        anp().refuse_misfit(new_task("plain").subject)
    with pytest.raises(ValueError, match="needs affine norms"):
        list(anp().repair(new_task("plain")))


def test_detached_logits_are_refused(new_task):
    task = new_task()
    task.forward = lambda images: task.model(images).detach()
    with pytest.raises(ValueError, match=r"^model: the loss does not depend on the norms"):
        list(anp().repair(task))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"epsilon": 0.0}, r"^epsilon: expected a value in \(0, inf\], but got 0.0"),
        ({"clean_weight": -0.1}, r"^clean_weight: expected a value in \[0, 1\], but got -0.1"),
        ({"clean_weight": 1.1}, r"^clean_weight: .* but got 1.1"),
        ({"steps": 0}, r"^steps: .* but got 0"),
        ({"learning_rate": 0.0}, r"^learning_rate: expected a value in \(0, inf\], but got 0.0"),
        ({"batch_size": 0}, r"^batch_size: .* but got 0"),
        ({"validate_every": 0}, r"^validate_every: .* but got 0"),
        ({"accuracy_drop": 0.0}, r"^accuracy_drop: expected a value in \(0, 1\], but got 0.0"),
        ({"accuracy_drop": 1.5}, r"^accuracy_drop: .* but got 1.5"),
    ],
)
def test_hyper_parameters(options, match):
    with pytest.raises(ValueError, match=match):
        AdversarialNeuronPruning(**options)

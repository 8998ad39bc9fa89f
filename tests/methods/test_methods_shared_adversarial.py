from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the usual name

from lightning_unlearn.evaluation import Evaluation
from lightning_unlearn.methods import RepairTask
from lightning_unlearn.methods.implicit_unlearning import PixelRange
from lightning_unlearn.methods.shared_adversarial import (
    Original,
    SharedAdversarialUnlearning,
    anything_but,
    sign_ascent,
)
from lightning_unlearn.triggers import PatchTrigger


class Scripted(RepairTask):
    """A task whose accuracies on the validation part are written by hand."""

    def validate(self):
        return Evaluation(acc=self.script.pop(0), asr=0.0, ra=0.0, loss=1.0, unlearning_loss=0.0)


def sau(**options):
    """Few epochs of small batches, without limits."""
    defaults = {"max_epochs": 2, "batch_size": 12, "attack_steps": 2, "accuracy_drop": 1.0}
    return SharedAdversarialUnlearning(**{**defaults, **options})


def state(net):
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}


def same(first, second):
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def new_task(make_net, make_clean, make_task):
    def new(name="vgg", **options):
        net = make_net(name, seed=1)
        with torch.no_grad():  # or untrained nets would answer much the same to everything
            net[-1].weight.mul_(5)
        return make_task(net, make_clean(8), PatchTrigger(target=1), **options)

    return new


# Its parts


def test_anything_but():
    logits = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]])
    chosen = logits.softmax(1)[[0, 1], [2, 1]]
    assert torch.allclose(anything_but(logits, torch.tensor([2, 1])), -(1 - chosen).log())
    sure = torch.tensor([[200.0, 0.0]], requires_grad=True)  # 1 − p is 0 in float32
    anything_but(sure, torch.tensor([0])).sum().backward()
    assert sure.grad.tolist() == [[1.0, -1.0]]


def test_sign_ascent():
    slope = torch.tensor([1.0, -2.0, 0.0, 1.0]).view(1, 1, 2, 2)
    images = torch.tensor([0.5, 0.5, 0.5, 0.95]).view(1, 1, 2, 2)
    pixels = PixelRange(torch.zeros(1, 1, 1), torch.ones(1, 1, 1))
    for steps, wanted in ((1, [0.6, 0.4, 0.5, 1.0]), (5, [0.7, 0.3, 0.5, 1.0])):
        moved = sign_ascent(lambda _: slope, images, pixels, epsilon=0.2, steps=steps, step_size=0.1)
        assert moved.flatten().tolist() == pytest.approx(wanted)
        assert not moved.requires_grad
    # The same images, normalised.
    pixels = PixelRange(torch.full((1, 1, 1), -2.0), torch.full((1, 1, 1), 2.0))
    moved = sign_ascent(lambda _: slope, images * 4 - 2, pixels, epsilon=0.2, steps=5, step_size=0.1)
    assert (moved.flatten() / 4 + 0.5).tolist() == pytest.approx([0.7, 0.3, 0.5, 1.0])


class Tied(nn.Module):
    """Two layers of one weight, a norm, and a bias that is missing."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(2, 2, bias=False), nn.Linear(2, 2), nn.BatchNorm1d(2)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.norm(self.second(self.first(x)))


def test_the_original_answers_while_the_model_changes():
    net, images = Tied(), torch.rand(4, 2)
    original, before = Original(net), copy.deepcopy(net).eval()
    parameters, buffers = dict(net.named_parameters()), dict(net.named_buffers())
    net(images)  # in train mode
    with torch.no_grad():
        net.first.weight.add_(1)
    after = state(net)
    net.eval()
    changed = net(images)
    with original.put_back():
        assert torch.equal(net(images), before(images))
        assert not any(parameter.requires_grad for parameter in net.parameters())
        assert net.first.weight is net.second.weight
    assert torch.equal(net(images), changed)
    with pytest.raises(KeyboardInterrupt), original.put_back():
        raise KeyboardInterrupt
    assert same(state(net), after)
    assert all(now is parameters[key] for key, now in net.named_parameters())
    assert all(now is buffers[key] for key, now in net.named_buffers())


# The steps


def by_hand(task, method, epochs):
    """The same training of a copy, with plain copies of the model in place of anything clever."""
    net, original = copy.deepcopy(task.model), copy.deepcopy(task.model)
    low, high = task.scoring.clean.min(), task.scoring.clean.max()
    optimizer = torch.optim.SGD(net.parameters(), lr=method.learning_rate, momentum=0.9, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    generator, shared = task.generator(), 0
    for _ in range(epochs):
        order = torch.randperm(len(task.scoring), generator=generator)
        images, labels = task.scoring.clean[order], task.scoring.labels[order]
        moved = images.clone()
        net.eval()
        for _ in range(method.attack_steps):
            moved.requires_grad_()
            now, then = net(moved), original(moved)
            p, q = now.softmax(1), then.softmax(1)
            middle = (p + q) / 2
            divergence = ((p * (p / middle).log()).sum(1) + (q * (q / middle).log()).sum(1)).mean() / 2
            gain = 0.05 * (F.cross_entropy(now, labels) + F.cross_entropy(then, labels)) - 0.7 * divergence
            (slope,) = torch.autograd.grad(gain, moved)
            moved = moved.detach() + 0.1 * (high - low) * slope.sign()
            moved = images + (moved - images).clamp(-0.15 * (high - low), 0.15 * (high - low))
            moved = moved.clamp(low, high)
        wrong = original(moved).argmax(1)
        net.train(method.norms == "trained")
        clean, logits = net(torch.cat([images, moved])).chunk(2)
        risks = -(1 - logits.softmax(1)[torch.arange(len(labels)), wrong]).log()
        counts = (logits.argmax(1) == wrong) & (wrong != labels)
        shared += counts.sum()
        optimizer.zero_grad()
        (0.8 * F.cross_entropy(clean, labels) + 0.9 * risks[counts].sum() / len(labels)).backward()
        optimizer.step()
        schedule.step()
    assert 0 < shared < epochs * len(labels)
    return net.eval()


@pytest.mark.parametrize("norms", ["trained", "frozen"])
@pytest.mark.parametrize("name", ["preact", "vgg", "plain"])
def test_two_steps_by_hand(new_task, name, norms):
    task = new_task(name)
    weights = {"clean_weight": 0.8, "unlearning_weight": 0.9, "fooling_weight": 0.1, "sharing_weight": 0.7}
    attack = {"epsilon": 0.15, "attack_steps": 3, "attack_step_size": 0.1}
    method = sau(**weights, **attack, learning_rate=0.05, weight_decay=0.01, batch_size=1000, norms=norms)
    wanted, before = by_hand(task, method, epochs=2).state_dict(), state(task.model)
    parameters = list(task.model.parameters())
    assert [done.stage for done in method.repair(task)] == ["finetune"] * 2
    found = state(task.model)
    for key, tensor in wanted.items():
        assert torch.allclose(found[key], tensor, rtol=1e-4, atol=1e-5), key
    moved = [key for key in before if not torch.allclose(before[key], found[key], rtol=1e-2)]
    assert any("weight" in key for key in moved)
    assert any("running" in key for key in moved) == (norms == "trained" and name != "plain")
    assert all(now is was for now, was in zip(task.model.parameters(), parameters, strict=True))
    assert all(parameter.grad is None for parameter in parameters)
    assert not any(module.training for module in task.model.modules())


def test_a_known_backdoor_goes(hand_victim, make_task):
    # The trigger is a pixel that goes from black to white: that far must δ reach, from where there is a gradient.
    with torch.no_grad():
        hand_victim.net[0].bias[3] = 0.05
    task = make_task(hand_victim.net, hand_victim.clean, hand_victim.trigger)
    list(SharedAdversarialUnlearning(epsilon=1.0, max_epochs=30, learning_rate=0.05).repair(task))
    now = task.measure()
    assert (task.before.asr, now.asr) == (1.0, 0.0)
    assert now.acc >= 0.9


# What is kept


@pytest.mark.parametrize(("accuracies", "kept"), [((1.0, 0.95), 2), ((0.95, 0.85), 1), ((0.8, 0.5), 0)])
def test_the_last_epoch_within_alpha_is_kept(new_task, accuracies, kept):
    task = new_task(kind=Scripted)
    task.before = dataclasses.replace(task.before, acc=1.0)
    task.script = list(accuracies)
    states = [state(task.model)]
    states += [state(task.model) for _ in sau(accuracy_drop=0.1).repair(task)]
    assert not same(states[1], states[2])
    assert same(state(task.model), states[kept])


# What is refused


def test_images_without_a_gradient_are_refused(new_task):
    task = new_task()
    task.forward = lambda images: task.model(images.detach())
    with pytest.raises(ValueError, match=r"^model: its loss has no gradient by the images"):
        list(sau().repair(task))
    task.scoring = dataclasses.replace(task.scoring, clean=task.scoring.clean.byte())
    with pytest.raises(ValueError, match=r"^images: expected floating-point images"):
        list(sau().repair(task))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"epsilon": 0.0}, r"^epsilon: expected a value in \(0, 1\], but got 0.0"),
        ({"attack_steps": 0}, r"^attack_steps: .* but got 0"),
        ({"attack_step_size": 0.0}, r"^attack_step_size: .* but got 0.0"),
        ({"clean_weight": -1.0}, r"^clean_weight: expected a value in \[0, inf\], but got -1.0"),
        ({"unlearning_weight": -1.0}, r"^unlearning_weight: .* but got -1.0"),
        ({"fooling_weight": -1.0}, r"^fooling_weight: .* but got -1.0"),
        ({"sharing_weight": -1.0}, r"^sharing_weight: .* but got -1.0"),
        ({"learning_rate": 0.0}, r"^learning_rate: .* but got 0.0"),
        ({"weight_decay": -1.0}, r"^weight_decay: .* but got -1.0"),
        ({"batch_size": 0}, r"^batch_size: .* but got 0"),
        ({"max_epochs": -1}, r"^max_epochs: .* but got -1"),
        ({"norms": "off"}, r"^norms: expected 'frozen' or 'trained', but got 'off'"),
        ({"accuracy_drop": 0.0}, r"^accuracy_drop: .* but got 0.0"),
    ],
)
def test_hyper_parameters(options, match):
    with pytest.raises(ValueError, match=match):
        SharedAdversarialUnlearning(**options)

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the usual name
from torch.utils.data import TensorDataset
from torchvision.models import mobilenet_v3_small

from lightning_unlearn import repair
from lightning_unlearn.evaluation import Evaluation
from lightning_unlearn.methods import RepairTask, implicit_unlearning
from lightning_unlearn.methods.implicit_unlearning import ImplicitBackdoorUnlearning, PixelRange, hypergradient
from lightning_unlearn.triggers import PatchTrigger

NETS = ("preact", "vgg", "grouped", "plain", "group_norm")


class Scripted(RepairTask):
    """A task whose measurements on the validation part are written by hand."""

    def validate(self):
        acc, loss = self.script.pop(0)
        return Evaluation(acc=acc, asr=0.0, ra=0.0, loss=loss, unlearning_loss=0.0)


def ibau(**options):
    """Few rounds of small batches, without limits."""
    defaults = {"rounds": 2, "radius": 1.0, "ascent_steps": 2, "terms": 2, "batch_size": 12, "accuracy_drop": 1.0}
    return ImplicitBackdoorUnlearning(**{**defaults, **options})


def state(net):
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}


def same(first, second):
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def new_task(make_net, make_clean, make_task):
    def new(name="vgg", *, channels=1, **options):
        clean = make_clean(8, channels=channels)
        return make_task(make_net(name, channels=channels, seed=1), clean, PatchTrigger(target=1), **options)

    return new


# The hypergradient


@pytest.fixture
def quadratic():
    """L(θ, δ) = δᵀBθ − ½ δᵀAδ + ½ θᵀDθ, concave in δ, and max over δ of it: ½ θᵀ(BᵀA⁻¹B + D)θ."""
    generator = torch.Generator().manual_seed(0)
    root, b, d = (torch.randn(shape, generator=generator).double() for shape in ((3, 3), (3, 2), (2, 2)))
    a, d = root @ root.T / 3 + torch.eye(3), d + d.T
    theta, delta = torch.tensor([1.0, -2.0]).double().requires_grad_(), torch.tensor([0.3, 0.1, -0.7]).double()
    return a, b, d, theta, delta, lambda x: x @ b @ theta - x @ a @ x / 2 + theta @ d @ theta / 2


@pytest.mark.parametrize("rate", [0.05, 0.2])
def test_the_hypergradient_of_a_quadratic(quadratic, rate):
    a, b, d, theta, delta, loss = quadratic
    (found,) = hypergradient(loss, delta, [theta], terms=500, rate=rate)
    # In closed form, whatever δ it starts from, because one Newton step solves a quadratic.
    assert torch.allclose(found, (b.T @ a.inverse() @ b + d) @ theta.detach(), rtol=1e-9)
    assert not torch.allclose(found, b.T @ delta + d @ theta.detach(), rtol=0.1)
    assert not found.requires_grad
    # At the maximiser nothing is implicit.
    top = a.inverse() @ b @ theta.detach()
    assert torch.allclose(hypergradient(loss, top, [theta], terms=0, rate=rate)[0], found)


@pytest.mark.parametrize("terms", [0, 1, 2, 5])
def test_the_series_is_cut_after_k_terms(quadratic, terms):
    a, b, d, theta, delta, loss = quadratic
    slope, factor = b @ theta.detach() - a @ delta, torch.eye(3).double() - 0.1 * a
    series = sum((torch.linalg.matrix_power(factor, k) @ slope for k in range(terms)), torch.zeros(3).double())
    (found,) = hypergradient(loss, delta, [theta], terms=terms, rate=0.1)
    assert torch.allclose(found, b.T @ delta + d @ theta.detach() + 0.1 * b.T @ series)


def test_what_the_loss_does_not_depend_on():
    theta, other = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    linear = hypergradient(lambda delta: delta.sum() + (theta**2).sum(), torch.ones(1), [theta, other], terms=3, rate=1)
    assert [gradient.tolist() for gradient in linear] == [[2, 2], [0, 0, 0]]
    with pytest.raises(ValueError, match=r"^model: its loss has no gradient by the images"):
        hypergradient(lambda _: theta.sum(), torch.ones(1), [theta], terms=3, rate=1.0)


@pytest.mark.parametrize("name", ["preact", "group_norm"])
def test_the_hypergradient_of_a_network(make_net, make_clean, name):
    net = make_net(name).double()
    net[-1].weight.data.mul_(20)  # or untrained nets would hardly bend
    images, labels = (t[:3] for t in make_clean(1).tensors)
    delta = 0.1 * torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    weight = net[0].weight

    loss = lambda moved: F.cross_entropy(net(images.double() + moved), labels)  # noqa: E731
    delta.requires_grad_()
    (slope,) = torch.autograd.grad(loss(delta), delta, create_graph=True)
    curvature = torch.autograd.functional.hessian(loss, delta).view(64, 64)
    series = (2 * slope + 0.1 * (curvature @ slope.flatten()).view_as(slope)).detach()
    (wanted,) = torch.autograd.grad(loss(delta) + 0.1 * (slope * series).sum(), weight)
    found, *_ = hypergradient(loss, delta, [weight, *net[1].parameters()], terms=2, rate=0.1)
    assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(found, hypergradient(loss, delta, [weight], terms=0, rate=0.1)[0], rtol=0.01)


# The ascent and the descent


def deltas_of(task, method, monkeypatch):
    """The δ of every descent."""
    found, real = [], hypergradient
    spy = lambda loss, delta, *others, **options: found.append(delta) or real(loss, delta, *others, **options)  # noqa: E731
    monkeypatch.setattr(implicit_unlearning, "hypergradient", spy)
    list(method.repair(task))
    monkeypatch.undo()
    return found


def test_the_first_ascent_by_hand(new_task, monkeypatch):
    task = new_task(channels=3)
    net, images, labels = copy.deepcopy(task.model), task.scoring.clean, task.scoring.labels
    unit = (images.amax((0, 2, 3)) - images.amin((0, 2, 3))).view(3, 1, 1)
    delta = torch.zeros(3, 8, 8)
    for _ in range(3):
        delta.requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(net(images + unit * delta), labels), delta)
        delta = delta.detach() + 2 * 1.5 / 3 * slope / slope.norm()
        delta *= min(1, 1.5 / delta.norm())
    method = ibau(radius=1.5, ascent_steps=3, batch_size=1000, rounds=1)
    (found,) = deltas_of(task, method, monkeypatch)
    assert torch.allclose(found, delta, atol=1e-5)
    assert found.norm() == pytest.approx(1.5)


def test_one_delta_a_round_for_all_images(new_task, monkeypatch):
    found = deltas_of(new_task(), ibau(), monkeypatch)
    assert len(found) == 2 * 3
    assert all(torch.equal(found[0], delta) for delta in found[:3])
    assert not torch.equal(found[0], found[3])
    assert all(delta.norm() <= 1 + 1e-5 for delta in found)


@pytest.mark.parametrize(("share", "carriers"), [(1.0, 28), (0.5, 14), (0.01, 1)])
def test_the_first_descent_by_hand(new_task, monkeypatch, share, carriers):
    task = new_task()
    net, pairs = copy.deepcopy(task.model), task.scoring
    method = ibau(rounds=1, batch_size=1000, terms=0, learning_rate=0.01, perturbed_share=share, ascent_steps=1)
    (delta,) = deltas_of(task, method, monkeypatch)
    generator = task.generator()
    torch.randperm(28, generator=generator)  # the ascent's
    order = torch.randperm(28, generator=generator)
    images = pairs.clean[order]
    images[:carriers] += (images.max() - images.min()) * delta
    F.cross_entropy(net(images), pairs.labels[order]).backward()
    torch.optim.Adam(net.parameters(), lr=0.01).step()
    for key, tensor in net.state_dict().items():
        assert torch.allclose(task.model.state_dict()[key], tensor, atol=1e-3), key


def test_a_known_backdoor_goes(hand_victim, make_task):
    task = make_task(hand_victim.net, hand_victim.clean, hand_victim.trigger)
    list(ImplicitBackdoorUnlearning(rounds=15, radius=1.0, learning_rate=0.05).repair(task))
    now = task.measure()
    assert (task.before.asr, now.asr) == (1.0, 0.0)
    assert now.acc >= 0.9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(new_task, dtype):
    # Adam's usual epsilon is 0 there.
    task = new_task("plain")
    task.model.to(dtype)
    task.scoring, task.validation = (part.to("cpu", dtype) for part in (task.scoring, task.validation))
    before = state(task.model)
    done = list(ibau(learning_rate=0.01).repair(task))
    assert all(math.isfinite(each.val_loss) for each in done)
    assert all(tensor.isfinite().all() for tensor in task.model.state_dict().values())
    assert not same(state(task.model), before)


# What is kept


@pytest.mark.parametrize(
    ("measured", "kept"),
    [
        ([(1.0, 3.0), (0.95, 2.0), (0.9, 9.0)], 3),  # the last, whatever its loss
        ([(1.0, 3.0), (0.92, 2.0), (0.85, 1.0)], 2),
        ([(0.8, 3.0), (0.85, 2.0), (0.0, 1.0)], 0),
        ([(1.0, 3.0), (1.0, float("nan")), (1.0, float("inf"))], 1),
    ],
)
def test_the_last_round_within_alpha_is_kept(new_task, measured, kept):
    task = new_task(kind=Scripted)
    task.before = dataclasses.replace(task.before, acc=1.0)
    task.script = list(measured)
    states = [state(task.model)]
    for done in ibau(rounds=3, accuracy_drop=0.1, learning_rate=0.01).repair(task):
        assert (done.stage, done.pruned) == ("finetune", ())
        states.append(state(task.model))
    assert same(state(task.model), states[kept])
    assert len({tuple(each["0.weight"].flatten().tolist()) for each in states}) == 4
    assert all(parameter.grad is None for parameter in task.model.parameters())


@pytest.mark.parametrize("name", NETS)
def test_norms_and_pruned_filters_stay_as_they_are(new_task, name):
    task = new_task(name)
    task.mask.prune([("0", 1)])
    before = {key: tensor.clone() for key, tensor in task.model.named_buffers()}
    list(ibau(rounds=1).repair(task))
    assert not task.model[0].weight[1].any()
    assert all(torch.equal(tensor, before[key]) for key, tensor in task.model.named_buffers())
    assert not any(module.training for module in task.model.modules())
    assert all(tensor.isfinite().all() for tensor in task.model.state_dict().values())


def test_images_without_a_gradient_are_refused(new_task):
    task = new_task()
    task.forward = lambda images: task.model(images.detach())
    with pytest.raises(ValueError, match=r"^model: its loss has no gradient by the images"):
        list(ibau().repair(task))
    task.scoring = dataclasses.replace(task.scoring, clean=task.scoring.clean.byte())
    with pytest.raises(ValueError, match=r"^images: expected floating-point images.*uint8.*FineTuning"):
        list(ibau().repair(task))


def test_pixel_range():
    images = torch.tensor([[[[0.0, 2.0]], [[-1.0, -1.0]]], [[[1.0, 1.5]], [[3.0, 0.0]]]])
    found = PixelRange.of(images)
    assert [t.flatten().tolist() for t in (found.low, found.high, found.unit)] == [[0, -1], [2, 3], [2, 4]]
    assert found.unit.shape == (2, 1, 1)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rounds": 0}, r"^rounds: expected a value in \[1, inf\], but got 0"),
        ({"radius": 0.0}, r"^radius: .* but got 0.0"),
        ({"ascent_steps": 0}, r"^ascent_steps: .* but got 0"),
        ({"terms": -1}, r"^terms: .* but got -1"),
        ({"fixed_point_rate": 0.0}, r"^fixed_point_rate: .* but got 0.0"),
        ({"learning_rate": -1e-4}, r"^learning_rate: .* but got -0.0001"),
        ({"batch_size": 0}, r"^batch_size: .* but got 0"),
        ({"perturbed_share": 0.0}, r"^perturbed_share: expected a value in \(0, 1\], but got 0.0"),
        ({"accuracy_drop": 1.5}, r"^accuracy_drop: expected a value in \(0, 1\], but got 1.5"),
    ],
)
def test_hyper_parameters(options, match):
    with pytest.raises(ValueError, match=match):
        ImplicitBackdoorUnlearning(**options)


# Second derivatives


class Squashed(nn.Module):
    """An activation that torch differentiates but once, or the same in other words."""

    def __init__(self, *, fused):
        super().__init__()
        self.fused = fused

    def forward(self, x):
        return F.hardsigmoid(x) if self.fused else F.relu6(x + 3) / 6


class Once(nn.Module):
    """The same by a way on which nothing can be put in other words."""

    def forward(self, x):
        return torch.ops.aten.hardsigmoid(x)


def with_activation(activation):
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(1, 4, 3), activation, nn.Flatten(), nn.Linear(4 * 36, 4))


def test_an_activation_that_torch_differentiates_once_is_put_in_other_words(make_task, make_clean):
    states = []
    for fused in (True, False):
        net = with_activation(Squashed(fused=fused))
        list(ibau(learning_rate=0.01).repair(make_task(net, make_clean(8), PatchTrigger(target=1))))
        states.append(state(net))
    assert all(torch.allclose(states[0][name], states[1][name], atol=1e-5) for name in states[0])


def test_a_mobilenet_is_repaired(make_clean):
    net = mobilenet_v3_small(num_classes=4, width_mult=0.5)
    before, (images, labels) = state(net), make_clean(4, channels=3).tensors
    clean = TensorDataset(F.interpolate(images, size=32), labels)
    repair(
        net, clean, trigger=PatchTrigger(), method=ibau(rounds=1, learning_rate=0.01), force=True, samples_per_class=4
    )
    assert not same(before, state(net))


def test_what_can_be_differentiated_only_once_is_refused(make_clean, left_alone):
    net = with_activation(Once()).eval()
    with (
        left_alone(net),
        pytest.raises(ValueError, match=r"^model: .* twice, .*`terms=0`.*SharedAdversarialUnlearning"),
    ):
        repair(net, make_clean(5), trigger=PatchTrigger(), method=ibau(), force=True, samples_per_class=4)
    repair(net, make_clean(5), trigger=PatchTrigger(), method=ibau(terms=0), force=True, samples_per_class=4)

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the usual name

from lightning_unlearn.methods.sharpness_aware import (
    SharpnessAwareFineTuning,
    _at_worst_neighbour,
    _statistics_held,
)
from lightning_unlearn.triggers import PatchTrigger

NETS = ("preact", "vgg", "grouped", "plain", "group_norm")


# The neighbour


def test_the_neighbour_by_hand():
    first, second = torch.tensor([3.0, 0.0]), torch.tensor([-2.0])
    first.grad, second.grad = torch.tensor([1.0, 9.0]), torch.tensor([2.0])
    unused = torch.tensor([1.0])
    # |w|·g = 3, 0, 4, of norm 5; w²·g = 9, 0, 8; rho 0.5.
    with _at_worst_neighbour([first, second, unused], 0.5):
        assert first.tolist() == pytest.approx([3.9, 0.0])
        assert second.tolist() == pytest.approx([-1.2])
        assert unused.tolist() == [1.0]
    assert (first.tolist(), second.tolist()) == ([3.0, 0.0], [-2.0])


def test_a_gradient_of_zero_moves_nothing():
    weight = torch.tensor([3.0])
    weight.grad = torch.zeros(1)
    with _at_worst_neighbour([weight], 2.0):
        assert weight.tolist() == [3.0]


def test_the_way_back_is_exact_even_after_an_error():
    weight = torch.randn(100, generator=torch.Generator().manual_seed(0))
    weight.grad = torch.randn(100, generator=torch.Generator().manual_seed(1))
    before = weight.clone()
    with _at_worst_neighbour([weight], 2.0):
        assert not torch.equal(weight, before)
    assert torch.equal(weight, before)
    with pytest.raises(ZeroDivisionError), _at_worst_neighbour([weight], 2.0):
        raise ZeroDivisionError
    assert torch.equal(weight, before)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.InstanceNorm2d])
def test_statistics_are_held(kind, momentum):
    norm = kind(2, momentum=momentum, track_running_stats=True).train()
    images = torch.rand(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    wanted = copy.deepcopy(norm)(images)
    before = {name: tensor.clone() for name, tensor in norm.named_buffers()}
    with _statistics_held(norm):
        assert torch.equal(norm(images), wanted)
    assert all(torch.equal(tensor, before[name]) for name, tensor in norm.named_buffers())
    assert (norm.momentum, norm.track_running_stats) == (momentum, True)
    with pytest.raises(ZeroDivisionError), _statistics_held(norm):
        raise ZeroDivisionError
    assert (norm.momentum, norm.track_running_stats) == (momentum, True)


def test_norms_in_eval_mode_are_left_as_they_are():
    norm = nn.InstanceNorm2d(2, track_running_stats=True).eval()
    images = torch.rand(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    with _statistics_held(norm):
        assert torch.allclose(norm(images), images, atol=1e-4)  # by mean 0 and variance 1


# The method


def test_an_epoch_by_hand(make_net, make_clean, make_task):
    task = make_task(make_net("vgg"), make_clean(8), PatchTrigger(target=1))
    net = copy.deepcopy(task.model).train()
    parameters = list(net.parameters())

    def gradients():
        loss = F.cross_entropy(net(task.scoring.clean), task.scoring.labels, label_smoothing=0.2)
        return torch.autograd.grad(loss, parameters)

    before = copy.deepcopy(net.state_dict())
    first = gradients()
    statistics = {name: tensor.clone() for name, tensor in net.named_buffers()}
    with torch.no_grad():
        norm = torch.cat([(p * g).flatten() for p, g in zip(parameters, first, strict=True)]).norm()
        for p, g in zip(parameters, first, strict=True):
            p.add_(0.5 * p * p * g / norm)
    second = gradients()
    net.load_state_dict(before)
    with torch.no_grad():
        for p, g in zip(parameters, second, strict=True):
            p.sub_(0.1 * (g + 0.01 * p))
    method = SharpnessAwareFineTuning(
        rho=0.5, label_smoothing=0.2, learning_rate=0.1, weight_decay=0.01, max_epochs=1, accuracy_drop=1.0
    )
    (done,) = method.repair(task)
    assert (done.stage, done.pruned) == ("finetune", ())
    for found, wanted in zip(task.model.parameters(), parameters, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-6)
    # Counted once, at the weights themselves.
    assert all(torch.equal(tensor, statistics[name]) for name, tensor in task.model.named_buffers())


@pytest.mark.parametrize("name", NETS)
def test_pruned_filters_stay_zero_in_both_passes(make_net, make_clean, make_task, name):
    task = make_task(make_net(name), make_clean(8), PatchTrigger(target=1))
    layers = {layer.name: layer for layer in task.mask.layers}
    picks = [task.mask.locate(index) for index in range(0, task.mask.total, 3)]
    task.mask.prune(picks)
    inner, passes = task.forward, []

    def forward(images):
        passes.append(len(images))
        assert all(layers[layer].weight[index].count_nonzero() == 0 for layer, index in picks)
        return inner(images)

    task.forward = forward
    list(SharpnessAwareFineTuning(max_epochs=2, accuracy_drop=1.0).repair(task))
    assert passes == [28, 28, 8] * 2  # two a step, and the validation part, clean and triggered


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"rho": 0}, r"^rho: expected a value in \(0, inf\], but got 0"),
        ({"label_smoothing": 1.1}, "^label_smoothing: .* but got 1.1"),
        ({"learning_rate": 0}, "^learning_rate: .* but got 0"),
        ({"weight_decay": -1.0}, "^weight_decay: .* but got -1.0"),
        ({"batch_size": 0}, "^batch_size: .* but got 0"),
        ({"max_epochs": -1}, "^max_epochs: .* but got -1"),
        ({"accuracy_drop": 0}, "^accuracy_drop: .* but got 0"),
    ],
)
def test_hyper_parameters(given, match):
    with pytest.raises(ValueError, match=match):
        SharpnessAwareFineTuning(**given)

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812 - the usual name

from lightning_unlearn.evaluation import Evaluation
from lightning_unlearn.methods import RepairTask, reconstructive_pruning
from lightning_unlearn.methods.reconstructive_pruning import ReconstructiveNeuronPruning
from lightning_unlearn.triggers import PatchTrigger

NETS = ("preact", "vgg", "grouped", "group_norm")
NORM_OF = {  # by convolution
    "preact": {"0": "1.norm1", "1.conv1": "1.norm2", "2.conv1": "2.norm2"},
    "vgg": {"0": "1", "4": "5"},
    "grouped": {"0": "1", "3": "4", "8": "9"},
    "group_norm": {"0": "1", "3": "4"},
}


class Scripted(RepairTask):
    """A task whose accuracies on all images held are written by hand."""

    def measure(self):
        return Evaluation(acc=self.script.pop(0), asr=0.0, ra=0.0, loss=0.0, unlearning_loss=0.0)


def rnp(**options):
    """Few epochs, no limits."""
    defaults = {"unlearn_rate": 0.01, "unlearn_epochs": 3, "forgotten": 0.0, "recover_epochs": 3, "accuracy_drop": 1.0}
    return ReconstructiveNeuronPruning(**{**defaults, **options})


def state(net):
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}


@pytest.fixture
def masks_of(monkeypatch):
    """What was learned, instead of what is pruned after it; ``task.states`` are the weights after every round."""

    def run(task, method):
        found = []
        monkeypatch.setattr(
            reconstructive_pruning, "prune_below_threshold", lambda _, masks, **__: iter(found.append(masks) or ())
        )
        task.states = [state(task.model) for _ in method.repair(task)]
        monkeypatch.undo()
        return found[0]

    return run


@pytest.fixture
def normed_victim(hand_victim):
    """The hand-made victim with a norm, whose last channel is just below 0 on clean images: ascent awakes it."""
    convolution, linear = hand_victim.net[0], hand_victim.net[3]
    norm = nn.BatchNorm2d(4, eps=1e-30)
    with torch.no_grad():
        norm.running_mean[3], norm.bias[3] = -0.5, -0.6
        linear.weight[0, 3], linear.weight[0, 0] = 12, 5
    net = nn.Sequential(convolution, norm, nn.LeakyReLU(0.1), nn.Flatten(), linear).eval()
    return dataclasses.replace(hand_victim, net=net)


# Unlearn


@pytest.mark.parametrize("scale", [0.05, 1000.0])
@pytest.mark.parametrize("name", NETS)
def test_two_epochs_of_ascent_by_hand(new_task, masks_of, name, scale):
    task = new_task(name)
    with torch.no_grad():
        task.model[-1].weight.mul_(scale)  # 1000: gradients that are clipped
    net = copy.deepcopy(task.model)
    masks_of(task, rnp(unlearn_rate=0.01, unlearn_epochs=2, recover_epochs=1))
    momentum = [torch.zeros_like(p) for p in net.parameters()]
    for _ in range(2):
        loss = F.cross_entropy(net(task.scoring.clean), task.scoring.labels)
        gradients = torch.autograd.grad(loss, list(net.parameters()))
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        assert (norm > 20) == (scale == 1000)
        with torch.no_grad():
            for p, gradient, m in zip(net.parameters(), gradients, momentum, strict=True):
                m.mul_(0.9).add_(gradient * min(1, 20 / norm))
                p.add_(0.01 * m)
    for key, tensor in net.state_dict().items():
        assert torch.allclose(task.states[1][key], tensor, rtol=1e-3, atol=1e-5), key
        assert torch.equal(task.states[2][key], task.states[1][key])  # frozen while masks are learned


def test_ascent_raises_the_loss(new_task):
    task = new_task()
    rounds = list(rnp(unlearn_epochs=5).repair(task))
    losses = [task.before.loss, *(done.val_loss for done in rounds[:5])]
    assert losses == sorted(losses)
    assert [done.stage for done in rounds[:8]] == ["learn"] * 8


@pytest.mark.parametrize(
    ("accuracies", "epochs"), [((0.9, 0.5, 0.3), 3), ((0.9, 0.2), 2), ((0.1,), 1), ((0.9, float("nan"), 0.1), 3)]
)
def test_it_stops_when_all_is_forgotten(make_net, make_clean, make_task, masks_of, accuracies, epochs):
    task = make_task(make_net("vgg"), make_clean(8), PatchTrigger(), kind=Scripted)
    task.script = torch.tensor(accuracies).tolist()
    masks_of(task, rnp(forgotten=torch.tensor(0.2).item(), recover_epochs=2))
    assert task.script == []
    assert len(task.states) == epochs + 2


# Recover


@pytest.mark.parametrize("name", NETS)
def test_two_epochs_of_recovery_by_hand(new_task, masks_of, name):
    task = new_task(name)
    masks = masks_of(task, rnp(unlearn_epochs=1, recover_rate=0.1, recover_epochs=2))
    unlearned, norm_of = task.states[0], NORM_OF[name]
    found = {layer.name: torch.ones(layer.channels) for layer in task.mask.layers}
    momentum = {key: torch.zeros_like(found[key]) for key in norm_of}
    for _ in range(2):
        leaves = {key: found[key].clone().requires_grad_() for key in norm_of}
        gammas = {f"{norm_of[key]}.weight": unlearned[f"{norm_of[key]}.weight"] * leaf for key, leaf in leaves.items()}
        logits = functional_call(task.original, {**unlearned, **gammas}, (task.scoring.clean,))
        loss = F.cross_entropy(logits, task.scoring.labels)
        for key, gradient in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
            momentum[key] = 0.9 * momentum[key] + gradient
            found[key] = (found[key] - 0.1 * momentum[key]).clamp(0, 1)
    for layer, mask in zip(task.mask.layers, task.mask.split(masks), strict=True):
        assert torch.allclose(mask, found[layer.name], atol=1e-4), layer.name
    assert 0 < (masks < 1).sum() < len(masks)


# Prune


def test_the_channel_that_ascent_awakes_is_pruned(normed_victim, make_task, masks_of):
    task = make_task(normed_victim.net, normed_victim.clean, normed_victim.trigger)
    assert (task.before.acc, task.before.asr) == (1.0, 1.0)
    method = ReconstructiveNeuronPruning(unlearn_rate=0.02, forgotten=0.4)
    masks = masks_of(task, method)
    assert masks.argmin() == 3
    assert masks[3] < 0.9 < masks[:3].min()
    list(method.repair(task))
    assert task.mask.to_dict() == {"0": [3]}
    assert (task.measure().acc, task.measure().asr) == (1.0, 0.0)


@pytest.mark.parametrize("name", NETS)
def test_weights_are_the_originals_but_for_what_is_pruned(new_task, masks_of, name):
    method = rnp(unlearn_epochs=1, recover_rate=10.0)
    masks = masks_of(new_task(name), method)
    task = new_task(name)
    parameters = list(task.model.parameters())
    list(method.repair(task))
    pruned = task.mask.flat()
    assert 0 < pruned.sum() < len(pruned)
    assert masks[pruned].max() <= masks[~pruned].min()
    for layer, bools in zip(task.mask.layers, task.mask.split(pruned), strict=True):
        assert not layer.per_filter(layer.weight.detach().abs())[bools].any()
    task.mask.undo(task.mask.steps)
    state_before = task.original.state_dict()
    assert all(torch.equal(tensor, state_before[key]) for key, tensor in task.model.state_dict().items())
    assert all(now is was for now, was in zip(task.model.parameters(), parameters, strict=True))
    assert all(parameter.grad is None for parameter in parameters)
    assert not any(module.training for module in task.model.modules())


@pytest.mark.parametrize("rounds", [1, 4])
def test_closing_early_restores_the_weights(new_task, rounds):
    task = new_task()
    search = rnp().repair(task)
    for _ in range(rounds):
        next(search)
    assert not torch.equal(task.model[0].weight, task.original[0].weight)
    search.close()
    assert all(torch.equal(now, task.original.state_dict()[key]) for key, now in task.model.state_dict().items())
    assert all(parameter.grad is None for parameter in task.model.parameters())


def test_what_was_pruned_before_stays_pruned(new_task, masks_of):
    task = new_task()
    task.mask.prune([("0", 1)])
    masks_of(task, rnp())
    assert not any(now["0.weight"][1].any() or now["1.bias"][1] for now in task.states)
    assert not task.model[0].weight[1].any()


def test_the_seed_decides(new_task, masks_of):
    method = rnp(batch_size=5, unlearn_epochs=1, recover_rate=0.01)
    first, again, other = (masks_of(new_task(seed=seed), method) for seed in (4, 4, 5))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_an_ascent_that_diverges_says_so(new_task):
    with pytest.raises(ValueError, match=r"^model: the learned masks hold NaN or infinity"):
        list(rnp(unlearn_rate=1e38).repair(new_task()))


# What is refused


def test_a_model_without_norms_is_refused(new_task):
    with pytest.raises(ValueError, match=r"^model: ReconstructiveNeuronPruning needs affine norms.*MaskPrune and"):
        rnp().refuse_misfit(new_task("plain").subject)
    with pytest.raises(ValueError, match="needs affine norms"):
        list(rnp().repair(new_task("plain")))


def test_detached_logits_are_refused(new_task):
    task = new_task()
    task.forward = lambda images: task.model(images).detach()
    with pytest.raises(ValueError, match=r"^model: its logits are detached"):
        list(rnp().repair(task))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"unlearn_rate": 0.0}, r"^unlearn_rate: expected a value in \(0, inf\], but got 0.0"),
        ({"unlearn_epochs": 0}, r"^unlearn_epochs: .* but got 0"),
        ({"forgotten": 1.1}, r"^forgotten: expected a value in \[0, 1\], but got 1.1"),
        ({"recover_rate": -1.0}, r"^recover_rate: .* but got -1.0"),
        ({"recover_epochs": 0}, r"^recover_epochs: .* but got 0"),
        ({"batch_size": 0}, r"^batch_size: .* but got 0"),
        ({"accuracy_drop": 0.0}, r"^accuracy_drop: expected a value in \(0, 1\], but got 0.0"),
    ],
)
def test_hyper_parameters(options, match):
    with pytest.raises(ValueError, match=match):
        ReconstructiveNeuronPruning(**options)

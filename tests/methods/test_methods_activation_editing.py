from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import lightning_unlearn
from lightning_unlearn.methods.activation_editing import ActivationGuidedEditing
from lightning_unlearn.triggers import PatchTrigger

NETS = ("preact", "vgg", "grouped", "plain", "group_norm")


def state(net):
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def same(first, second):
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def new_task(make_net, make_clean, make_task):
    def make(name="vgg", **options):
        return make_task(make_net(name), make_clean(6), PatchTrigger(size=2, target=1), **options)

    return make


def edit(**options):
    return ActivationGuidedEditing(**{"repair_epochs": 2, "accuracy_drop": 1.0, **options})


# By hand


def two_pixels(task_of, gamma=None):
    """One 1x1 convolution: channel 0 emits the mean pixel, channel 1 minus it, each perhaps through a norm."""
    norm = nn.BatchNorm2d(2)
    net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Identity() if gamma is None else norm, nn.Flatten(2))
    net = nn.Sequential(net, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(2, 2)).eval()
    with torch.no_grad():
        net[0][0].weight.copy_(torch.tensor([1.0, -1.0]).view(2, 1, 1, 1))
        if gamma is not None:
            norm.weight.copy_(torch.tensor(gamma))
    images = torch.tensor([0.0, 0.0, 0.2, 0.4]).view(4, 1, 1, 1).expand(4, 1, 2, 2).contiguous()
    clean = TensorDataset(images, torch.tensor([0, 1, 0, 1]))
    return task_of(net, clean, PatchTrigger(size=1, target=0))


def test_the_gap_by_hand(make_task):
    task = two_pixels(make_task)
    # Scored are 0.2 and 0.4: mean 0.3, std 0.1. A white pixel of four lifts them to 0.4 and 0.55, mean 0.475.
    assert task.scoring.clean.mean((1, 2, 3)).tolist() == pytest.approx([0.2, 0.4])
    assert edit().excess(task).tolist() == pytest.approx([1.75, -1.75], rel=1e-5)


@pytest.mark.parametrize(("gamma", "signs"), [((3.0, 0.1), (1, -1)), ((-3.0, 0.1), (-1, -1)), ((2.0, -0.5), (1, 1))])
def test_norms_change_no_gap_but_its_sign(make_task, gamma, signs):
    task = two_pixels(make_task, gamma)
    assert edit().excess(task).tolist() == pytest.approx([1.75 * sign for sign in signs], rel=1e-5)


def test_the_slack_by_hand(make_task):
    net = nn.Sequential(nn.Conv2d(2, 3, 1, bias=True), nn.Flatten(), nn.Linear(3, 2)).eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 1.0], [1.0, -1.0], [2.0, 0.0]]).view(3, 2, 1, 1))
        net[0].bias.copy_(torch.tensor([0.0, 0.5, 0.0]))
    pixels = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.5, 0.5]])
    clean = TensorDataset(pixels.view(6, 2, 1, 1), torch.tensor([0, 1, 0, 1, 0, 1]))
    task = make_task(net, clean, PatchTrigger(size=1, target=0))
    # Inputs lie in [0, 1]. Bounds 2, 1.5, 2; largest 1, 1.5, 2; means 1, 0.5, 1. The first channel emits 1 and no more.
    z = edit(triggered=False).excess(task)
    assert z[1:].tolist() == pytest.approx([0.0, 0.0], abs=1e-5)  # they can do no more than they do
    assert z[0] > 100


def test_only_the_later_layers_are_edited(new_task):
    task = new_task("grouped")  # four convolutions
    for share, edited in ((0.0, 0), (0.25, 1), (0.5, 2), (0.6, 3), (1.0, 4)):
        pieces = task.mask.split(edit(layer_share=share).excess(task))
        assert [bool(piece.any()) for piece in pieces] == [False] * (4 - edited) + [True] * edited


def test_a_known_backdoor_goes(hand_victim, make_task):
    task = make_task(hand_victim.net, hand_victim.clean, hand_victim.trigger)
    original = copy.deepcopy(hand_victim.net)
    z = edit().excess(task)
    assert z.argmax() == 3  # no clean image excites it
    rounds = list(edit(repair_epochs=0).repair(task))
    now = task.measure()
    assert (now.acc, now.asr, now.ra) == (1.0, 0.0, 1.0)
    assert [done.stage for done in rounds] == ["prune", "prune"]
    scale = (hand_victim.net[0].weight[3].norm() / original[0].weight[3].norm()).detach()
    limits = [8 * 2 ** (-k / 2) for k in range(13)]
    assert min(abs(float(scale * z[3]) / limit - 1) for limit in limits) < 1e-4  # τ / z
    assert torch.equal(hand_victim.net[0].weight[:3], original[0].weight[:3])


def test_the_clean_logits_stay_in_the_mean(make_task, hand_victim):
    """Scaled columns of the linear layer leave what they gave clean images on average to its bias."""
    task = make_task(hand_victim.net, hand_victim.clean, hand_victim.trigger)
    with torch.no_grad():
        before = task.forward(task.scoring.clean).mean(0)
        list(edit(layer_share=0.0, repair_epochs=0).repair(task))
        after = task.forward(task.scoring.clean).mean(0)
    assert task.measure().asr == 0
    assert torch.allclose(before, after, atol=1e-5)


# The trigger


def test_without_the_trigger_it_is_not_looked_at(make_net, make_clean, make_task):
    states = []
    for garbage in (False, True):
        task = make_task(make_net("vgg"), make_clean(6), PatchTrigger(size=2, target=1))
        if garbage:
            blank = torch.rand_like(task.scoring.triggered) * 100
            task.scoring = dataclasses.replace(task.scoring, triggered=blank, targets=task.scoring.labels)
        list(edit(triggered=False).repair(task))
        states.append(state(task.model))
    assert same(*states)
    assert not edit(triggered=False).needs_trigger
    assert edit().needs_trigger


def test_without_the_trigger_only_the_bias_is_trained(new_task):
    task = new_task("plain")
    linear = [module for module in task.model.modules() if isinstance(module, nn.Linear)][-1]
    weight, bias = linear.weight.clone(), linear.bias.clone()
    list(edit(triggered=False, repair_epochs=5, learning_rate=0.5).repair(task))
    assert torch.equal(linear.weight, weight)
    assert not torch.equal(linear.bias, bias)


# Any net


@pytest.mark.parametrize("triggered", [True, False])
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("channels", [1, 3])
def test_repair(make_net, make_clean, name, triggered, channels):
    net = make_net(name, channels=channels).train()
    clean, trigger = make_clean(6, channels=channels), PatchTrigger(size=2, target=1)
    method = edit(triggered=triggered)
    result = lightning_unlearn.repair(net, clean, trigger=trigger, method=method, samples_per_class=6, force=True)
    assert [done.stage for done in result.rounds][: 1 + triggered] == ["prune"] * (1 + triggered)
    assert net.training
    assert all(tensor.isfinite().all() for tensor in net.state_dict().values())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert not any(module._forward_hooks for module in net.modules())


def test_same_seed_same_result(new_task):
    states = []
    for seed in (3, 3):
        task = new_task(seed=seed)
        list(edit(batch_size=4).repair(task))
        states.append(state(task.model))
    assert same(*states)


def test_accuracy_does_not_fall_by_more_than_alpha(hand_victim, make_task):
    task = make_task(hand_victim.net, hand_victim.clean, hand_victim.trigger)
    list(edit(triggered=False, accuracy_drop=0.05, repair_epochs=0).repair(task))
    assert task.measure().acc >= 0.95 - 1e-6


def test_an_exception_changes_nothing(make_net, make_clean, left_alone):
    net, calls = make_net("vgg"), 0

    def fail(*_):
        nonlocal calls
        calls += 1
        if calls > 12:
            raise KeyboardInterrupt

    with left_alone(net):
        handle = net.register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            lightning_unlearn.repair(
                net, make_clean(6), trigger=PatchTrigger(size=2), method=edit(), samples_per_class=6, force=True
            )
        handle.remove()
    assert not any(module._forward_hooks for module in net.modules())


def test_no_linear_layer(make_clean):
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(
        ValueError, match=r"model: ActivationGuidedEditing needs an nn.Linear .* none ran; MaskPrune and"
    ):
        lightning_unlearn.repair(
            net, make_clean(6), trigger=PatchTrigger(), method=edit(), samples_per_class=6, force=True
        )


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"layer_share": -0.1}, r"^layer_share: expected a value in \[0, 1\], but got -0.1"),
        ({"layer_share": 1.1}, r"^layer_share: .* but got 1.1"),
        ({"accuracy_drop": 0.0}, r"^accuracy_drop: expected a value in \(0, 1\], but got 0.0"),
        ({"repair_epochs": -1}, r"^repair_epochs: .* but got -1"),
        ({"learning_rate": 0.0}, r"^learning_rate: .* but got 0.0"),
        ({"batch_size": 0}, r"^batch_size: .* but got 0"),
    ],
)
def test_hyper_parameters(options, match):
    with pytest.raises(ValueError, match=match):
        ActivationGuidedEditing(**options)

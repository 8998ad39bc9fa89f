from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.data import TensorDataset

from lightning_unlearn import repair
from lightning_unlearn.methods import FineTuning
from lightning_unlearn.methods.fine_pruning import FinePruning, _Seen
from lightning_unlearn.triggers import PatchTrigger

NETS = ("preact", "vgg", "grouped", "plain", "group_norm")


def columns(linear):
    """Which columns of a layer's weight are zero."""
    return (linear.weight == 0).all(0).nonzero().flatten().tolist()


# What is cut


def test_the_dormant_channel_is_cut(hand_victim, make_task):
    # Filter 3 is the backdoor: no clean image activates it. The next one costs a third of the accuracy.
    task = make_task(hand_victim.net, hand_victim.clean, hand_victim.trigger)
    before = copy.deepcopy(task.model.state_dict())
    (done,) = FinePruning(finetune=False).repair(task)
    assert columns(task.model[3]) == [3]
    assert (done.stage, done.pruned, task.mask.pruned) == ("prune", (), ())
    assert (task.before.asr, done.val_asr, done.val_acc) == (1.0, 0.0, 1.0)
    before["3.weight"][:, 3] = 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.model.state_dict().items())


@pytest.mark.parametrize(
    ("relative_drop", "wanted"), [(0.3, [3]), (0.34, [0, 3]), (0.66, [0, 3]), (0.67, [0, 1, 3]), (1.0, [0, 1, 3])]
)
def test_as_many_as_accuracy_allows(hand_victim, make_task, relative_drop, wanted):
    # Rows of rising brightness make channels 0, 1, 2 of rising activation; without one, its class is lost ...
    images, labels = hand_victim.clean.tensors
    images = (images > 0).float() * (0.7 + 0.1 * labels)[:, None, None, None]
    with torch.no_grad():
        hand_victim.net[3].bias.copy_(torch.tensor([-0.2, -0.1, 0.0]))  # ... to class 2
    task = make_task(hand_victim.net, TensorDataset(images, labels), hand_victim.trigger)
    list(FinePruning(relative_drop=relative_drop, finetune=False).repair(task))
    assert columns(task.model[3]) == wanted  # one channel is left, whatever is allowed


def test_the_first_count_that_costs_too_much_ends_it():
    # Channels 0 and 1 cancel out: without the one all images are of class 1, without both all is right again.
    inputs = torch.tensor([[0.1, 0.2, 0.3, 0.0], [0.1, 0.2, 0.9, 0.0]])
    linear = nn.Linear(4, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[100.0, -50.0, 0.0, 0.0], [0.0, 0.0, 10.0, 0.0]]))
        linear.bias.copy_(torch.tensor([0.0, -6.0]))
    seen, labels = _Seen(inputs, 1), torch.tensor([0, 1])

    def cut(relative_drop):
        return FinePruning(relative_drop=relative_drop)._choose(linear, seen, seen, labels).tolist()

    assert linear(inputs * torch.tensor([0.0, 0.0, 1.0, 0.0])).argmax(1).tolist() == [0, 1]
    assert cut(0.4) == [False, False, False, True]
    assert cut(0.5) == [True, True, False, True]  # a drop by exactly as much is within


@pytest.mark.parametrize(("step", "tried"), [(0.01, 40), (0.1, 10), (0.3, 4), (1.0, 1)])
def test_the_step_is_a_share_of_the_channels(monkeypatch, step, tried):
    linear, calls = nn.Linear(40, 3), []
    inputs = torch.rand(6, 40, generator=torch.Generator().manual_seed(0))
    plain = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *given: calls.append(1) or plain(*given))
    seen = _Seen(inputs, 1)
    cut = FinePruning(step=step, relative_drop=1.0)._choose(linear, seen, seen, torch.zeros(6, dtype=torch.long))
    assert len(calls) == tried
    assert int(cut.sum()) == (tried - 1) * max(1, round(step * 40))


@pytest.mark.parametrize("name", NETS)
def test_pooled_channels_are_ranked_by_hand(make_net, make_clean, make_task, name):
    task = make_task(make_net(name), make_clean(8), PatchTrigger(target=1), validation=2)
    linear = task.model[-1]
    with torch.no_grad():
        activations = task.model[:-1](task.scoring.clean).mean(0)
    list(FinePruning(relative_drop=0.5, finetune=False).repair(task))
    lowest = activations.argsort().tolist()
    found = columns(linear)
    assert sorted(lowest[: len(found)]) == found
    after = task.validate()
    assert after.acc >= 0.5 * task.before.acc - 1e-6
    if len(found) < len(lowest) - 1:  # and one more would have cost too much
        with torch.no_grad():
            linear.weight[:, lowest[len(found)]] = 0
        assert task.validate().acc < 0.5 * task.before.acc


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("between", [False, True])
def test_flattened_maps_are_cut_by_channel(make_clean, make_task, between, memory_format):
    torch.manual_seed(0)
    head = [nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4)] if between else [nn.Linear(12, 4)]
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Dropout(), *head)
    net.to(memory_format=memory_format)
    task = make_task(net, make_clean(8), PatchTrigger(), validation=4)
    with torch.no_grad():
        activations = net[:-1](task.scoring.clean).mean(0)
    method = FinePruning(relative_drop=1.0, finetune=False)
    list(method.repair(task))
    if between:  # each of the hidden units is on its own
        assert columns(net[-1]) == sorted(activations.argsort()[:-1].tolist())
    else:
        last = int(activations.view(3, 4).mean(1).argmax())
        assert columns(net[-1]) == [i for i in range(12) if i // 4 != last]


# Fine-tuning afterwards


def test_cut_columns_stay_zero_while_fine_tuning(hand_victim, make_task):
    task = make_task(hand_victim.net, hand_victim.clean, hand_victim.trigger)
    # The trigger's filter is alive on triggered images, so that its column would grow again.
    tuning = FineTuning(triggered=True, learning_rate=0.05, max_epochs=3, accuracy_drop=1.0)
    before = task.model[3].weight.detach().clone()
    for done in FinePruning(finetune=tuning).repair(task):
        assert columns(task.model[3]) == [3]
        assert done.pruned == ()
    assert not torch.equal(task.model[3].weight[:, :3], before[:, :3])
    assert not task.model[3].weight._backward_hooks
    assert all(p.grad is None for p in task.model.parameters())


def test_the_hook_goes_if_the_repair_is_closed(hand_victim, make_task):
    task = make_task(hand_victim.net, hand_victim.clean, hand_victim.trigger)
    search = FinePruning().repair(task)
    for _ in range(2):
        next(search)
    assert task.model[3].weight._backward_hooks
    search.close()
    assert not task.model[3].weight._backward_hooks


def test_a_frozen_classifier_is_cut_too(hand_victim, make_task):
    task = make_task(hand_victim.net, hand_victim.clean, hand_victim.trigger)
    task.model[3].weight.requires_grad_(False)
    list(FinePruning(finetune=FineTuning(max_epochs=1)).repair(task))
    assert columns(task.model[3]) == [3]


def test_one_forward_pass_chooses(make_net, make_clean, make_task):
    task = make_task(make_net("vgg"), make_clean(8), PatchTrigger())
    sizes, inner = [], task.forward
    task.forward = lambda images: sizes.append(len(images)) or inner(images)
    list(FinePruning(finetune=False).repair(task))
    assert sizes == [2, 28, 4, 8]  # finding the layer, ranking, the whole curve, and the round's measurement


def test_the_published_fine_tuning_follows_unless_told_otherwise():
    method = FinePruning(accuracy_drop=0.2)
    assert (method.finetune.max_epochs, method.finetune.accuracy_drop) == (100, 0.2)
    assert not method.needs_trigger
    assert FinePruning(finetune=FineTuning(triggered=True)).needs_trigger


# Through repair, and what is refused


def options(**others):
    method = FinePruning(finetune=FineTuning(max_epochs=2))
    return {"trigger": PatchTrigger(target=1), "method": method, "force": True} | others


@pytest.mark.parametrize(("name", "channels"), [("preact", 3), ("plain", 1)])
def test_through_repair(make_net, make_clean, name, channels):
    results = []
    for _ in range(2):
        net = make_net(name, channels=channels).train()
        done = repair(net, make_clean(10, channels=channels), **options())
        assert [step.stage for step in done.rounds] == ["prune", "finetune", "finetune"]
        assert done.pruned == {}
        assert all(module.training and not module._forward_hooks for module in net.modules())
        assert all(p.grad is None and p.isfinite().all() for p in net.parameters())
        results.append(net.state_dict())
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


class Opposite(nn.Module):
    def forward(self, logits):
        return -logits


@pytest.mark.parametrize(
    ("tail", "match"),
    [
        ([nn.Conv2d(3, 4, 6), nn.Flatten()], "but Sequential runs no torch.nn.Linear; MaskPrune, GradPrune and Fine"),
        ([nn.Linear(6, 5), nn.Conv2d(3, 4, (6, 5)), nn.Flatten()], r"of shape \(2, 4\), but the last one, '1'"),
        ([nn.Flatten(), nn.Linear(108, 4), Opposite()], "needs a last linear layer that decides the class"),
        ([nn.Flatten(), parametrizations.weight_norm(nn.Linear(108, 4))], "linear layer, '2', is computed by a param"),
    ],
)
def test_a_network_without_a_linear_classifier_is_refused(make_clean, make_task, tail, match):
    task = make_task(nn.Sequential(nn.Conv2d(1, 3, 3), *tail), make_clean(8), PatchTrigger())
    before = copy.deepcopy(task.model.state_dict())
    with pytest.raises(ValueError, match=rf"^model: .*{match}"):
        next(FinePruning().repair(task))
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.model.state_dict().items())
    assert not any(module._forward_hooks for module in task.model.modules())


@pytest.mark.parametrize("argument", ["step", "relative_drop", "accuracy_drop"])
@pytest.mark.parametrize("value", [0.0, 1.1])
def test_hyper_parameters(argument, value):
    with pytest.raises(ValueError, match=rf"^{argument}: expected a value in \(0, 1\], but got {value}"):
        FinePruning(**{argument: value})

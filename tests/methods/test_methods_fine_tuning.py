from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch.nn import functional as F  # noqa: N812 - the usual name

from lightning_unlearn.evaluation import Evaluation, evaluate
from lightning_unlearn.methods import FineTuning, RepairTask
from lightning_unlearn.triggers import PatchTrigger

NETS = ("preact", "vgg", "grouped", "plain", "group_norm")
BEST: dict[str, Any] = {"patience": 10, "norms": "frozen"}  # a constant rate, and the best epoch is kept


class Scripted(RepairTask):
    """A task whose measurements on the validation part are written by hand."""

    def say(self, *measurements):
        self.script = list(measurements)
        return self

    def validate(self):
        return self.script.pop(0)


def measured(loss, unlearning_loss=0.0, acc=1.0):
    return Evaluation(acc=acc, asr=0.0, ra=0.0, loss=loss, unlearning_loss=unlearning_loss)


def state(net):
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def same(first, second):
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def task(make_net, make_clean, make_task):
    return make_task(make_net("vgg"), make_clean(8), PatchTrigger(target=1), kind=Scripted)


def epochs_of(task, method):
    """The model after every epoch."""
    states = [state(task.model)]
    for done in method.repair(task):
        assert done.stage == "finetune"
        assert done.pruned == ()
        states.append(state(task.model))
    return states


# The steps


@pytest.mark.parametrize("teacher", ["labels", "victim"])
@pytest.mark.parametrize("triggered", [False, True])
def test_two_steps_by_hand(task, triggered, teacher):
    net = copy.deepcopy(task.model)
    images, labels = task.scoring.clean, task.scoring.labels
    with torch.no_grad():
        answers = net(images).softmax(1)
    if triggered:
        images, labels = torch.cat([images, task.scoring.triggered]), torch.cat([labels, labels])
        answers = torch.cat([answers, answers])
    momentum = [torch.zeros_like(p) for p in net.parameters()]
    for _ in range(2):
        if teacher == "labels":
            loss = F.cross_entropy(net(images), labels)
        else:
            loss = (answers * (answers.log() - net(images).log_softmax(1))).sum(1).mean()
        gradients = torch.autograd.grad(loss, list(net.parameters()))
        with torch.no_grad():
            for p, gradient, m in zip(net.parameters(), gradients, momentum, strict=True):
                m.mul_(0.9).add_(gradient + 0.01 * p)
                p.sub_(0.1 * m)
    task.say(*(measured(loss) for loss in (3.0, 2.0, 1.0)))
    options = {"learning_rate": 0.1, "weight_decay": 0.01, "max_epochs": 2, **BEST}
    method = FineTuning(triggered=triggered, teacher=teacher, **options)
    epochs_of(task, method)
    for name, tensor in net.state_dict().items():
        assert torch.allclose(task.model.state_dict()[name], tensor, rtol=1e-4, atol=1e-6), name


def test_triggered_images_are_not_looked_at_unless_told(make_net, make_clean, make_task):
    states = []
    for garbage in (False, True):
        task = make_task(make_net("vgg"), make_clean(8), PatchTrigger(), kind=Scripted)
        if garbage:
            task.scoring = dataclasses.replace(task.scoring, triggered=task.scoring.triggered * torch.nan)
        task.say(*(measured(loss) for loss in (3.0, 2.0)))
        states.append(epochs_of(task, FineTuning(learning_rate=0.1, max_epochs=1))[-1])
    assert same(*states)


def test_the_seed_orders_the_batches(make_net, make_clean, make_task):
    states = []
    for seed in (0, 0, 1):
        task = make_task(make_net("vgg"), make_clean(8), PatchTrigger(), kind=Scripted, seed=seed)
        task.say(*(measured(loss) for loss in (3.0, 2.0)))
        states.append(epochs_of(task, FineTuning(learning_rate=0.1, batch_size=4, max_epochs=1))[-1])
    assert same(states[0], states[1])
    assert not same(states[0], states[2])


def test_every_image_is_seen_once_an_epoch(task):
    task.say(*(measured(loss) for loss in (3.0, 2.0, 1.0)))
    seen, inner = [], task.forward

    def forward(images):
        seen.append(images.detach().clone())
        return inner(images)

    task.forward = forward
    epochs_of(task, FineTuning(batch_size=10, max_epochs=2))
    assert [len(images) for images in seen] == [10, 10, 8] * 2
    wanted = sorted(task.scoring.clean.flatten(1).tolist())
    for epoch in (seen[:3], seen[3:]):
        assert sorted(torch.cat(epoch).flatten(1).tolist()) == wanted


# What stays


@pytest.mark.parametrize("name", NETS)
def test_pruned_filters_stay_zero(make_net, make_clean, make_task, name):
    task = make_task(make_net(name), make_clean(8), PatchTrigger(target=1))
    layers = {layer.name: layer for layer in task.mask.layers}
    picks = [task.mask.locate(index) for index in range(0, task.mask.total, 3)]
    task.mask.prune(picks)
    method = FineTuning(triggered=True, learning_rate=0.05, weight_decay=0.1, max_epochs=3, accuracy_drop=1.0)
    for done in method.repair(task):
        assert done.round <= 3
        for layer, index in picks:
            assert layers[layer].weight[index].count_nonzero() == 0
    for layer, index in picks:
        tensors = [layers[layer].weight, *(c.tensor for c in (*layers[layer].bias, *layers[layer].norms))]
        assert all(tensor[index].count_nonzero() == 0 for tensor in tensors)
    assert task.mask.pruned == tuple(picks)


def test_the_mask_holds_only_while_tuning(task):
    task.mask.prune([("0", 1)])
    task.say(measured(3.0), measured(2.0))
    list(FineTuning(max_epochs=1).repair(task))
    optimizer = torch.optim.SGD(task.model.parameters(), lr=1.0, weight_decay=0.1)
    with torch.no_grad():
        task.model[0].weight[1] = 1
    optimizer.zero_grad()
    task.model(task.scoring.clean).sum().backward()
    optimizer.step()
    assert task.model[0].weight[1].count_nonzero() > 0


@pytest.mark.parametrize("name", ["preact", "vgg", "grouped"])
def test_running_statistics_stay(make_net, make_clean, make_task, name):
    task = make_task(make_net(name), make_clean(8), PatchTrigger(target=1))
    buffers = {key: tensor.clone() for key, tensor in task.model.named_buffers()}
    assert buffers
    list(FineTuning(triggered=True, learning_rate=0.1, max_epochs=3, norms="frozen").repair(task))
    assert all(torch.equal(tensor, buffers[key]) for key, tensor in task.model.named_buffers())
    assert not any(module.training for module in task.model.modules())
    assert all(p.grad is None for p in task.model.parameters())


def test_frozen_parameters_stay(task):
    task.model[9].weight.requires_grad_(False)
    before = state(task.model)
    task.say(measured(3.0), measured(2.0))
    list(FineTuning(learning_rate=0.1, max_epochs=1).repair(task))
    changed = {name for name, tensor in task.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert "9.weight" not in changed
    assert {"0.weight", "1.weight", "4.bias", "9.bias"} <= changed


# Which epoch is kept


def test_the_best_epoch_is_kept(task):
    task.say(*(measured(loss) for loss in (5.0, 4.0, 2.0, 3.0, 2.0, 2.5)))
    states = epochs_of(task, FineTuning(learning_rate=0.05, patience=3, norms="frozen"))
    assert task.script == []
    assert len(states) == 6  # three epochs without a lower loss; an equal one is not lower
    assert same(task.model.state_dict(), states[2])
    assert not same(states[1], states[2])


def test_patience_starts_again_with_each_better_epoch(task):
    task.say(*(measured(loss) for loss in (5.0, 6.0, 4.0, 4.5, 3.0, 3.5, 3.6)))
    states = epochs_of(task, FineTuning(learning_rate=0.05, patience=2, norms="frozen"))
    assert task.script == []
    assert same(task.model.state_dict(), states[4])


def test_epoch_0_competes(task):
    task.say(*(measured(loss) for loss in (1.0, 1.5, 1.0)))
    states = epochs_of(task, FineTuning(learning_rate=0.05, max_epochs=2, **BEST))
    assert same(task.model.state_dict(), states[0])


@pytest.mark.parametrize("triggered", [False, True])
def test_the_loss_on_triggered_images_counts_if_they_are_trained_on(task, triggered):
    # Epoch 1 is better on clean images, epoch 2 on both together.
    task.say(measured(2.0, 2.0), measured(1.0, 4.0), measured(1.5, 1.0))
    states = epochs_of(task, FineTuning(learning_rate=0.05, max_epochs=2, triggered=triggered, **BEST))
    assert same(task.model.state_dict(), states[2 if triggered else 1])


def test_an_epoch_that_costs_too_much_accuracy_is_not_kept(task):
    task.before = measured(9.0, acc=1.0)
    task.say(measured(5.0), measured(4.0, acc=0.95), measured(1.0, acc=0.85))
    states = epochs_of(task, FineTuning(learning_rate=0.05, max_epochs=2, accuracy_drop=0.1, **BEST))
    assert same(task.model.state_dict(), states[1])


@pytest.mark.parametrize(("before", "after"), [(1.0, 0.9), (0.9, 0.8), (0.3, 0.2), (0.7, 0.6)])
def test_a_drop_by_exactly_alpha_is_within(task, before, after):
    before, after = torch.tensor([before, after]).tolist()  # float32, as rates come
    task.before = measured(9.0, acc=before)
    task.say(measured(5.0, acc=before), measured(4.0, acc=after))
    states = epochs_of(task, FineTuning(learning_rate=0.05, max_epochs=1, accuracy_drop=0.1, **BEST))
    assert same(task.model.state_dict(), states[1])


def test_a_loss_that_is_no_number_is_not_lower(task):
    task.say(measured(5.0), measured(float("nan")), measured(float("inf")), measured(4.0))
    states = epochs_of(task, FineTuning(learning_rate=0.05, max_epochs=3, **BEST))
    assert same(task.model.state_dict(), states[3])


def test_no_epochs(task):
    task.say(measured(5.0))
    assert len(epochs_of(task, FineTuning(max_epochs=0, **BEST))) == 1


@pytest.mark.parametrize("learning_rate", [1.0, 1e4, 1e38])
@pytest.mark.parametrize("triggered", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_a_huge_learning_rate_makes_nothing_worse(make_net, make_clean, make_task, name, triggered, learning_rate):
    task = make_task(make_net(name), make_clean(8), PatchTrigger(target=1), validation=2)
    options = {"learning_rate": learning_rate, "max_epochs": 3, "accuracy_drop": 0.1, **BEST}
    method = FineTuning(triggered=triggered, **options)
    rounds = list(method.repair(task))
    after = evaluate(task.model, [task.validation])
    loss, loss_before = (e.loss + e.unlearning_loss * triggered for e in (after, task.before))
    assert loss <= loss_before + 1e-6
    assert after.acc >= task.before.acc - 0.1 - 1e-6
    assert all(tensor.isfinite().all() for tensor in task.model.state_dict().values())
    # What is left is the best of all that was measured.
    losses = [done.val_loss + done.val_unlearning_loss * triggered for done in rounds]
    allowed = [x for x, done in zip(losses, rounds, strict=True) if done.val_acc >= task.before.acc - 0.1 - 1e-6]
    assert loss == pytest.approx(min([loss_before, *(x for x in allowed if x == x)]), rel=1e-5)


def test_a_small_learning_rate_does_help(hand_victim, make_task):
    task = make_task(hand_victim.net, hand_victim.clean, hand_victim.trigger)
    rounds = list(FineTuning(triggered=True, learning_rate=0.05, max_epochs=20, **BEST).repair(task))
    after = task.validate()
    assert (task.before.asr, after.asr) == (1.0, 0.0)
    assert after.acc == 1.0
    assert after.unlearning_loss < 0.5 * task.before.unlearning_loss
    assert rounds[-1].round == len(rounds) <= 20


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"teacher": "me"}, "^teacher: expected 'victim' or 'labels', but got 'me'"),
        ({"learning_rate": 0}, r"^learning_rate: expected a value in \(0, inf\], but got 0"),
        ({"weight_decay": -1e-4}, r"^weight_decay: .* but got -0.0001"),
        ({"batch_size": 0}, r"^batch_size: .* but got 0"),
        ({"patience": 0}, r"^patience: .* but got 0"),
        ({"max_epochs": -1}, r"^max_epochs: .* but got -1"),
        ({"norms": "thawed"}, "^norms: expected 'frozen' or 'trained', but got 'thawed'"),
        ({"accuracy_drop": 0.0}, r"^accuracy_drop: expected a value in \(0, 1\], but got 0.0"),
    ],
)
def test_hyper_parameters(options, match):
    with pytest.raises(ValueError, match=match):
        FineTuning(**options)

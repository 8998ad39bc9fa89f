from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the usual name

from lightning_unlearn.evaluation import Evaluation
from lightning_unlearn.methods import FineTuning, RepairTask
from lightning_unlearn.methods.training import batches, train_epochs
from lightning_unlearn.triggers import PatchTrigger

NETS = ("preact", "vgg", "grouped", "plain", "group_norm")


class Scripted(RepairTask):
    """A task whose measurements on the validation part are written by hand."""

    def say(self, *measurements):
        self.script = list(measurements)
        return self

    def validate(self):
        return self.script.pop(0)


def measured(loss, acc=1.0):
    return Evaluation(acc=acc, asr=0.0, ra=0.0, loss=loss, unlearning_loss=0.0)


def state(net):
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def task(make_net, make_clean, make_task):
    task = make_task(make_net("vgg"), make_clean(8), PatchTrigger(target=1), kind=Scripted)
    task.before = measured(9.0)
    return task


def train(task, **options):
    """Run and give the optimizer's rates and the states after each epoch, the first before any."""
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.1)
    rates, states = [], [state(task.model)]

    def step(chosen):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.zero_grad()
        F.cross_entropy(task.forward(task.scoring.clean[chosen]), task.scoring.labels[chosen]).backward()
        optimizer.step()

    for _ in train_epochs(task, optimizer, step, **{"batch_size": 100, **options}):
        assert not any(module.training for module in task.model.modules())
        states.append(state(task.model))
    return rates, states


# Rates, and which epoch is kept


def test_the_rate_falls_along_a_cosine_and_the_last_epoch_is_kept(task):
    task.say(*(measured(loss) for loss in (1.0, 3.0, 2.0, 4.0)))  # none before the first epoch
    rates, states = train(task, max_epochs=4)
    half = 0.5**0.5
    assert rates == pytest.approx([0.1, 0.05 * (1 + half), 0.05, 0.05 * (1 - half)])
    assert task.script == []
    assert same(task.model.state_dict(), states[4])
    assert not same(states[3], states[4])
    assert all(p.grad is None for p in task.model.parameters())


def test_with_patience_the_rate_is_constant_and_the_best_epoch_is_kept(task):
    task.say(*(measured(loss) for loss in (5.0, 4.0, 4.5, 4.0)))
    rates, states = train(task, max_epochs=9, patience=2)
    assert rates == [0.1] * 3
    assert task.script == []
    assert same(task.model.state_dict(), states[1])


def test_the_loss_may_be_another(task):
    task.say(*(measured(loss) for loss in (1.0, 2.0, 4.0, 3.0)))
    _, states = train(task, max_epochs=3, patience=5, loss=lambda now: -now.loss)
    assert same(task.model.state_dict(), states[2])


@pytest.mark.parametrize("bad", [measured(0.1, acc=0.85), measured(float("nan")), measured(float("inf"))])
def test_the_last_epoch_that_may_be_kept_is(task, bad):
    task.say(measured(3.0), measured(2.0, acc=0.9), bad)
    _, states = train(task, max_epochs=3)
    assert same(task.model.state_dict(), states[2])


def test_without_an_epoch_that_may_be_kept_nothing_changes(task):
    task.say(*[measured(0.1, acc=0.5)] * 2)
    _, states = train(task, max_epochs=2, norms="trained")
    assert same(task.model.state_dict(), states[0])
    assert not same(states[1], states[0])


def test_no_epochs(task):
    task.say()
    _, states = train(task, max_epochs=0)
    assert same(task.model.state_dict(), states[0])


@pytest.mark.parametrize("attribute", ["running_var", "weight"])
def test_infinities_that_the_loss_does_not_show_are_not_kept(task, attribute):
    task.say(*[measured(1.0)] * 2)
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.1)

    def step(_):
        optimizer.step()
        getattr(task.model[1], attribute).data.fill_(torch.inf)

    epochs = train_epochs(task, optimizer, step, batch_size=100, max_epochs=2, norms="trained")
    before = state(task.model)
    assert len(list(epochs)) == 2
    assert same(task.model.state_dict(), before)


@pytest.mark.parametrize("learning_rate", [1.0, 1e4, 1e38])
@pytest.mark.parametrize("name", NETS)
def test_a_huge_learning_rate_costs_no_accuracy(make_net, make_clean, make_task, name, learning_rate):
    task = make_task(make_net(name), make_clean(8), PatchTrigger(target=1), validation=2)
    list(FineTuning(learning_rate=learning_rate, max_epochs=3).repair(task))
    assert task.validate().acc >= task.before.acc - 0.1 - 1e-6
    assert all(tensor.isfinite().all() for tensor in task.model.state_dict().values())


# Norms


def test_frozen_norms_keep_their_statistics(task):
    task.say(*[measured(1.0)] * 2)
    before = {name: tensor.clone() for name, tensor in task.model.named_buffers()}
    train(task, max_epochs=2)
    assert same(dict(task.model.named_buffers()), before)


def test_trained_norms_see_the_batch(task):
    task.say(measured(1.0))
    convolution, norm = copy.deepcopy(task.model[0]), copy.deepcopy(task.model[1])
    train(task, max_epochs=1, norms="trained")
    outputs = convolution(task.scoring.clean).detach().transpose(0, 1).flatten(1)
    wanted = 0.9 * norm.running_mean + 0.1 * outputs.mean(1)
    assert torch.allclose(task.model[1].running_mean, wanted, atol=1e-5)
    assert task.model[1].num_batches_tracked == norm.num_batches_tracked + 1


def test_the_statistics_of_the_kept_epoch_come_back(task):
    task.say(measured(1.0), measured(1.0), measured(1.0, acc=0.0))
    _, states = train(task, max_epochs=3, norms="trained")
    assert same(task.model.state_dict(), states[2])
    assert not torch.equal(states[3]["1.running_mean"], states[2]["1.running_mean"])
    assert states[2]["1.num_batches_tracked"] + 1 == states[3]["1.num_batches_tracked"]


def test_a_step_that_raises_leaves_no_train_mode(task):
    task.say()
    epochs = train_epochs(
        task,
        torch.optim.SGD(task.model.parameters(), lr=0.1),
        lambda _: 1 / 0,
        batch_size=100,
        max_epochs=2,
        norms="trained",
    )
    with pytest.raises(ZeroDivisionError):
        next(epochs)
    assert not any(module.training for module in task.model.modules())


def test_dropout_follows_the_seed_and_leaves_the_global_state(make_clean, make_task):
    states = []
    for number, seed in enumerate((0, 0, 1)):
        torch.manual_seed(7)
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(144, 4))
        task = make_task(net, make_clean(8), PatchTrigger(), kind=Scripted, seed=seed)
        task.before = measured(9.0)
        task.say(*[measured(1.0)] * 2)
        torch.manual_seed(number)
        before = torch.get_rng_state()
        states.append(train(task, max_epochs=2, norms="trained")[1][-1])
        assert torch.equal(torch.get_rng_state(), before)
    assert same(states[0], states[1])
    assert not same(states[0], states[2])


# Batches


@pytest.mark.parametrize(
    ("size", "sizes"), [(1, [1] * 28), (2, [2] * 14), (9, [9, 9, 10]), (10, [10, 10, 8]), (27, [28]), (99, [28])]
)
def test_a_lone_last_image_joins(task, size, sizes):
    found = list(batches(task, size, task.generator()))
    assert [len(chosen) for chosen in found] == sizes
    assert sorted(torch.cat(found).tolist()) == list(range(28))


@pytest.mark.parametrize(("most", "sizes"), [(128, [28]), (14, [28]), (13, [26, 2]), (4, [8, 8, 8, 4]), (1, [2] * 14)])
def test_a_step_takes_at_most_twice_the_tasks_batch_size(task, most, sizes):
    task.batch_size = most
    assert [len(chosen) for chosen in batches(task, 99, task.generator())] == sizes


def test_each_epoch_has_an_order_of_its_own(task):
    generator = task.generator()
    orders = [torch.cat(list(batches(task, 5, generator))).tolist() for _ in range(3)]
    assert all(one != other for one, other in pairwise(orders))


# What was not finite before, and what is not the model's


def test_what_was_infinite_before_is_no_sign_of_divergence(task):
    task.model.register_buffer("best_loss", torch.tensor(float("inf")))
    task.say(measured(1.0))
    _, states = train(task, max_epochs=1, norms="trained")
    assert same(task.model.state_dict(), states[1])
    assert not same(states[0], states[1])


def test_no_generator_of_another_device_is_seeded(task, monkeypatch):
    def refuse(seed):
        raise AssertionError("a GPU that the model is not on was seeded")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)
    train(task.say(measured(1.0)), max_epochs=1, norms="trained")

from __future__ import annotations

import pytest
import torch

from lightning_unlearn.draw import Split
from lightning_unlearn.methods import GradPrune, RepairMethod
from lightning_unlearn.plan import RepairPlan
from lightning_unlearn.repair import repair, repair_split
from lightning_unlearn.triggers import PatchTrigger
from tests.small_repairs import METHODS, Spy, asr


class Vandal(RepairMethod):
    """Makes the model worse: it answers the target to everything."""

    def repair(self, task):
        with torch.no_grad():
            list(task.model.parameters())[-1].copy_(torch.tensor([100.0, 0.0, 0.0]))
        task.mask.prune([task.mask.locate(0)])
        yield task.round("prune", task.validate(), task.mask.pruned)


# When the model is left alone or put back


def without_backdoor(hand_victim):
    with torch.no_grad():
        hand_victim.net[3].weight[:, 3] = 0
    return hand_victim.net


@pytest.mark.parametrize("method", METHODS)
def test_a_clean_model_is_left_alone(hand_victim, left_alone, method):
    net = without_backdoor(hand_victim)
    with left_alone(net):
        result = repair(net, hand_victim.clean, trigger=hand_victim.trigger, method=method())
    assert result.status == "not backdoored"
    assert result.rounds == ()
    assert result.pruned == {}
    assert result.before == result.after
    assert result.before.asr == 0


def test_min_asr_decides_on_everything_drawn(hand_victim, left_alone):
    # Filter 3 answers to the trigger only on class 1, so that ASR is one half.
    net = hand_victim.net
    with torch.no_grad():
        net[0].weight[3, 0, 1] = 0.25
        net[0].bias[3] = -1.5
        net[3].weight[0, 3] = 40
    arguments = {"trigger": hand_victim.trigger, "method": GradPrune(finetune=False)}
    with left_alone(net):
        assert repair(net, hand_victim.clean, min_asr=0.51, **arguments).status == "not backdoored"
    assert repair(net, hand_victim.clean, min_asr=0.5, **arguments).status == "repaired"


@pytest.mark.parametrize("method", METHODS)
def test_force_does_not_raise_asr(hand_victim, method):
    net = without_backdoor(hand_victim)
    result = repair(net, hand_victim.clean, trigger=hand_victim.trigger, method=method(), force=True)
    assert result.status != "not backdoored"
    assert result.rounds
    assert asr(net, hand_victim.clean, hand_victim.trigger) == 0
    assert result.after.acc >= 0.9


def test_a_method_that_raises_asr_is_undone(hand_victim, left_alone):
    net = without_backdoor(hand_victim)
    with left_alone(net):
        result = repair(net, hand_victim.clean, trigger=hand_victim.trigger, method=Vandal(), force=True)
    assert result.status == "not improved"
    assert result.pruned == {}
    assert result.rounds[0].val_asr == 1
    assert result.after == result.before


def test_a_search_that_ends_where_it_began_is_no_repair(hand_victim, left_alone):
    # Without any useful filter to prune, round 0 wins and everything is undone.
    net = without_backdoor(hand_victim)
    with left_alone(net):
        result = repair(
            net, hand_victim.clean, trigger=hand_victim.trigger, method=GradPrune(finetune=False), force=True
        )
    assert result.rounds
    assert result.pruned == {}
    assert result.status == "not improved"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_an_exception_in_on_round_restores_the_model(make_net, make_clean, left_alone, method, at, error):
    net = make_net("preact")

    def stop(done):
        if done.round == at:
            raise error("enough")

    with left_alone(net), pytest.raises(error, match="enough"):
        repair(net, make_clean(20), trigger=PatchTrigger(), method=method(), force=True, on_round=stop)


@pytest.mark.parametrize(("name", "error"), [("vgg", RuntimeError), ("plain", KeyboardInterrupt)])
@pytest.mark.parametrize("method", METHODS)
def test_an_exception_in_the_model_restores_it(make_net, make_clean, left_alone, method, name, error):
    calls = 0

    def forward(images):
        nonlocal calls
        calls += 1
        if calls == 9:  # far into the work: tracing, checking and the first measurements take fewer
            raise error("enough")
        return net(images)

    net, (images, labels) = make_net(name), make_clean(10).tensors
    split = Split((images[:20], labels[:20]), (images[20:], labels[20:]))
    plan = RepairPlan(trigger=PatchTrigger(), method=method(), force=True)
    with left_alone(net), pytest.raises(error, match="enough"):
        repair_split(net, split, plan, forward=forward, on_round=lambda _: None)
    assert calls == 9


def test_an_exception_in_a_method_restores_the_model(make_net, make_clean, left_alone):
    def break_everything(task):
        task.mask.prune([task.mask.locate(0)])
        for tensor in (*task.model.parameters(), *task.model.buffers()):
            tensor.data.fill_(7)
        task.model.train()
        raise MemoryError

    net = make_net("vgg")
    with left_alone(net), pytest.raises(MemoryError):
        repair(net, make_clean(20), trigger=PatchTrigger(), method=Spy(break_everything), force=True)


@pytest.mark.parametrize("change", [False, True])
def test_a_buffer_that_is_no_number_is_no_repair(hand_victim, change):
    hand_victim.net.register_buffer("threshold", torch.tensor([torch.nan, 0.0]))

    def maybe(task):
        task.model.threshold[1] = float(change)

    result = repair(hand_victim.net, hand_victim.clean, trigger=hand_victim.trigger, method=Spy(maybe))
    assert result.status == ("repaired" if change else "not improved")


# What earlier repairs pruned


@pytest.mark.parametrize("method", [Spy, Vandal, *METHODS])
def test_what_is_held_is_pruned_before_anything_is_measured_and_stays_so(hand_victim, method):
    net, trigger = hand_victim.net, hand_victim.trigger
    held = {"0": torch.tensor([False, False, False, True])}  # without which the model has no backdoor
    images, labels = hand_victim.clean.tensors
    split = Split((images, labels), (images[:20], labels[:20]))
    result = repair_split(net, split, RepairPlan(trigger=trigger, method=method(), force=True), held=held)
    assert result.before.asr == 0
    assert result.pruned["0"][-1] == 3
    assert net[0].weight[3].count_nonzero() == 0
    assert asr(net, hand_victim.clean, trigger) == pytest.approx(result.held[1].asr)

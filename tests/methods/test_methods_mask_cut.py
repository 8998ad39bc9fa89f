from __future__ import annotations

import copy

import pytest
import torch

from lightning_unlearn.methods import MaskPrune
from lightning_unlearn.methods.mask_cut import cut
from lightning_unlearn.triggers import PatchTrigger
from tests.methods.small_masks import CUTS, NETS, assert_pruned_is_zero, factors, learn


def everything_else(task):
    """State that no method may touch: what neither belongs to a filter nor to the norm that consumes it."""
    filters = {
        id(tensor)
        for layer in task.mask.layers
        for tensor in (layer.weight, *(c.tensor for c in (*layer.bias, *layer.norms)))
    }
    state = {**dict(task.model.named_parameters()), **dict(task.model.named_buffers())}
    return [name for name, tensor in state.items() if id(tensor) not in filters]


# What is cut


@pytest.mark.parametrize("name", NETS)
def test_soft(new_task, name):
    task = new_task(name)
    rounds = list(learn(cut="soft").repair(task))
    scales = factors(task)
    assert set(task.mask.pruned) == {pick for pick, factor in scales.items() if factor == 0}
    assert any(0 < factor < 1 for factor in scales.values())
    assert rounds[-1].pruned == task.mask.pruned
    assert_pruned_is_zero(task)


@pytest.mark.parametrize("slack", [0.0, 0.05, 1e9])
@pytest.mark.parametrize("name", ["preact", "plain"])
def test_mixed(new_task, name, slack):
    # 1e9: the loss may rise as it likes, so that all that is half off goes.
    soft, mixed = new_task(name), new_task(name)
    list(learn(cut="soft").repair(soft))
    list(learn(cut="mixed", slack=slack).repair(mixed))
    before, after = factors(soft), factors(mixed)
    assert_pruned_is_zero(mixed)
    pruned, kept = set(mixed.mask.pruned), set(after) - set(mixed.mask.pruned)
    assert set(soft.mask.pruned) <= pruned
    assert all(after[pick] == pytest.approx(before[pick]) for pick in kept)
    assert max((before[pick] for pick in pruned), default=0.0) <= min(before[pick] for pick in kept) + 1e-6
    losses = [now.loss + now.unlearning_loss for now in (soft.measure(), mixed.measure())]
    assert losses[1] <= losses[0] + slack + 1e-6
    if slack == 1e9:
        assert pruned == {pick for pick, factor in before.items() if factor < 0.5}


@pytest.mark.parametrize("name", NETS)
def test_hard(new_task, name):
    soft, hard = new_task(name), new_task(name)
    list(learn(cut="soft").repair(soft))
    rounds = list(learn(cut="hard").repair(hard))
    before, after = factors(soft), factors(hard)
    pruned = set(hard.mask.pruned)
    assert_pruned_is_zero(hard)
    assert rounds[-1].pruned == hard.mask.pruned
    # The lowest masks go, and what stays is bit for bit as it was.
    assert max((before[pick] for pick in pruned), default=0) <= min(before[pick] for pick in set(before) - pruned)
    hard.mask.undo(hard.mask.steps)
    state = hard.original.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in hard.model.state_dict().items())
    assert after.keys() == before.keys()


@pytest.mark.parametrize("name", NETS)
def test_hard_leaves_the_lowest_loss(new_task, name):
    task = new_task(name)
    start = task.measure()
    list(learn(cut="hard").repair(task))
    now = task.measure()
    assert now.loss + now.unlearning_loss <= start.loss + start.unlearning_loss


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", NETS)
def test_nothing_else_is_touched(new_task, name, cut):
    task = new_task(name)
    parameters = list(task.model.parameters())
    original = {**dict(task.original.named_parameters()), **dict(task.original.named_buffers())}
    names = everything_else(task)
    list(learn(cut=cut).repair(task))
    assert names
    state = {**dict(task.model.named_parameters()), **dict(task.model.named_buffers())}
    assert all(torch.equal(state[key], original[key]) for key in names)
    assert all(torch.equal(tensor, original[key]) for key, tensor in task.model.named_buffers())
    assert all(now is before for now, before in zip(task.model.parameters(), parameters, strict=True))
    assert not any(module.training for module in task.model.modules())


@pytest.mark.parametrize("cut", CUTS)
def test_nothing_turned_down_is_nothing_done(new_task, cut):
    task = new_task()
    list(learn(cut=cut, sparsity=10.0).repair(task))
    assert task.mask.pruned == ()
    state = task.original.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in task.model.state_dict().items())


@pytest.mark.parametrize("cut", CUTS)
def test_a_known_backdoor_goes(hand_victim, make_task, cut):
    task = make_task(hand_victim.net, hand_victim.clean, hand_victim.trigger)
    list(MaskPrune(cut=cut, finetune=False).repair(task))
    now = task.measure()
    assert (now.acc, now.asr, now.ra) == (1.0, 0.0, 1.0)
    weights = task.model[0].weight.detach().flatten(1).norm(dim=1)
    assert weights[3] <= 0.25  # it was 1
    assert weights[:3].min() >= 0.25  # they were 0.5
    if cut == "hard":
        assert task.mask.to_dict() == {"0": [3]}


# Accuracy


@pytest.mark.parametrize("accuracy_drop", [0.001, 0.1, 0.4])
@pytest.mark.parametrize("cut", ["soft", "mixed"])
def test_accuracy_does_not_fall_by_more_than_alpha(hand_victim, make_task, cut, accuracy_drop):
    # A teacher who says 0 to everything turns the filters of classes 1 and 2 down, until only class 0 is right.
    original, left = copy.deepcopy(hand_victim.net), []
    for alpha in (accuracy_drop, 1.0):
        task = make_task(copy.deepcopy(original), hand_victim.clean, hand_victim.trigger)
        task.answers = torch.tensor([[0.98, 0.01, 0.01]]).expand(len(task.scoring), -1)
        method = learn(cut=cut, accuracy_drop=alpha, steps=20, learning_rate=0.1, slack=10.0, validate_every=1)
        list(method.repair(task))
        left.append(task.measure().acc)
        learned = factors(task, original)
        assert learned["0", 1] < 1
    assert 1 >= left[0] >= 1 - accuracy_drop - 1e-6
    assert left[1] == pytest.approx(1 / 3)  # without a limit


def test_masks_that_cost_too_much_are_drawn_back_no_further_than_needed(hand_victim, make_task):
    def task(scales=(1, 1, 1, 1)):
        net = copy.deepcopy(hand_victim.net)
        with torch.no_grad():
            for parameter in net[0].parameters():
                parameter.mul_(torch.tensor(scales).view(-1, *[1] * (parameter.ndim - 1)))
        return make_task(net, hand_victim.clean, hand_victim.trigger)

    def learned(alpha):
        of = task()
        of.answers = torch.tensor([[0.98, 0.01, 0.01]]).expand(len(of.scoring), -1)
        # A step of 2, past 0, so that rounding leaves nothing of the masks by which an image could still be right.
        list(learn(cut="soft", accuracy_drop=alpha, steps=1, learning_rate=2.0).repair(of))
        found = list(factors(of, hand_victim.net).values())
        assert of.measure().acc == task(found).measure().acc
        return torch.tensor(found), of.measure().acc

    far, acc = learned(1.0)
    assert acc < 0.9
    back, acc = learned(0.1)
    assert acc >= 0.9
    share = ((1 - back) / (1 - far))[far < 1]
    assert torch.allclose(share, share[0].mul(10).round() / 10)  # all by as many tenths
    assert 0.1 < share[0] < 0.95
    assert task((1 - (share[0] + 0.1) * (1 - far)).tolist()).measure().acc < 0.9


@pytest.mark.parametrize("accuracy_drop", [0.001, 0.1, 0.4])
def test_pruning_costs_no_more_than_alpha_either(hand_victim, make_task, accuracy_drop):
    # The masks alone cost nothing, but any amount of loss may be paid for pruning.
    task = make_task(hand_victim.net, hand_victim.clean, hand_victim.trigger)
    method = learn(cut="mixed", accuracy_drop=accuracy_drop, sparsity=0.0, steps=3, learning_rate=0.05, slack=1e9)
    task.answers = torch.tensor([[0.98, 0.01, 0.01]]).expand(len(task.scoring), -1)
    list(method.repair(task))
    assert task.measure().acc >= 1 - accuracy_drop - 1e-6


@pytest.mark.parametrize("how", ["mixed", "hard"])
@pytest.mark.parametrize("earlier", [(), (4, 8), (0, 4, 8, 9), tuple(range(6))])
def test_what_was_pruned_before_takes_no_place(make_net, make_clean, make_task, how, earlier):
    # The masks of what is pruned have no gradient and stay at 1.
    task = make_task(make_net("vgg", seed=1), make_clean(8), PatchTrigger(size=5, target=1))
    order = [6, 10, 9, 2, 7]
    task.mask.prune([task.mask.locate(index) for index in earlier])
    masks = torch.ones(task.mask.total)
    low = [index for index in order if index not in earlier]
    for place, index in enumerate(low):
        masks[index] = 0.01 * place  # the first is folded away
    seen = []
    prune = task.mask.prune
    task.mask.prune = lambda filters: seen.extend(filters) or prune(filters)
    cut(task, masks, how, floor=-1.0, below=0.1, slack=1e9)
    assert seen == [task.mask.locate(index) for index in low]
    if how == "mixed":  # nothing is taken back at any price
        assert list(task.mask.pruned) == [task.mask.locate(index) for index in (*earlier, *low)]

from __future__ import annotations

import copy

import pytest
import torch

from lightning_unlearn.evaluation import Evaluation
from lightning_unlearn.methods import RepairTask
from lightning_unlearn.methods.threshold import prune_below_threshold


class Scripted(RepairTask):
    """A task whose accuracies on all images held are written by hand."""

    def say(self, *accuracies):
        self.script = list(accuracies)
        return self

    def measure(self):
        return Evaluation(acc=self.script.pop(0), asr=0.0, ra=0.0, loss=0.0, unlearning_loss=0.0)


def prune(task, masks, accuracy_drop=0.1):
    return list(prune_below_threshold(task, torch.tensor(masks), accuracy_drop=accuracy_drop))


@pytest.fixture
def task(hand_victim, make_task):
    # Of its filters, 0 costs no accuracy (all logits are then 0, and class 0 wins), 1 and 2 a third each, 3 none.
    task = make_task(hand_victim.net, hand_victim.clean, hand_victim.trigger)
    task.original = copy.deepcopy(task.model)
    return task


@pytest.fixture
def scripted(hand_victim, make_task):
    return make_task(hand_victim.net, hand_victim.clean, hand_victim.trigger, kind=Scripted)


@pytest.mark.parametrize(
    ("masks", "accuracy_drop", "kept"),
    [
        ([1.0, 1.0, 1.0, 0.3], 0.1, [3]),
        ([1.0, 0.5, 1.0, 0.3], 0.1, [3]),
        ([1.0, 0.5, 1.0, 0.3], 0.4, [1, 3]),
        ([0.2, 0.5, 1.0, 0.3], 0.1, [0, 3]),
        ([1.0, 0.1, 1.0, 0.3], 0.1, []),  # the guilty filter is not among the lowest
        ([1.0, 0.3, 1.0, 0.3], 0.1, []),  # nor alone
        ([1.0, 0.1, 0.2, 0.3], 1.0, [1, 2, 3]),
        ([1.0, 1.0, 1.0, 1.0], 1.0, []),
        ([1.0, 1.0, 1.0, 0.96], 1.0, []),
        ([1.0, 1.0, 1.0, 0.0], 0.1, [3]),
    ],
)
def test_what_is_kept(task, masks, accuracy_drop, kept):
    prune(task, masks, accuracy_drop)
    assert task.mask.to_dict() == ({"0": kept} if kept else {})
    assert task.measure().acc >= 1 - accuracy_drop - 1e-6
    for index in set(range(4)) - set(kept):
        assert torch.equal(task.model[0].weight[index], task.original[0].weight[index])
        assert task.model[0].bias[index] == task.original[0].bias[index]
    assert not task.model[0].weight[kept].any()


def test_a_round_for_each_threshold_that_adds(task):
    rounds = prune(task, [0.21, 0.9, 0.24, 0.0], accuracy_drop=0.5)
    assert [set(done.pruned) for done in rounds] == [{("0", 3)}, {("0", 0), ("0", 2)}, {("0", 1)}]
    assert [done.stage for done in rounds] == ["prune"] * 3
    assert [done.round for done in rounds] == [1, 2, 3]
    assert [done.val_acc for done in rounds] == pytest.approx([1, 2 / 3, 1 / 3])
    assert rounds[0].val_asr == 0
    assert task.mask.pruned == (("0", 3), ("0", 0), ("0", 2))


@pytest.mark.parametrize(
    ("accuracies", "kept"),
    [
        ((0.9, 0.9, 0.85, 0.8), 3),  # by exactly α, in float32
        ((0.9, 0.9, 0.79, 0.85), 3),  # accuracy may come back
        ((0.9, 0.9, 0.85, 0.79), 2),
        ((0.9, 0.85, 0.7, 0.6), 1),
        ((0.9, 0.7, 0.7, 0.7), 0),
        ((0.9, float("nan"), 0.9, float("nan")), 2),
    ],
)
def test_the_most_channels_within_alpha(scripted, accuracies, kept):
    scripted.say(*torch.tensor(accuracies).tolist())
    prune(scripted, [0.1, 0.2, 0.3, 1.0])
    assert scripted.script == []
    assert scripted.mask.pruned == (("0", 0), ("0", 1), ("0", 2))[:kept]


def test_what_is_pruned_already(task):
    task.mask.prune([("0", 3)])
    rounds = prune(task, [0.1, 1.0, 1.0, 0.0])
    assert [done.pruned for done in rounds] == [(("0", 0),)]
    assert task.mask.pruned == (("0", 3), ("0", 0))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_masks_that_are_no_numbers(task, value):
    with pytest.raises(ValueError, match=r"^model: the learned masks hold NaN or infinity"):
        prune(task, [0.1, value, 1.0, 1.0])
    assert task.mask.pruned == ()

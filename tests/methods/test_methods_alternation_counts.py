"""Which of several repairs counts."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from lightning_unlearn.auditor import Auditor, TimeOverError
from lightning_unlearn.methods import Alternation
from lightning_unlearn.triggers import PatchTrigger
from lightning_unlearn.verdict import Audit
from tests.methods.small_alternations import Recorder, scripted


@pytest.fixture
def task(hand_victim, make_task):
    return make_task(hand_victim.net, hand_victim.clean, hand_victim.trigger)


@pytest.fixture
def changing(make_net, make_clean, make_task):
    """``changing()``: a task, a method that prunes two filters and moves all weights, and what it found and left."""

    def make():
        net = make_net("vgg")
        task = make_task(net, make_clean(8), PatchTrigger(size=1, target=0))
        found, left = [], []

        def step(stage):
            found.append((copy.deepcopy(net.state_dict()), task.mask.pruned))
            task.mask.prune([task.mask.locate(len(found)), task.mask.locate(10 - len(found))])
            with torch.no_grad():  # as a fine-tuning would, its norms' statistics too
                for tensor in (*net.parameters(), *net.buffers()):
                    tensor.add_(len(found))
            task.mask.hold()
            left.append((copy.deepcopy(net.state_dict()), task.mask.pruned))

        return task, Recorder(step), found, left

    return make


def assert_same(first, second):
    (weights, pruned), (others, others_pruned) = first, second
    assert pruned == others_pruned
    assert all(torch.equal(weights[name], others[name]) for name in others)


@pytest.mark.parametrize("verdict", [None, "suspicious", "backdoored"])
def test_every_repair_is_of_the_original(changing, monkeypatch, verdict):
    scripted(monkeypatch, 3.0, 2.0, 1.0, size=8)
    task, method, found, left = changing()
    if verdict is not None:
        task.audit = Audit(verdict, 0, 3.0, (), (), 3)
    original = copy.deepcopy(task.model.state_dict()), ()
    list(Alternation(method, rounds=3).repair(task))
    assert len(found) == 3
    for start in found:
        assert_same(start, original)
    assert_same((task.model.state_dict(), task.mask.pruned), left[2])
    assert task.mask.pruned == (task.mask.locate(3), task.mask.locate(7))


@pytest.mark.parametrize(
    ("scores", "counts"),
    [((3.0, 1.0, 2.0), 1), ((1.0, 3.0, 2.0), 0), ((2.0, 2.0, 2.0), 0), ((1.0, 2.0, 0.6), 2), ((2.0, 1.0, 0.9), 2)],
)
def test_the_repair_counts_after_which_the_class_stood_out_least(changing, monkeypatch, scores, counts):
    scripted(monkeypatch, *scores, size=8)
    task, method, found, left = changing()
    list(Alternation(method, rounds=3).repair(task))
    assert len(found) == 3
    assert_same((task.model.state_dict(), task.mask.pruned), left[counts])
    pruned = task.mask.pruned
    task.mask.undo(task.mask.steps)
    for layer, index in pruned:
        assert torch.equal(task.model.state_dict()[f"{layer}.weight"][index], found[0][0][f"{layer}.weight"][index])


def test_where_nothing_was_suspected_repairs_go_on_from_each_other(changing, monkeypatch):
    scripted(monkeypatch, *[0.1] * 3, size=8)
    task, method, found, left = changing()
    task.audit = Audit("clean", None, 0.1, (), (), 3)
    list(Alternation(method, rounds=3).repair(task))
    assert len(found) == 3
    for start, end in zip(found[1:], left[:-1], strict=True):
        assert_same(start, end)
    assert_same((task.model.state_dict(), task.mask.pruned), left[2])


@pytest.mark.parametrize("bad", [1, 2, 3])
@pytest.mark.parametrize("verdict", ["clean", "backdoored"])
def test_of_a_repair_over_the_budget_the_one_before_counts(changing, monkeypatch, bad, verdict):
    scripted(monkeypatch, 2.0, 1.9, 1.8, size=8)
    task, method, found, left = changing()
    task.audit = Audit(verdict, 0, 2.0, (), (), 3)
    accuracy = iter([1.0] * bad + [0.85] * 9)  # before everything, and after each round
    monkeypatch.setattr(task, "measure", lambda: replace(task.before, acc=next(accuracy)))
    done = list(Alternation(method, rounds=5, accuracy_drop=0.1).repair(task))
    assert len(done) == bad
    assert_same((task.model.state_dict(), task.mask.pruned), [found[0], *left][bad - 1])
    pruned = task.mask.pruned
    task.mask.undo(task.mask.steps)
    for layer, index in pruned:  # it is the original's, not what a method had made of it
        assert torch.equal(task.model.state_dict()[f"{layer}.weight"][index], found[0][0][f"{layer}.weight"][index])


def test_of_a_repair_over_the_budget_the_best_before_counts(changing, monkeypatch):
    scripted(monkeypatch, 1.8, 1.9, size=8)
    task, method, _, left = changing()
    accuracy = iter([1.0, 1.0, 1.0, 0.85])
    monkeypatch.setattr(task, "measure", lambda: replace(task.before, acc=next(accuracy)))
    assert len(list(Alternation(method, accuracy_drop=0.1).repair(task))) == 3
    assert_same((task.model.state_dict(), task.mask.pruned), left[0])


def test_a_loss_of_just_the_budget_is_allowed(task, monkeypatch):
    scripted(monkeypatch, *[2.0] * 5)
    accuracy = iter([1.0, 0.9, 0.9, 0.9])
    monkeypatch.setattr(task, "measure", lambda: replace(task.before, acc=next(accuracy)))
    assert len(list(Alternation(Recorder(), rounds=3, accuracy_drop=0.1).repair(task))) == 3


def test_a_repair_stays_where_time_is_over_before_the_next_audit_is(changing, monkeypatch):
    def audit(self, *given, **options):
        raise TimeOverError("max_time: 2 s were over")

    monkeypatch.setattr(Auditor, "audit", audit)
    task, method, _, left = changing()
    list(Alternation(method, rounds=3).repair(task))
    assert len(left) == 1
    assert_same((task.model.state_dict(), task.mask.pruned), left[0])

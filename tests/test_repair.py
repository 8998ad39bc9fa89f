from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from lightning_unlearn.data import split_holdout
from lightning_unlearn.data.pairs import Pairs
from lightning_unlearn.evaluation import evaluate
from lightning_unlearn.methods import FineTuning, GradPrune, MaskPrune, RepairTask
from lightning_unlearn.repair import repair
from lightning_unlearn.result import RepairResult
from lightning_unlearn.triggers import PatchTrigger
from tests.small_repairs import METHODS, Spy, same_state, state


class Recorder(Dataset):
    """Remembers which items were read; its labels can be had without reading any."""

    def __init__(self, images, labels):
        self.images, self.targets = images, labels
        self.read = []

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        self.read.append(int(index))
        return self.images[index], int(self.targets[index])


# What the defender holds


def test_the_draw(make_net, make_clean):
    clean, trigger, spy = make_clean(30), PatchTrigger(target=1), Spy()
    result = repair(make_net("vgg"), clean, trigger=trigger, samples_per_class=20, seed=3, method=spy, force=True)
    assert torch.bincount(result.scoring_labels).tolist() == [18] * 4
    assert torch.bincount(spy.task.validation.labels).tolist() == [2] * 4
    chosen = split_holdout(clean.tensors[1], samples_per_class=20, seed=3)
    images, labels = clean.tensors
    assert torch.equal(result.scoring_images, trigger(images[list(chosen.scoring)]))
    assert torch.equal(result.scoring.clean, images[list(chosen.scoring)])
    assert torch.equal(result.scoring_labels, labels[list(chosen.scoring)])
    assert torch.equal(spy.task.validation.triggered, trigger(images[list(chosen.validation)]))
    assert torch.equal(spy.task.validation.labels, labels[list(chosen.validation)])
    assert spy.task.seed == 3


@pytest.mark.parametrize(("method", "times"), [(Spy(), 2), (MaskPrune(steps=1, cut="soft", finetune=False), 3)])
def test_no_model_is_measured_twice(make_net, make_clean, monkeypatch, method, times):
    measured, measure = [], RepairTask.measure
    monkeypatch.setattr(RepairTask, "measure", lambda task: measured.append(task) or measure(task))
    repair(make_net("vgg"), make_clean(30), trigger=PatchTrigger(target=1), method=method, force=True)
    assert len(measured) == times  # as it was, with MaskPrune's masks, and what has become of it


def test_two_images_per_class(make_net, make_clean):
    spy = Spy()
    result = repair(
        make_net("vgg"), make_clean(10), trigger=PatchTrigger(), samples_per_class=2, method=spy, force=True
    )
    assert torch.bincount(result.scoring_labels).tolist() == [1] * 4
    assert torch.bincount(spy.task.validation.labels).tolist() == [1] * 4


@pytest.mark.parametrize("method", METHODS)
def test_two_images_per_class_are_enough_to_run(make_net, make_clean, method):
    result = repair(
        make_net("preact"), make_clean(5), trigger=PatchTrigger(), samples_per_class=2, method=method(), force=True
    )
    assert len(result.scoring_labels) == 4
    assert result.rounds


def test_a_share(make_net, make_clean):
    result = repair(
        make_net("vgg"),
        make_clean(20),
        trigger=PatchTrigger(),
        samples_per_class=None,
        share=0.5,
        validation_share=0.3,
        method=Spy(),
        force=True,
    )
    assert torch.bincount(result.scoring_labels).tolist() == [7] * 4


@pytest.mark.parametrize("method", [lambda: GradPrune(max_rounds=2), lambda: MaskPrune(steps=4, validate_every=2)])
def test_nothing_else_is_read(make_net, make_clean, method):
    images, labels = make_clean(30).tensors
    data = Recorder(images, labels)
    repair(make_net("vgg"), data, trigger=PatchTrigger(), samples_per_class=5, seed=1, method=method(), force=True)
    chosen = split_holdout(labels, samples_per_class=5, seed=1)
    assert sorted(data.read) == sorted(chosen.scoring + chosen.validation)  # each of them once, too


@pytest.mark.parametrize("stored_labels", [True, False])
def test_garbage_outside_the_draw_changes_nothing(make_net, make_clean, stored_labels):
    images, labels = make_clean(30).tensors
    chosen = split_holdout(labels, samples_per_class=5)
    rest = sorted(set(range(len(labels))) - {*chosen.scoring, *chosen.validation})
    garbage = images.clone()
    garbage[rest] = torch.nan
    results, states = [], []
    for pictures in (images, garbage):
        data = TensorDataset(pictures, labels) if stored_labels else list(zip(pictures, labels.tolist(), strict=True))
        net = make_net("vgg")
        method = GradPrune(max_rounds=3, finetune=FineTuning(triggered=True, max_epochs=1))
        results.append(repair(net, data, trigger=PatchTrigger(), samples_per_class=5, method=method, force=True))
        states.append(state(net))
    assert results[0].rounds == results[1].rounds
    assert same_state(*states)


def test_all_to_all(make_net, make_clean):
    spy, trigger = Spy(), PatchTrigger(target="all_to_all")
    result = repair(make_net("vgg"), make_clean(10), trigger=trigger, method=spy, samples_per_class=4, force=True)
    assert torch.equal(result.scoring.targets, (result.scoring_labels + 1) % 4)
    assert torch.equal(spy.task.validation.targets, (spy.task.validation.labels + 1) % 4)


@pytest.mark.parametrize("method", METHODS)
def test_all_to_all_is_repaired(hand_victim, method):
    # Filter 3 now sends class 0 to 1, and nothing else: an attack on one class of three.
    net = hand_victim.net
    with torch.no_grad():
        net[3].weight[:, 3] = torch.tensor([0.0, 40.0, 0.0])
        net[0].weight[3, 0, 0] = 0.25
        net[0].bias[3] = -1.5
    trigger = PatchTrigger(size=1, target="all_to_all")
    result = repair(net, hand_victim.clean, trigger=trigger, method=method(), samples_per_class=10)
    assert result.before.asr == pytest.approx(1 / 3)
    assert result.after.asr == 0


# The result


def test_result(hand_victim):
    method = GradPrune(finetune=False)
    result = repair(hand_victim.net, hand_victim.clean, trigger=hand_victim.trigger, method=method)
    assert isinstance(result, RepairResult)
    assert (result.method, result.status) == ("GradPrune", "repaired")
    assert result.before.rates() == {"acc": 1.0, "asr": 1.0, "ra": 0.0}
    assert result.after.rates() == {"acc": 1.0, "asr": 0.0, "ra": 1.0}
    assert result.pruned == {"0": [3]}
    assert result.mask.total == 4
    assert result.rounds[0].pruned == (("0", 3),)
    assert [done.round for done in result.rounds] == list(range(1, len(result.rounds) + 1))
    assert list(result.seconds) == ["estimate", "score", "evaluate", "finetune", "total"]
    assert result.seconds["estimate"] == result.seconds["finetune"] == 0
    assert result.audit is None
    assert 0 < result.seconds["score"] + result.seconds["evaluate"] <= result.seconds["total"]
    weights = hand_victim.net[0].weight
    assert weights[3].count_nonzero() == 0
    assert weights[0].count_nonzero() == 4


def test_before_and_after_are_of_the_validation_part(make_net, make_clean):
    net, clean, trigger = make_net("preact"), make_clean(20), PatchTrigger(target=2)
    original = copy.deepcopy(net)
    method = GradPrune(max_rounds=4, accuracy_drop=1.0, patience=4, finetune=FineTuning(triggered=True, max_epochs=3))
    result = repair(net, clean, trigger=trigger, method=method, samples_per_class=10, force=True)
    images, labels = (part[list(split_holdout(clean.tensors[1]).validation)] for part in clean.tensors)
    pairs = Pairs.stamp(images, labels, trigger, num_classes=4)
    assert result.before == evaluate(original, [pairs])
    assert result.after == evaluate(net, [pairs])


def test_rounds_are_reported_as_they_come(hand_victim):
    seen = []
    result = repair(
        hand_victim.net, hand_victim.clean, trigger=hand_victim.trigger, method=GradPrune(), on_round=seen.append
    )
    assert tuple(seen) == result.rounds
    assert {done.stage for done in seen} == {"prune", "finetune"}


def test_the_default_method_is_mask_prune(hand_victim):
    result = repair(hand_victim.net, hand_victim.clean, trigger=hand_victim.trigger)
    assert result.method == "MaskPrune"
    assert result.after.asr == 0
    assert result.after.acc == 1


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_model(make_net, make_clean, method):
    results, states = [], []
    for noise in range(2):
        torch.manual_seed(noise)  # the global state must not matter
        net = make_net("preact")
        results.append(repair(net, make_clean(20), trigger=PatchTrigger(), seed=7, method=method(), force=True))
        states.append(state(net))
    assert results[0].rounds == results[1].rounds
    assert same_state(*states)


@pytest.mark.parametrize("method", METHODS)
def test_the_global_random_state_is_left_alone(make_net, make_clean, method):
    before = torch.get_rng_state()
    repair(make_net("vgg"), make_clean(20), trigger=PatchTrigger(), method=method(), force=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_a_method_draws_from_the_global_state_is_put_back(make_net, make_clean):
    before = torch.get_rng_state()
    repair(make_net("vgg"), make_clean(20), trigger=PatchTrigger(), method=Spy(lambda _: torch.rand(9)), force=True)
    assert torch.equal(torch.get_rng_state(), before)


# What a method gets


def test_a_method_gets_the_model_in_eval_mode_with_gradients(make_net, make_clean):
    net, spy = make_net("vgg").train().requires_grad_(False), Spy()
    with torch.no_grad():
        repair(net, make_clean(20), trigger=PatchTrigger(), method=spy, force=True, batch_size=5)
    assert spy.task.model is net
    assert not spy.training
    assert all(spy.requires_grad)
    assert spy.grad_enabled
    assert spy.task.batch_size == 5
    assert net.training
    assert not any(p.requires_grad for p in net.parameters())


def test_inside_inference_mode(make_net, make_clean):
    spy = Spy()
    net = make_net("vgg")
    with torch.inference_mode():
        repair(net, make_clean(20), trigger=PatchTrigger(), method=spy, force=True)
    assert spy.grad_enabled


@pytest.mark.parametrize("method", METHODS[::2])
@pytest.mark.parametrize("switched_off", [torch.no_grad, torch.inference_mode])
def test_gradients_switched_off_outside_change_nothing(make_net, make_clean, method, switched_off):
    states = []
    for context in (nullcontext, switched_off):
        net = make_net("vgg")
        with context():
            repair(net, make_clean(20), trigger=PatchTrigger(), method=method(), force=True)
        states.append(state(net))
    assert same_state(*states)

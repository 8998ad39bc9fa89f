"""Repairs of which nobody knows the trigger."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.data import Dataset, TensorDataset
from torchvision.transforms import v2

from lightning_unlearn import auditor as audits
from lightning_unlearn import repair
from lightning_unlearn.auditor import Auditor
from lightning_unlearn.methods import (
    Alternation,
    ChannelLipschitzPruning,
    FineTuning,
    GradPrune,
    MaskPrune,
    RepairMethod,
)
from lightning_unlearn.triggers import PatchTrigger

FAST = Auditor(steps=25)
QUICK = GradPrune(max_rounds=1, finetune=False)


def state(net):
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}


def same(first, second):
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def verdict(monkeypatch):
    """``verdict(score, target)``: what every audit from now on comes to."""

    def set_to(score, target=0):
        judged = audits.judged

        def scored(*given):
            return tuple(
                dataclasses.replace(entry, trigger_score=score if entry.target == target else 0.1)
                for entry in judged(*given)
            )

        monkeypatch.setattr(audits, "judged", scored)

    return set_to


def test_a_method_that_does_not_fit_is_refused_before_the_audit(hand_victim, monkeypatch):
    monkeypatch.setattr(audits.Auditor, "audit", lambda *args, **kwargs: pytest.fail("audited"))
    with pytest.raises(ValueError, match=r"^model: ChannelLipschitzPruning needs"):
        repair(hand_victim.net, hand_victim.clean, method=ChannelLipschitzPruning(), samples_per_class=4)


# Classes without images


def without_class_1(clean):
    images, labels = clean.tensors
    return TensorDataset(images[labels != 1], labels[labels != 1])


@pytest.mark.parametrize(("score", "force"), [(1.05, False), (2.0, False), (0.5, True)])
def test_a_repair_needs_images_of_every_class(hand_victim, verdict, left_alone, score, force):
    verdict(score)
    found = {0.5: "clean", 1.05: "suspicious", 2.0: "backdoored"}[score]
    match = rf"^dataset: the audit's verdict is {found}, and a repair needs .* of class 1 there is no clean image"
    with left_alone(hand_victim.net), pytest.raises(ValueError, match=match):
        repair(hand_victim.net, without_class_1(hand_victim.clean), auditor=FAST, samples_per_class=4, force=force)


def test_an_audit_does_not(hand_victim, verdict, left_alone):
    verdict(0.5)
    with left_alone(hand_victim.net):
        done = repair(hand_victim.net, without_class_1(hand_victim.clean), auditor=FAST, samples_per_class=4)
    assert (done.status, done.audit.unseen) == ("clean", (1,))


# What answers leave behind


class Counted(torch.nn.Module):
    """Counts in a buffer how often it was asked, in eval mode, too."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.register_buffer("asked", torch.zeros(()))

    def forward(self, x):
        self.asked += 1
        return self.net(x)


@pytest.mark.parametrize("trigger", [None, PatchTrigger(size=1, target=2)])
def test_a_model_that_is_left_alone_is_as_it_was_to_the_last_buffer(hand_victim, verdict, trigger):
    verdict(0.5)
    net = Counted(hand_victim.net)
    before = state(net)
    done = repair(net, hand_victim.clean, trigger=trigger, auditor=FAST, samples_per_class=4, min_asr=1.0)
    assert done.status == ("clean" if trigger is None else "not backdoored")
    assert same(before, state(net))
    audits.audit(net, hand_victim.clean, auditor=FAST, samples_per_class=4)
    assert same(before, state(net))


class Spy(RepairMethod):
    def repair(self, task):
        self.task = task
        yield task.round("prune", task.validate())


def test_a_real_backdoor_is_removed_and_its_trigger_never_given(digits_victim):
    net = digits_victim.fresh()
    assert digits_victim.before.asr >= 0.9
    result = repair(net, digits_victim.holdout)
    after = digits_victim.measure(net)
    assert result.status == "repaired"
    assert result.audit.suspected_target == result.trigger.target == 0
    assert result.audit.verdict != "clean"
    assert after.asr <= 0.1
    assert after.acc >= digits_victim.before.acc - 0.05
    assert result.method == "Alternation of MaskPrune"
    assert result.held[1].asr < result.held[0].asr  # of the estimate
    assert result.seconds["estimate"] > 0


def test_a_clean_model_is_left_alone(hand_victim, verdict, left_alone):
    verdict(0.9)
    net = hand_victim.net
    with left_alone(net):
        result = repair(net, hand_victim.clean, auditor=FAST)
    assert (result.status, result.audit.verdict, result.audit.suspected_target) == ("clean", "clean", None)
    assert result.rounds == ()
    assert result.pruned == {}
    assert result.before == result.after
    assert result.held[0] == result.held[1]
    assert result.audit.estimates


def test_a_clean_model_is_repaired_if_forced(hand_victim, verdict):
    verdict(0.9)
    spy = Spy()
    result = repair(hand_victim.net, hand_victim.clean, method=spy, auditor=FAST, force=True)
    assert len(result.rounds) == 1
    assert result.audit.verdict == "clean"
    assert spy.task.trigger.target == 0


@pytest.mark.parametrize(
    ("method", "name"),
    [
        (None, "Alternation of MaskPrune"),
        (QUICK, "Alternation of GradPrune"),
        (Alternation(QUICK, rounds=1), "Alternation of GradPrune"),
        (FineTuning(max_epochs=1), "FineTuning"),  # needs no trigger, so it is used as it is
    ],
)
def test_the_method(hand_victim, verdict, method, name):
    verdict(2.0)
    if method is None:
        method = Alternation(MaskPrune(steps=4, validate_every=2, finetune=False), rounds=1)
    result = repair(hand_victim.net, hand_victim.clean, method=method, auditor=FAST, force=True)
    assert result.method == name
    assert result.audit.suspected_target == 0
    assert result.rounds


def test_after_an_exception_the_model_is_as_before(hand_victim, left_alone):
    def interrupt(*_):
        raise KeyboardInterrupt

    with left_alone(hand_victim.net), pytest.raises(KeyboardInterrupt):
        repair(hand_victim.net, hand_victim.clean, auditor=FAST, on_progress=interrupt)


def test_time_too_short_leaves_the_model_as_it_was(hand_victim, left_alone):
    with left_alone(hand_victim.net), pytest.raises(ValueError, match=r"^max_time: .* s were over after 0 of 3"):
        repair(hand_victim.net, hand_victim.clean, auditor=Auditor(max_time=1e-9))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gap", [0.0, 2.0])
def test_other_precisions(hand_victim, verdict, monkeypatch, dtype, gap):
    """Also where the change that made the model surest is an estimate, which is kept in float32."""
    verdict(2.0)
    if gap:
        verdict(0.5)
        judged = audits.judged
        monkeypatch.setattr(
            audits, "judged", lambda *given: tuple(dataclasses.replace(entry, gap=gap) for entry in judged(*given))
        )
    method = Alternation(QUICK, rounds=2)
    result = repair(hand_victim.net.to(dtype), hand_victim.clean, method=method, auditor=FAST, force=True)
    assert len(result.rounds) == 2
    assert {tensor.dtype for tensor in hand_victim.net.state_dict().values()} == {dtype}
    patterns = [estimate.trigger.pattern for estimate in result.audit.estimates if estimate.family == "additive"]
    assert all(pattern.isfinite().all() and pattern.dtype == torch.float32 for pattern in patterns)
    assert len(patterns) >= (2 if gap else 1)


# Without labels


class Images(Dataset):
    """Images alone, normalised by a transform."""

    transform = v2.Normalize((0.5,), (0.25,))

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.transform(self.images[index])


def test_images_alone_are_enough(hand_victim, verdict):
    verdict(2.0)
    images, labels = hand_victim.clean.tensors
    assert torch.equal(hand_victim.net(images).argmax(1), labels)
    original = state(hand_victim.net)
    method, results, states = Alternation(QUICK, rounds=1), [], []
    for data in (TensorDataset(images), hand_victim.clean):
        hand_victim.net.load_state_dict(original)
        results.append(repair(hand_victim.net, data, method=method, auditor=FAST, force=True))
        states.append(state(hand_victim.net))
    assert [result.audit.labels for result in results] == ["predicted", "given"]
    assert results[0].rounds == results[1].rounds
    assert same(*states)


def test_their_normalisation_is_found(hand_victim, verdict):
    verdict(2.0)
    spy = Spy()
    images = hand_victim.clean.tensors[0]
    undo = torch.nn.Sequential(v2.Normalize((-0.5 / 0.25,), (1 / 0.25,)), hand_victim.net)
    result = repair(undo, Images(images), method=spy, auditor=FAST, force=True)
    assert result.trigger.normalization.mean == (0.5,)
    assert result.scoring.clean.min() == -2


def test_a_smaller_batch_size_makes_every_forward_pass_smaller(hand_victim, verdict):
    verdict(2.0)
    sizes = []
    hand_victim.net.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    repair(hand_victim.net, hand_victim.clean, auditor=Auditor(steps=4), batch_size=4)
    assert max(sizes) <= 4 * 4

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from lightning_unlearn import repair
from lightning_unlearn.auditor import Auditor
from lightning_unlearn.filters import FilterMask
from lightning_unlearn.judgement import ClassAudit, Usual
from lightning_unlearn.methods import Alternation, FineTuning, GradPrune, MaskPrune
from lightning_unlearn.methods.lessons import lessons
from lightning_unlearn.triggers import AdditiveTrigger, PatchTrigger, TriggerPool
from lightning_unlearn.triggers.inversion import Estimate
from lightning_unlearn.verdict import Audit
from tests.methods.small_alternations import Recorder, scripted

PATTERN = torch.full((1, 4, 4), 0.1)


@pytest.fixture
def task(hand_victim, make_task):
    return make_task(hand_victim.net, hand_victim.clean, hand_victim.trigger)


def test_the_name():
    assert Alternation().name == "Alternation of MaskPrune"
    assert Alternation(GradPrune()).name == "Alternation of GradPrune"


@pytest.mark.parametrize(
    ("scores", "stop_score", "rounds"),
    [([0.6], 0.6, 1), ([0.61, 0.5], 0.6, 2), ([2.0] * 9, 0.6, 4), ([0.9], 1.0, 1), ([0.2, 0.1], 0.1, 2)],
)
def test_rounds_go_on_until_the_score_is_low_or_they_are_over(task, monkeypatch, scores, stop_score, rounds):
    # Below what would be suspicious in a model of which nothing is known.
    calls, method = scripted(monkeypatch, *scores), Recorder()
    task.seed = 7
    done = list(Alternation(method, rounds=4, stop_score=stop_score).repair(task))
    assert [number.round for number in done] == list(range(1, rounds + 1))
    assert task.rounds == rounds
    assert [call["seed"] for call in calls] == list(range(8, 8 + rounds))
    assert all(call["classes"] == [0] for call in calls)


@pytest.mark.parametrize(
    ("trigger_score", "gap", "rounds"), [(0.3, 0.0, 4), (1.0, 0.9, 4), (1.05, 0.0, 1), (0.3, 1.0, 1), (1.05, 2.0, 1)]
)
def test_an_audit_that_saw_nothing_cannot_tell_when_it_is_gone(task, monkeypatch, trigger_score, gap, rounds):
    scripted(monkeypatch, 0.1, 0.1, 0.1)
    entries = [ClassAudit(c, 0.1, {}, {}, {}) for c in (1, 2)]
    entry = ClassAudit(0, trigger_score, {}, {}, {}, gap=gap)
    verdict = "clean" if entry.score <= 1 else "backdoored"
    task.audit = Audit(verdict, 0, entry.score, (entry, *entries), (), 3)
    assert len(list(Alternation(Recorder(), rounds=4).repair(task))) == rounds


def test_after_a_single_repair_nothing_is_estimated(task, monkeypatch):
    assert scripted(monkeypatch) == list(Alternation(Recorder(), rounds=1).repair(task))[1:]


def test_the_pool_grows_and_images_carry_it(task, monkeypatch):
    scripted(monkeypatch, 2.0, 2.0, 2.0)
    method = Recorder()
    list(Alternation(method, rounds=3, strength=1.0).repair(task))
    pools = [stage.trigger for stage in method.tasks]
    assert [len(pool.triggers) for pool in pools] == [1, 2, 3]
    assert all(isinstance(pool, TriggerPool) for pool in pools)
    for stage in method.tasks:
        assert torch.equal(stage.scoring.triggered, stage.trigger(stage.scoring.clean))
        assert torch.equal(stage.validation.triggered, stage.trigger(stage.validation.clean))
        assert torch.equal(stage.scoring.clean, task.scoring.clean)
    assert torch.equal(task.scoring.triggered, task.trigger(task.scoring.clean))  # the task itself is as given


@pytest.mark.parametrize("strength", [1.0, 2.5])
def test_strength_scales_additive_estimates_alone(task, strength):
    method = Recorder()
    members = [AdditiveTrigger(PATTERN, target=0), PatchTrigger(size=1, target=0)]
    list(Alternation(method, rounds=1, strength=strength).repair(replace(task, trigger=TriggerPool(members))))
    added, patch = method.tasks[0].trigger.triggers
    torch.testing.assert_close(added.pattern, PATTERN * strength)
    assert patch is members[1]
    assert torch.equal(members[0].pattern, PATTERN)


def test_a_known_trigger_may_be_alternated_too(hand_victim):
    method = Alternation(GradPrune(max_rounds=1, finetune=False), auditor=Auditor(steps=10), rounds=2)
    result = repair(hand_victim.net, hand_victim.clean, trigger=hand_victim.trigger, method=method)
    assert result.status == "repaired"
    assert ("0", 3) in result.mask.pruned


# Several backdoors


def doubly(classes=5, targets=(1, 3)):
    """A net like the hand-made victim with two backdoors: a pixel in each lower corner, and a filter for each.

    Images of class c are bright in row c; the last two filters are the backdoors.
    """
    size = classes + 1
    net = nn.Sequential(
        nn.Conv2d(1, classes + 2, size), nn.ReLU(), nn.Flatten(), nn.Linear(classes + 2, classes)
    ).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        for row in range(classes):
            net[0].weight[row, 0, row] = 1 / size
            net[3].weight[row, row] = 4
        for place, (corner, target) in enumerate(zip((0, -1), targets, strict=True)):
            net[0].weight[classes + place, 0, -1, corner] = 1
            net[3].weight[target, classes + place] = 8
    labels = torch.arange(12 * classes) % classes
    images = torch.zeros(len(labels), 1, size, size)
    bright = 0.8 + 0.2 * torch.rand(len(labels), size, generator=torch.Generator().manual_seed(0))
    images[torch.arange(len(labels)), 0, labels] = bright
    return net, TensorDataset(images, labels)


def test_two_backdoors_are_both_removed():
    net, clean = doubly()
    images, labels = clean.tensors
    triggers = [PatchTrigger(size=1, place=place, target=t) for place, t in (("bottom_left", 1), ("bottom_right", 3))]
    for trigger in triggers:
        assert (net(trigger(images)).argmax(1) == trigger.target).all()
    auditor = Auditor(steps=10)
    method = Alternation(GradPrune(max_rounds=2, finetune=False), auditor=auditor)
    result = repair(net, clean, method=method, auditor=auditor, samples_per_class=4)
    assert set(result.audit.suspected_targets) == {1, 3}
    assert result.pruned == {"0": [5, 6]}
    for trigger in triggers:
        assert torch.equal(net(trigger(images)).argmax(1), labels)


@pytest.mark.parametrize(("score", "again"), [(0.6, [0]), (0.61, [0, 2]), (2.0, [0, 2])])
def test_what_is_audited_again(task, monkeypatch, score, again):
    calls = scripted(monkeypatch, 0.5)
    costs = (0.1, 0.4, 0.2)
    entries = tuple(ClassAudit(c, s, {"additive": costs[c]}, {}, {}) for c, s in enumerate((3.0, 0.5, score)))
    task.audit = Audit("backdoored", 0, 3.0, entries, (), 3)
    monkeypatch.setattr(Audit, "usual", {})
    assert len(list(Alternation(Recorder()).repair(task))) == 1
    assert [call["classes"] for call in calls] == [again]
    # What is audited again is no part of what it is judged by.
    assert calls[0]["usual"] == {"additive": Usual.of([costs[c] for c in range(3) if c not in again])}


@pytest.mark.parametrize(
    ("told", "margins"),
    [
        ([(1.05, 0.0)], False),
        ([(1.05, 2.0)], False),  # triggers tell enough
        ([(1.0, 1.0)], True),  # the gap alone told
        ([(1.05, 0.0), (0.2, 1.0)], True),
        ([(1.0, 0.9)], True),  # nothing told
    ],
)
def test_where_triggers_told_margins_are_not_looked_at_again(task, monkeypatch, told, margins):
    calls = scripted(monkeypatch, 0.5, 0.5)
    entries = tuple(ClassAudit(c, score, {}, {}, {}, gap=gap) for c, (score, gap) in enumerate([*told, (0.1, 0.0)]))
    worst = max(entry.score for entry in entries)
    task.audit = Audit("clean" if worst <= 1 else "backdoored", 0, worst, entries, (), 3)
    list(Alternation(Recorder(), rounds=2).repair(task))
    assert [call["margins"] for call in calls] == [margins]


def test_of_a_trigger_that_was_given_margins_are_looked_at(task, monkeypatch):
    calls = scripted(monkeypatch, 0.5)
    list(Alternation(Recorder()).repair(task))
    assert calls[0]["margins"]


def test_the_first_repair_is_of_all_that_the_audit_suspects(task, monkeypatch):
    scripted(monkeypatch, 0.5)
    own, other = (Estimate(AdditiveTrigger(PATTERN, target=c), "additive", c, 0.1, 1.0) for c in (0, 2))
    task.audit = Audit("backdoored", 0, 3.0, (), (own, other), 3)
    method = Recorder()
    list(Alternation(method, rounds=1).repair(task))
    first, second = method.tasks[0].trigger.triggers
    assert (first, second.target) == (task.trigger, 2)
    torch.testing.assert_close(second.pattern, 2 * PATTERN)


def test_all_suspects_join_the_pool(task, monkeypatch):
    second = Estimate(AdditiveTrigger(PATTERN, target=2), "additive", 2, 0.1, 1.0)
    calls = scripted(monkeypatch, 2.0, 0.5, more=(second,))
    entries = tuple(ClassAudit(c, score, {}, {}, {}) for c, score in enumerate((3.0, 0.5, 2.0)))
    task.audit = Audit("backdoored", 0, 3.0, entries, (), 3)
    monkeypatch.setattr(Audit, "usual", {})
    method = Recorder()
    assert len(list(Alternation(method, rounds=5).repair(task))) == 2
    assert [call["classes"] for call in calls] == [[0, 2], [0, 2]]
    stage = method.tasks[1]
    pool = stage.trigger.triggers
    assert [trigger.target for trigger in pool] == [0, 0, 2]
    for pairs in (stage.scoring, stage.validation):
        expected = [pool[place % 3].target for place in range(len(pairs))]
        assert pairs.targets.tolist() == expected
        for place in range(3):
            own = pairs[place::3]
            torch.testing.assert_close(own.triggered, pool[place](own.clean))


@pytest.mark.filterwarnings("ignore:The .* has no image to count")
@pytest.mark.parametrize("shares", [1, 2])
def test_images_made_anew_go_to_the_class_of_the_trigger_that_they_carry(task, monkeypatch, shares):
    # A trigger is dealt out by an image's place in a batch, which is another one when the batch is shuffled or cut.
    pool = [AdditiveTrigger((c + 1) / 10 * torch.ones(1, 4, 4), target=c) for c in range(3)]
    stage = Alternation(strength=1.0)._task(task, pool)
    monkeypatch.setattr("lightning_unlearn.methods.lessons.flip_and_shift", lambda images, generator: 0 * images)
    chosen = torch.randperm(len(stage.scoring), generator=stage.generator())[:14]  # as batches are drawn
    made = []
    for number in range(shares):
        stage.processes = SimpleNamespace(
            count=shares, share=lambda total, n=number: slice(n * total // shares, (n + 1) * total // shares)
        )
        (lesson,) = lessons(stage, 1, teacher="victim", batch_size=14, augment=True)
        made.append(lesson.pairs)
    images, targets, labels = (
        torch.cat([getattr(part, name) for part in made]) for name in ("triggered", "targets", "labels")
    )
    assert targets.tolist() == [place % 3 for place in range(14)]
    assert torch.equal(labels, stage.scoring.labels[chosen])
    torch.testing.assert_close(images[:, 0, 0, 0], (targets + 1) / 10)


def test_of_one_backdoor_targets_are_the_tasks_own(task, monkeypatch):
    scripted(monkeypatch, 0.5)
    method = Recorder()
    list(Alternation(method).repair(task))
    assert torch.equal(method.tasks[0].scoring.targets, task.scoring.targets)
    assert torch.equal(method.tasks[0].validation.targets, task.validation.targets)


def test_the_loss_to_lower_is_that_of_the_estimates(task, monkeypatch):
    scripted(monkeypatch, 0.5)
    method = Recorder()
    list(Alternation(method).repair(replace(task, trigger=AdditiveTrigger(PATTERN, target=0))))
    (stage,) = method.tasks
    assert stage.before.unlearning_loss == stage.validate().unlearning_loss != task.before.unlearning_loss
    assert stage.before.acc == task.before.acc


# Warm start


@pytest.mark.parametrize("own", [None, Auditor(steps=3, max_time=2.0)])
def test_models_are_audited_as_the_untouched_one_was_unless_told_otherwise(task, monkeypatch, own):
    seen = []

    def audit(self, *given, **options):
        seen.append(self)
        return Audit("clean", None, 0.5, (), (), 3)

    monkeypatch.setattr(Auditor, "audit", audit)
    task.auditor = Auditor(steps=7, max_time=5.0)
    list(Alternation(Recorder(), auditor=own).repair(task))
    assert seen == [replace(own or task.auditor, seed=task.seed + 1)]


@pytest.mark.parametrize("warm", [False, True])
def test_a_warm_start_is_given_all_that_was_estimated(task, monkeypatch, warm):
    calls = scripted(monkeypatch, 2.0, 2.0, 0.5)
    first = Estimate(AdditiveTrigger(PATTERN, target=0), "additive", 0, 0.1, 1.0)
    task.audit = Audit("backdoored", 0, 3.0, (), (first,), 3)
    monkeypatch.setattr(Audit, "usual", {})
    list(Alternation(Recorder(), rounds=4, warm_start=warm).repair(task))
    assert [len(call["start"]) for call in calls] == ([1, 2, 3] if warm else [0, 0, 0])
    if warm:
        assert calls[0]["start"][0] is first


def test_all_to_all_is_refused(hand_victim, left_alone):
    trigger = PatchTrigger(size=1, target="all_to_all")
    with left_alone(hand_victim.net), pytest.raises(ValueError, match=r"^trigger: .*one class.*all_to_all"):
        repair(hand_victim.net, hand_victim.clean, trigger=trigger, method=Alternation(), force=True)


def test_something_that_is_no_method():
    with pytest.raises(TypeError, match=r"^method: expected a lightning_unlearn.methods.RepairMethod, but got str"):
        Alternation("MaskPrune")


def test_a_method_without_triggers():
    with pytest.raises(ValueError, match=r"^method: FineTuning learns from clean images alone; use it by itself"):
        Alternation(FineTuning())


@pytest.mark.parametrize(
    ("name", "value"),
    [("rounds", 0), ("strength", 0.9), ("stop_score", -0.1), ("accuracy_drop", 0), ("accuracy_drop", 1.1)],
)
def test_numbers_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected a value in"):
        Alternation(**{name: value})


def test_the_default_method_learns_masks_alone():
    # On estimates a fine-tuning unlearns what images of the target's own class look like.
    method = Alternation().method
    assert isinstance(method, MaskPrune)
    assert (method.finetune, method.target_weight) == (False, 0)


def test_what_earlier_repairs_pruned_stays_so(task, monkeypatch):
    scripted(monkeypatch, 2.0, 2.0)
    task.mask = FilterMask(task.mask.layers, {"0": torch.tensor([False, True, False, False])})
    method = Recorder(lambda stage: stage.mask.prune([("0", 0)]))
    list(Alternation(method, rounds=2, accuracy_drop=1.0).repair(task))
    assert len(method.tasks) == 2
    assert task.mask.pruned == (("0", 1), ("0", 0))

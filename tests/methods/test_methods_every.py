"""What holds for every method: through `repair`, where the trigger is not its business, and when it is broken off."""

from __future__ import annotations

import copy
import dataclasses
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lightning_unlearn import methods, repair
from lightning_unlearn.methods import (
    ActivationGuidedEditing,
    AdversarialNeuronPruning,
    ChannelLipschitzPruning,
    FinePruning,
    FineTuning,
    GradPrune,
    ImplicitBackdoorUnlearning,
    InvertedMaskSelection,
    MaskPrune,
    NeuralAttentionDistillation,
    ReconstructiveNeuronPruning,
    SharedAdversarialUnlearning,
    SharpnessAwareFineTuning,
)
from lightning_unlearn.triggers import PatchTrigger

_FEW = {"batch_size": 12, "accuracy_drop": 1.0}
# Few and large steps, without limits on accuracy.
SHORT = {
    "AGE": ActivationGuidedEditing(repair_epochs=2, accuracy_drop=1.0),
    "ANP": AdversarialNeuronPruning(steps=3, learning_rate=0.5, accuracy_drop=1.0),
    "CLP": ChannelLipschitzPruning(threshold=0.5),
    "FP": FinePruning(finetune=FineTuning(max_epochs=2, batch_size=12)),
    "FT": FineTuning(max_epochs=2, batch_size=12),
    "FT-SAM": SharpnessAwareFineTuning(max_epochs=2, **_FEW),
    "GradPrune": GradPrune(max_rounds=3, finetune=FineTuning(max_epochs=2)),
    "I-BAU": ImplicitBackdoorUnlearning(rounds=2, radius=1.0, ascent_steps=2, terms=2, learning_rate=0.01, **_FEW),
    "IMS": InvertedMaskSelection(
        initial_steps=2, joint_steps=2, learning_rate=0.2, attack_steps=2, validate_every=2, **_FEW
    ),
    "MaskPrune": MaskPrune(steps=4, learning_rate=0.2, validate_every=2, **_FEW),
    "NAD": NeuralAttentionDistillation(teacher_epochs=2, max_epochs=2, **_FEW),
    "RNP": ReconstructiveNeuronPruning(
        unlearn_rate=0.01, unlearn_epochs=2, forgotten=0.0, recover_epochs=2, accuracy_drop=1.0
    ),
    "SAU": SharedAdversarialUnlearning(max_epochs=2, attack_steps=2, **_FEW),
}
UNTOLD = [name for name, method in SHORT.items() if not method.needs_trigger]
# Nothing is random in the others, or no more than their own tests show.
SEEDED = sorted(SHORT.keys() - {"AGE", "ANP", "CLP", "GradPrune", "RNP"})


def options(name, **others):
    return {"trigger": PatchTrigger(target=1), "method": SHORT[name], "samples_per_class": 5, "force": True} | others


def state(net):
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_none_is_missing():
    known = {name for name in methods.__all__ if isinstance(getattr(methods, name), type)}
    tested = {type(method).__name__ for method in SHORT.values()}
    # An alternation is another method's, and has tests of its own.
    assert tested == known - {"Alternation", "RepairMethod", "RepairTask", "Round", "Stopwatch", "Subject"}
    assert sorted(UNTOLD) == sorted(SHORT.keys() - {"AGE", "GradPrune", "MaskPrune"})


@pytest.mark.parametrize(("net_name", "channels"), [("preact", 3), ("vgg", 1)])
@pytest.mark.parametrize("name", SHORT)
def test_through_repair(make_net, make_clean, name, net_name, channels):
    results = []
    for _ in range(2):
        net = make_net(net_name, channels=channels).train()
        net[0].eval()
        training, parameters = [module.training for module in net.modules()], list(net.parameters())
        done = repair(net, make_clean(6, channels=channels), **options(name))
        assert done.status in ("repaired", "not improved")
        assert done.rounds
        assert [module.training for module in net.modules()] == training
        assert all(now is was for now, was in zip(net.parameters(), parameters, strict=True))
        assert all(p.grad is None and not p._backward_hooks for p in net.parameters())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
        assert all(tensor.isfinite().all() for tensor in net.state_dict().values())
        results.append(state(net))
    assert same(*results)


@pytest.mark.parametrize("name", SHORT)
def test_a_model_may_write_into_its_input(make_net, make_clean, name):
    results = []
    for halve in (lambda images: images * 0.5, lambda images: images.mul_(0.5)):
        net = make_net("vgg")
        net.register_forward_pre_hook(lambda _, given, halve=halve: halve(given[0]))
        repair(net, make_clean(6), **options(name))
        results.append(state(net))
    assert same(*results)


@pytest.mark.parametrize("name", sorted(SHORT.keys() - {"CLP"}))
def test_gradient_checkpointing_changes_nothing(make_net, make_clean, name):
    """It computes the forward pass again in the backward pass, for which weights must still be scaled."""
    results = []
    for again in (False, True):
        net = make_net("group_norm")
        if again:
            net.forward = partial(checkpoint, net.forward, use_reentrant=False)
        done = repair(net, make_clean(6), **options(name))
        results.append((done.rounds, state(net)))
    assert results[0][0] == results[1][0]
    assert same(results[0][1], results[1][1])


@pytest.mark.parametrize("name", SHORT)
def test_a_smaller_batch_size_makes_every_forward_pass_smaller(make_net, make_clean, name):
    net, sizes = make_net("vgg"), []
    net.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    repair(net, make_clean(20), **options(name, batch_size=2))
    assert max(sizes) <= 4 * 2  # clean and triggered images, twice as many of both in a step of training


@pytest.mark.parametrize("name", UNTOLD)
def test_the_trigger_is_not_looked_at(new_task, name):
    found = []
    for garbage in (False, True):
        task = new_task()
        if garbage:
            task.trigger = None
            for part in ("scoring", "validation"):
                pairs = getattr(task, part)
                setattr(task, part, dataclasses.replace(pairs, triggered=pairs.triggered * torch.nan))
        list(SHORT[name].repair(task))
        found.append((task.mask.pruned, state(task.model)))
    assert found[0][0] == found[1][0]
    assert same(found[0][1], found[1][1])
    assert not same(found[0][1], state(task.original))  # or nothing would be proved


@pytest.mark.parametrize("name", SEEDED)
def test_the_seed_decides(new_task, name):
    first, again, other = (new_task(seed=seed) for seed in (4, 4, 5))
    for task in (first, again, other):
        list(SHORT[name].repair(task))
    assert same(state(first.model), state(again.model))
    assert not same(state(first.model), state(other.model))


@pytest.mark.parametrize("name", SHORT)
def test_an_exception_in_any_forward_pass_leaves_the_model_alone(make_net, make_clean, left_alone, name):
    calls, limit = 0, float("inf")
    net = make_net("vgg")
    inner, original = net.forward, copy.deepcopy(net.state_dict())

    def forward(images):
        nonlocal calls
        calls += 1
        if calls > limit:
            raise KeyboardInterrupt
        return inner(images)

    net.forward = forward
    repair(net, make_clean(6), **options(name))
    net.load_state_dict(original)
    total = calls
    for limit in range(0, total, max(1, total // 9)):  # noqa: B007 - read in `forward`
        calls = 0
        with left_alone(net), pytest.raises(KeyboardInterrupt):
            repair(net, make_clean(6), **options(name))


@pytest.mark.parametrize("name", SHORT)
def test_an_exception_after_any_round_leaves_the_model_alone(make_net, make_clean, left_alone, name):
    net = make_net("vgg")
    original = copy.deepcopy(net.state_dict())
    rounds = len(repair(net, make_clean(6), **options(name)).rounds)
    net.load_state_dict(original)
    for when in sorted({1, rounds // 2 + 1, rounds}):
        with left_alone(net), pytest.raises(ZeroDivisionError):
            repair(net, make_clean(6), **options(name, on_round=lambda done, when=when: 1 / (done.round - when)))

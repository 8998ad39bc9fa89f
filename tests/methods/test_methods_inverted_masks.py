from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

from lightning_unlearn.evaluation import Evaluation
from lightning_unlearn.methods import RepairTask
from lightning_unlearn.methods.implicit_unlearning import PixelRange
from lightning_unlearn.methods.inverted_masks import InvertedMaskSelection
from lightning_unlearn.triggers import PatchTrigger

NETS = ("preact", "vgg", "grouped", "plain", "group_norm")


class Scripted(RepairTask):
    """A task whose accuracies on all images held are written by hand."""

    def measure(self):
        return Evaluation(acc=self.script.pop(0), asr=0.0, ra=0.0, loss=0.0, unlearning_loss=0.0)


def ims(**options):
    """Few, large steps, without limits."""
    defaults = {"initial_steps": 2, "joint_steps": 2, "learning_rate": 0.2, "attack_steps": 2, "batch_size": 12}
    return InvertedMaskSelection(**{**defaults, "validate_every": 2, "accuracy_drop": 1.0, **options})


def state(net):
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}


def same(first, second):
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def new_task(make_net, make_clean, make_task):
    def new(name="vgg", **options):
        net = make_net(name, seed=1)
        with torch.no_grad():  # or untrained nets would answer much the same to everything
            net[-1].weight.mul_(5)
        task = make_task(net, make_clean(8), PatchTrigger(target=1), **options)
        task.original = copy.deepcopy(task.model)
        return task

    return new


def masks_of(task, method):
    """The masks after every round and those that are folded, (total,) each."""
    found, fold = [], task.mask.fold
    scaled = task.mask.scaled
    task.mask.scaled = lambda scales: found.append(scales.detach().clone()) or scaled(scales)
    task.mask.fold = lambda scales: found.append(scales.clone()) or fold(scales)
    learned = []
    for done in method.repair(task):
        if done.stage == "learn":
            learned.append(found[-1])
    del task.mask.scaled, task.mask.fold
    return learned, found[-1]


# What is learned


def channels_times(net, masks):
    """A copy of a plain net whose channels are really multiplied, layer after layer, differentiably."""
    first, second = masks.split([5, 6])

    def forward(images):
        layers = list(net)
        images = layers[2](layers[1](layers[0](images) * first.view(-1, 1, 1)))
        return nn.Sequential(*layers[4:])(layers[3](images) * second.view(-1, 1, 1))

    return forward


def by_hand(task, method, perturb):
    net, images, masks = task.original, task.scoring.clean, torch.full((11,), method.start)
    low, high = images.min(), images.max()
    masks.requires_grad_()
    optimizer = torch.optim.Adam([masks], lr=method.learning_rate)
    for _ in range(2):
        wanted = net(images).softmax(1).detach()
        rows, answers, moved = torch.arange(len(images)), wanted.argmax(1), images.clone()
        for _ in range(method.attack_steps * perturb):
            moved.requires_grad_()
            victim = net(moved).softmax(1)
            inverse = channels_times(net, 1 - masks.detach())(moved).log_softmax(1)
            cost = (victim * (victim.log() - inverse)).sum(1) - (1 - victim[rows, answers]).log()
            (slope,) = torch.autograd.grad(cost.sum(), moved)
            moved = moved.detach() - 0.1 * (high - low) * slope.sign()
            moved = (images + (moved - images).clamp(-0.15 * (high - low), 0.15 * (high - low))).clamp(low, high)
        loss = -(1 - channels_times(net, 1 - masks)(images).softmax(1)[rows, answers]).log().mean()
        for shown in (images, moved)[: 1 + perturb]:
            masked = channels_times(net, masks)(shown).log_softmax(1)
            loss = loss + (wanted * (wanted.log() - masked)).sum(1).mean()
        (masks.grad,) = torch.autograd.grad(loss, masks)
        optimizer.step()
        masks.data.clamp_(0, 1)
    return masks.detach()


@pytest.mark.parametrize("perturb", [False, True])
def test_two_steps_by_hand(new_task, perturb):
    task = new_task("plain")
    steps = {"initial_steps": 0 if perturb else 2, "joint_steps": 2 if perturb else 0}
    attack = {"epsilon": 0.15, "attack_steps": 3, "attack_step_size": 0.1}
    method = ims(**steps, **attack, batch_size=1000, start=0.6, learning_rate=0.05)
    (learned,), folded = masks_of(task, method)
    wanted = by_hand(task, method, perturb)
    assert torch.allclose(learned, wanted, atol=1e-4)
    assert torch.equal(folded, learned)
    assert 0 < (wanted > 0.6).sum() < 11


def test_images_of_which_the_victim_is_sure_are_perturbed_too(new_task):
    # The probabilities of the other classes are 0 in float32, and so is the slope of what is left without them.
    task = new_task()
    with torch.no_grad():
        task.model[-1].weight.mul_(1e4)
    images, masks = task.scoring.clean, torch.full((task.mask.total,), 0.7)
    with torch.no_grad():
        answers = task.model(images).softmax(1)
    assert (answers.amin(1) == 0).all()
    moved = ims()._perturb(task, masks, images, answers, PixelRange.of(images))
    assert all(one.any() for one in moved - images)


@pytest.mark.parametrize("name", NETS)
def test_masks_are_folded_and_nothing_else_is_touched(new_task, name):
    task = new_task(name)
    parameters, before = list(task.model.parameters()), state(task.original)
    learned, folded = masks_of(task, ims(joint_steps=4))
    assert len(learned) == 3
    assert torch.equal(folded, learned[-1])
    assert all((masks >= 0).all() and (masks <= 1).all() for masks in learned)
    assert 0 < (folded < 0.9).sum() < len(folded)
    assert task.mask.flat().tolist() == (folded == 0).tolist()
    assert all(now is was for now, was in zip(task.model.parameters(), parameters, strict=True))
    assert all(parameter.grad is None for parameter in parameters)
    assert not any(module.training for module in task.model.modules())
    task.mask.undo(task.mask.steps)
    assert same(state(task.model), before)


def test_a_known_backdoor_goes_to_the_inverse(hand_victim, make_task):
    # The trigger is a pixel that goes from black to white: that far must δ reach, from where there is a gradient.
    with torch.no_grad():
        hand_victim.net[0].bias[3] = 0.05
    task = make_task(hand_victim.net, hand_victim.clean, hand_victim.trigger)
    method = InvertedMaskSelection(initial_steps=20, joint_steps=60, epsilon=1.0, attack_steps=5, attack_step_size=0.3)
    _, folded = masks_of(task, method)
    assert folded[3] < 0.2
    assert folded[:3].min() > 0.7
    now = task.measure()
    assert (task.before.asr, now.asr, now.acc) == (1.0, 0.0, 1.0)


def test_labels_and_triggered_images_decide_nothing(new_task):
    states = []
    for garbage in (False, True):
        task = new_task()
        if garbage:
            task.trigger = None
            for part in ("scoring", "validation"):
                pairs = getattr(task, part)
                setattr(task, part, dataclasses.replace(pairs, triggered=pairs.triggered * torch.nan))
            task.scoring = dataclasses.replace(task.scoring, labels=(task.scoring.labels + 1) % 4)
        list(ims().repair(task))
        states.append(state(task.model))
    assert same(*states)
    assert not InvertedMaskSelection.needs_trigger


# What is kept


@pytest.mark.parametrize(
    ("accuracies", "kept"),
    [([1.0, 0.95], 3), ([1.0, 0.85, 0.95], 2), ([1.0, 0.1, 0.2, 0.95], 1), ([1.0] + 3 * [0.5], 0)],
)
def test_the_last_masks_within_alpha_are_folded(new_task, accuracies, kept):
    task = new_task(kind=Scripted)
    task.script = list(accuracies)
    learned, folded = masks_of(task, ims(joint_steps=4, accuracy_drop=0.1))
    assert task.script == []
    assert torch.equal(folded, [torch.ones_like(folded), *learned][kept])
    assert same(state(task.model), state(task.original)) == (kept == 0)


def test_rounds(new_task):
    task = new_task()
    rounds = list(ims(initial_steps=3, joint_steps=4, validate_every=3).repair(task))
    assert [done.stage for done in rounds] == ["learn", "learn", "learn", "prune"]
    assert rounds[-1].pruned == task.mask.pruned
    assert rounds[-1].val_loss == pytest.approx(task.validate().loss)
    assert rounds[-1].val_loss == pytest.approx(rounds[-2].val_loss, rel=1e-4)
    assert [done.stage for done in ims(initial_steps=0, joint_steps=0).repair(new_task())] == ["prune"]


@pytest.mark.parametrize("rounds", [1, 2])
def test_closing_early_displaces_nothing(new_task, rounds):
    task = new_task("preact")
    parameters = list(task.model.parameters())
    search = ims().repair(task)
    for _ in range(rounds):
        next(search)
        assert same(state(task.model), state(task.original))
    search.close()
    assert all(now is was for now, was in zip(task.model.parameters(), parameters, strict=True))


# What is refused


def test_models_without_a_gradient_are_refused(new_task):
    task = new_task()
    task.forward = lambda images: task.model(images).detach()
    with pytest.raises(ValueError, match=r"^model: the loss does not depend on any channel"):
        list(ims().repair(task))
    task.forward = lambda images: task.model(images) + 0 * task.model[0](images).sum()
    with torch.no_grad():
        task.model[-1].weight.zero_()
    with pytest.raises(ValueError, match=r"^model: with all channels at start=0.9 .* gradient is 0 .* raise start"):
        list(ims().repair(task))
    task.forward = lambda images: task.model(images) * torch.nan
    with pytest.raises(ValueError, match=r"^model: the gradients of the masks hold NaN"):
        list(ims().repair(task))
    task.scoring = dataclasses.replace(task.scoring, clean=task.scoring.clean.byte())
    task.forward = lambda images: task.model(images.float())
    with pytest.raises(ValueError, match=r"^images: expected floating-point images"):
        list(ims().repair(task))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"initial_steps": -1}, r"^initial_steps: expected a value in \[0, inf\], but got -1"),
        ({"joint_steps": -1}, r"^joint_steps: .* but got -1"),
        ({"learning_rate": 0.0}, r"^learning_rate: .* but got 0.0"),
        ({"start": 1.0}, r"^start: expected a value in \(0, 1\), but got 1.0"),
        ({"epsilon": 0.0}, r"^epsilon: expected a value in \(0, 1\], but got 0.0"),
        ({"attack_steps": 0}, r"^attack_steps: .* but got 0"),
        ({"attack_step_size": 0.0}, r"^attack_step_size: .* but got 0.0"),
        ({"batch_size": 0}, r"^batch_size: .* but got 0"),
        ({"validate_every": 0}, r"^validate_every: .* but got 0"),
        ({"accuracy_drop": 0.0}, r"^accuracy_drop: .* but got 0.0"),
    ],
)
def test_hyper_parameters(options, match):
    with pytest.raises(ValueError, match=match):
        InvertedMaskSelection(**options)

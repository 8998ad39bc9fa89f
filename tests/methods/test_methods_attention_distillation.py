from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the usual name

from lightning_unlearn import repair
from lightning_unlearn.methods import FineTuning
from lightning_unlearn.methods.attention_distillation import (
    NeuralAttentionDistillation,
    _attention,
    _find_places,
    _watched,
)
from lightning_unlearn.triggers import PatchTrigger


def short(**options):
    return NeuralAttentionDistillation(**{"teacher_epochs": 2, "max_epochs": 2, **options})


@pytest.fixture
def stages():
    """Convolutions at 8, 4, 2 and 1 positions a side, with activations that write into their outputs."""
    torch.manual_seed(0)
    layers = []
    for inputs in (1, 4, 4):
        layers += [nn.Conv2d(inputs, 4, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4, 4))


# Where attention is looked at


def test_attention_by_hand():
    output = torch.zeros(2, 2, 1, 3)
    output[0, :, 0, 0] = torch.tensor([1.0, -1.0])  # 1 + 1 = 2
    output[0, 1, 0, 2] = -(1.5**0.5)  # 1.5, and the norm of (2, 0, 1.5) is 2.5
    assert torch.allclose(_attention(output), torch.tensor([[0.8, 0, 0.6], [0, 0, 0]]))


def test_the_last_convolution_at_each_of_the_last_resolutions(make_net, make_clean, make_task, stages):
    def names(net, most):
        task = make_task(net, make_clean(4), PatchTrigger())
        modules = {module: name for name, module in net.named_modules()}
        places = _find_places(task.subject, most)
        assert not any(module._forward_hooks for module in net.modules())
        return [(modules[place.convolution], place.resolution) for place in places]

    # One position is no resolution.
    assert names(stages, 3) == [("0", (8, 8)), ("3", (4, 4)), ("6", (2, 2))]
    assert names(stages, 2) == [("3", (4, 4)), ("6", (2, 2))]
    assert names(make_net("vgg"), 3) == [("0", (8, 8)), ("4", (4, 4))]
    assert names(make_net("grouped"), 3) == [("8", (8, 8))]


def test_one_module_at_two_resolutions(make_clean, make_task):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution, self.linear = nn.Conv2d(1, 1, 3, padding=1), nn.Linear(16, 4)

        def forward(self, images):
            return self.linear(self.convolution(F.max_pool2d(self.convolution(images), 2)).flatten(1))

    task = make_task(Shared(), make_clean(4), PatchTrigger())
    places = _find_places(task.subject, 3)
    with _watched(places) as maps:
        task.forward(task.scoring.clean)
    assert [tuple(found.shape) for found in maps()] == [(12, 64), (12, 16)]


def test_hooks_go_even_after_an_error(make_net, make_clean, make_task):
    task = make_task(make_net("vgg"), make_clean(4), PatchTrigger())
    with pytest.raises(ZeroDivisionError), _watched(_find_places(task.subject, 3)):
        raise ZeroDivisionError
    assert not any(module._forward_hooks for module in task.model.modules())


def test_a_network_without_a_map_is_refused(hand_victim, make_task):
    task = make_task(hand_victim.net, hand_victim.clean, hand_victim.trigger)
    match = (
        r"^model: NeuralAttentionDistillation needs a convolution whose output has more than one position, but none of "
        r"the convolutions of Sequential \(0\) gives one; FineTuning and MaskPrune work without"
    )
    with pytest.raises(ValueError, match=match):
        next(short().repair(task))


# The method


def test_a_student_step_by_hand(make_net, make_clean, make_task):
    task = make_task(make_net("vgg"), make_clean(8), PatchTrigger(target=1))
    victim = copy.deepcopy(task.model)
    own = make_task(copy.deepcopy(task.model), make_clean(8), PatchTrigger(target=1))
    list(FineTuning(learning_rate=0.1, weight_decay=0.01, max_epochs=2, accuracy_drop=1.0).repair(own))
    images, labels = task.scoring.clean, task.scoring.labels

    def maps(net):
        first = net[0](images)
        outputs = (first, net[4](net[3](net[2](net[1](first)))))
        return [x.square().sum(1).flatten(1) / x.square().sum(1).flatten(1).norm(dim=1)[:, None] for x in outputs]

    with torch.no_grad():
        wanted = maps(own.model)
    student = copy.deepcopy(victim).train()
    loss = F.cross_entropy(student(images), labels)
    statistics = {name: tensor.clone() for name, tensor in student.named_buffers()}
    for beta, one, other in zip((30.0, 200.0), maps(student), wanted, strict=True):
        loss = loss + beta * (one - other).square().mean()
    gradients = torch.autograd.grad(loss, list(student.parameters()))
    method = short(
        betas=(7.0, 30.0, 200.0), max_epochs=1, learning_rate=0.1, weight_decay=0.01, accuracy_drop=1.0, batch_size=99
    )
    rounds = list(method.repair(task))
    assert [(done.stage, done.pruned) for done in rounds] == [("finetune", ())] * 3
    for found, p, g in zip(task.model.parameters(), victim.parameters(), gradients, strict=True):
        assert torch.allclose(found, p - 0.1 * (g + 0.01 * p), rtol=1e-4, atol=1e-6)
    for name, tensor in task.model.named_buffers():
        assert torch.allclose(tensor, statistics[name], atol=1e-6), name


def test_the_student_comes_nearer_to_the_teacher(make_net, make_clean, make_task):
    distances = []
    for betas in ((0.0,), (1000.0,)):
        task = make_task(make_net("vgg"), make_clean(8), PatchTrigger(target=1))
        places = _find_places(task.subject, 1)
        search = short(betas=betas, max_epochs=60, accuracy_drop=1.0).repair(task)
        for _ in range(2):
            next(search)
        # What the second round left is the teacher, since the last epoch is kept.
        taught = _attention(task.model[:5](task.scoring.clean)).detach()
        list(search)
        with _watched(places) as maps, torch.no_grad():
            task.forward(task.scoring.clean)
        distances.append((maps()[0] - taught).square().mean().item())
    assert distances[1] < 0.5 * distances[0]


def test_without_student_epochs_the_victim_is_back(make_net, make_clean, make_task):
    task = make_task(make_net("preact"), make_clean(8), PatchTrigger(target=1))
    before = copy.deepcopy(task.model.state_dict())
    assert len(list(short(max_epochs=0, accuracy_drop=1.0).repair(task))) == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.model.state_dict().items())


def test_the_teachers_maps_do_not_depend_on_the_size_of_batches(make_net, make_clean, make_task):
    states = []
    for size in (5, 100):
        task = make_task(make_net("vgg"), make_clean(8), PatchTrigger(), batch_size=size)
        list(short(batch_size=10).repair(task))
        states.append(task.model.state_dict())
    assert all(torch.allclose(states[0][name].float(), states[1][name].float(), atol=1e-5) for name in states[0])


def options(**others):
    return {"trigger": PatchTrigger(target=1), "method": short(), "force": True} | others


@pytest.mark.parametrize(("name", "channels"), [("preact", 3), ("stages", 1)])
def test_through_repair(make_net, make_clean, stages, name, channels):
    results = []
    for _ in range(2):
        net = (copy.deepcopy(stages) if name == "stages" else make_net(name, channels=channels)).train()
        done = repair(net, make_clean(10, channels=channels), **options())
        assert [step.stage for step in done.rounds] == ["finetune"] * 4
        assert all(module.training and not module._forward_hooks for module in net.modules())
        assert all(p.grad is None and p.isfinite().all() for p in net.parameters())
        results.append(net.state_dict())
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"betas": ()}, "^betas: expected at least one weight, but got none"),
        ({"betas": (1.0, -2.0)}, r"^betas: expected a value in \[0, inf\], but got -2.0"),
        ({"teacher_epochs": 0}, "^teacher_epochs: .* but got 0"),
        ({"learning_rate": 0}, "^learning_rate: .* but got 0"),
        ({"weight_decay": -1.0}, "^weight_decay: .* but got -1.0"),
        ({"batch_size": 0}, "^batch_size: .* but got 0"),
        ({"max_epochs": -1}, "^max_epochs: .* but got -1"),
        ({"accuracy_drop": 0}, "^accuracy_drop: .* but got 0"),
    ],
)
def test_hyper_parameters(given, match):
    with pytest.raises(ValueError, match=match):
        NeuralAttentionDistillation(**given)


def test_a_layer_that_training_skips_has_no_attention_to_compare(make_net, make_clean, make_task):
    class Skipping(nn.Module):
        """Runs its last convolution in eval mode alone, as stochastic depth may."""

        def __init__(self):
            super().__init__()
            self.first, self.last, self.classify = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 4)

        def forward(self, x):
            x = self.first(x).relu()
            x = x if self.training else self.last(x).relu()
            return self.classify(x.mean((2, 3)))

    task = make_task(Skipping(), make_clean(8), PatchTrigger())
    assert len(list(short(learning_rate=1e-3, accuracy_drop=1.0).repair(task))) == 4

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, Subset, TensorDataset
from torchvision.transforms import v2

from lightning_unlearn.data import split_holdout
from lightning_unlearn.data.pairs import Pairs
from lightning_unlearn.draw import Split
from lightning_unlearn.evaluation import evaluate
from lightning_unlearn.methods import FineTuning, GradPrune, MaskPrune, RepairMethod
from lightning_unlearn.metrics.functional import attack_success_rate
from lightning_unlearn.repair import RepairResult, repair, repair_split
from lightning_unlearn.triggers import FunctionTrigger, PatchTrigger

NETS = ("preact", "vgg", "grouped", "plain", "group_norm")
METHODS = [
    pytest.param(lambda: GradPrune(max_rounds=3, finetune=False), id="grad"),
    pytest.param(
        lambda: GradPrune(max_rounds=2, finetune=FineTuning(triggered=True, max_epochs=2, norms="frozen")),
        id="grad-finetune",
    ),
    pytest.param(lambda: MaskPrune(steps=6, learning_rate=0.3, validate_every=3), id="mask"),
    pytest.param(lambda: MaskPrune(steps=6, validate_every=3, cut="hard", finetune=False), id="mask-hard"),
    pytest.param(lambda: FineTuning(triggered=True, max_epochs=2, norms="frozen"), id="finetune"),
    pytest.param(lambda: FineTuning(triggered=True, max_epochs=2), id="finetune-norms"),
]


class Spy(RepairMethod):
    """Changes nothing and remembers what it was given."""

    def __init__(self, on_repair=lambda task: None):
        self.on_repair = on_repair

    def repair(self, task):
        self.task = task
        self.training = task.model.training
        self.requires_grad = [p.requires_grad for p in task.model.parameters()]
        self.grad_enabled = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        self.on_repair(task)
        yield task.round("prune", task.validate())


class Vandal(RepairMethod):
    """Makes the model worse: it answers the target to everything."""

    def repair(self, task):
        with torch.no_grad():
            list(task.model.parameters())[-1].copy_(torch.tensor([100.0, 0.0, 0.0]))
        task.mask.prune([task.mask.locate(0)])
        yield task.round("prune", task.validate(), task.mask.pruned)


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


class Transformed(Dataset):
    def __init__(self, images, labels, transform):
        self.images, self.targets, self.transform = images, labels, transform

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return self.transform(self.images[index]), int(self.targets[index])


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(first, second):
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


def asr(model, dataset, trigger):
    images, labels = dataset.tensors
    with torch.no_grad():
        return attack_success_rate(model(trigger(images)), labels, trigger.target).item()


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


# Any model


@pytest.mark.parametrize("method", METHODS[::2])  # one of each kind
@pytest.mark.parametrize(("name", "channels"), [*((name, 1) for name in NETS), ("preact", 3), ("grouped", 3)])
def test_any_net_grey_or_colour(make_net, make_clean, name, channels, method):
    net, clean, trigger = make_net(name, channels=channels), make_clean(12, channels=channels), PatchTrigger(target=1)
    before = asr(net, clean, trigger)
    buffers = {key: tensor.clone() for key, tensor in net.named_buffers()}
    result = repair(net, clean, trigger=trigger, method=method(), samples_per_class=12, force=True)
    assert result.scoring_images.shape == (44, channels, 8, 8)
    if getattr(method(), "norms", "frozen") == "frozen":
        assert all(torch.equal(tensor, buffers[key]) for key, tensor in net.named_buffers())
    assert all(tensor.isfinite().all() for tensor in net.state_dict().values())
    # All of `clean` was drawn, and on what was drawn ASR never rises.
    assert asr(net, clean, trigger) <= before
    for layer, filters in result.pruned.items():
        assert net.get_submodule(layer).weight[filters].count_nonzero() == 0


@pytest.mark.parametrize("method", METHODS)
def test_a_frozen_model_is_repaired_and_stays_frozen(make_net, make_clean, method):
    free, frozen = make_net("vgg"), make_net("vgg").requires_grad_(False)
    results = [
        repair(net, make_clean(20), trigger=PatchTrigger(), method=method(), force=True) for net in (free, frozen)
    ]
    assert results[0].rounds == results[1].rounds
    assert same_state(free.state_dict(), frozen.state_dict())
    assert not any(p.requires_grad for p in frozen.parameters())
    assert all(p.requires_grad for p in free.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_flags_and_gradients_are_as_they_were(make_net, make_clean, method):
    net = make_net("preact").train()
    net[1].eval()
    net[2].conv1.weight.requires_grad_(False)
    grad = net[0].weight.grad = torch.ones_like(net[0].weight)
    training = [module.training for module in net.modules()]
    requires_grad = [p.requires_grad for p in net.parameters()]
    repair(net, make_clean(20), trigger=PatchTrigger(), method=method(), force=True)
    assert [module.training for module in net.modules()] == training
    assert [p.requires_grad for p in net.parameters()] == requires_grad
    assert net[0].weight.grad is grad
    assert torch.equal(grad, torch.ones_like(grad))
    assert all(p.grad is None for p in net.parameters() if p is not net[0].weight)
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in net.modules())


def test_a_compiled_model_is_repaired_through_its_own_modules(hand_victim):
    method = GradPrune(finetune=False)
    compiled = torch.compile(hand_victim.net, backend="eager")
    result = repair(compiled, hand_victim.clean, trigger=hand_victim.trigger, method=method)
    assert result.pruned == {"0": [3]}
    assert hand_victim.net[0].weight[3].count_nonzero() == 0


def test_double_precision(make_net, make_clean):
    net = make_net("vgg").double()
    result = repair(net, make_clean(20), trigger=PatchTrigger(), method=GradPrune(max_rounds=2), force=True)
    assert result.scoring_images.dtype == torch.float64
    assert all(p.dtype == torch.float64 for p in net.parameters())


def test_a_forward_of_ones_own(hand_victim):
    class Wrapped(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, images):
            return {"logits": self.net(images)}

    wrapped = Wrapped(hand_victim.net)
    images, labels = hand_victim.clean.tensors
    split = Split((images[:30], labels[:30]), (images[30:], labels[30:]))
    result = repair_split(
        wrapped,
        split,
        trigger=hand_victim.trigger,
        method=GradPrune(finetune=False),
        forward=lambda images: wrapped(images)["logits"],
    )
    assert result.pruned == {"net.0": [3]}
    assert len(result.scoring_labels) == 30


# Normalised images


@pytest.mark.parametrize("subset", [False, True])
def test_the_datasets_normalisation_is_found(make_net, make_clean, subset):
    images, labels = make_clean(20, channels=3).tensors
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    data = Transformed(images, labels, v2.Compose([v2.Identity(), v2.Normalize(mean, std)]))
    found = Subset(data, range(len(data))) if subset else data
    method = GradPrune(max_rounds=4, accuracy_drop=1.0, finetune=False)
    runs = []
    for dataset, trigger in ((found, PatchTrigger()), (list(data), PatchTrigger(mean=mean, std=std))):
        net = make_net("preact", channels=3)
        runs.append((repair(net, dataset, trigger=trigger, method=method, force=True), state(net)))
    (automatic, repaired), (manual, repaired_too) = runs
    assert torch.equal(automatic.scoring_images, manual.scoring_images)
    assert automatic.rounds == manual.rounds
    assert same_state(repaired, repaired_too)
    # The patch is white: 1 in pixel space.
    white = (1 - torch.tensor(mean)) / torch.tensor(std)
    assert torch.allclose(automatic.scoring_images[:, :, -1, -1], white)


def test_normalising_inside_the_model_is_the_same_repair(make_net, make_clean):
    images, labels = make_clean(20).tensors
    normalize = v2.Normalize((0.5,), (0.25,))
    method = GradPrune(max_rounds=1, finetune=False)
    outside = repair(
        make_net("vgg"), Transformed(images, labels, normalize), trigger=PatchTrigger(), method=method, force=True
    )
    inside = repair(
        nn.Sequential(normalize, make_net("vgg")),
        TensorDataset(images, labels),
        trigger=PatchTrigger(),
        method=method,
        force=True,
    )
    assert [(f"1.{layer}", index) for layer, index in outside.rounds[0].pruned] == list(inside.rounds[0].pruned)
    assert outside.rounds[0].val_unlearning_loss == pytest.approx(inside.rounds[0].val_unlearning_loss, rel=1e-4)


def test_the_users_trigger_is_not_changed(make_net, make_clean):
    trigger = PatchTrigger()
    data = Transformed(*make_clean(20).tensors, v2.Normalize((0.5,), (0.25,)))
    repair(make_net("vgg"), data, trigger=trigger, method=Spy(), force=True)
    assert trigger.normalization is None


def test_a_trigger_that_was_told_its_normalisation_keeps_it(make_net, make_clean):
    data = Transformed(*make_clean(20).tensors, v2.Normalize((0.5,), (0.25,)))
    trigger = PatchTrigger(mean=(0.4,), std=(0.3,))
    with pytest.raises(ValueError, match=r"mean=\(0.4,\), std=\(0.3,\)"):
        repair(make_net("vgg"), data, trigger=trigger, method=Spy(), force=True)


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
    with left_alone(net), pytest.raises(error, match="enough"):
        repair_split(
            net, split, trigger=PatchTrigger(), method=method(), force=True, forward=forward, on_round=lambda _: None
        )
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


def test_a_function_as_trigger(make_net, make_clean):
    trigger = FunctionTrigger(lambda pixels: 1 - pixels, target=1)
    result = repair(make_net("vgg"), make_clean(20), trigger=trigger, method=Spy(), force=True)
    assert torch.allclose(result.scoring_images, 1 - result.scoring.clean)


def test_a_net_with_one_filter_and_a_large_sparsity():
    """A gradient is missing only if it is zero: not if all filters' are alike, nor if the sparsity outweighs it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 1, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2)).eval()
    clean = TensorDataset(torch.rand(20, 1, 8, 8), torch.arange(20) % 2)
    method = MaskPrune(steps=1, sparsity=1e6, finetune=False)
    result = repair(net, clean, trigger=PatchTrigger(size=3, target=0), method=method, force=True)
    assert [done.stage for done in result.rounds] == ["learn", "prune"]


class TakesBytes(nn.Module):
    """Scales its own input, as nets that are deployed often do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert images.dtype == torch.uint8
        return self.net(images.float() / 255)


def test_uint8_images_reach_the_model_as_they_are():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8)
    clean = TensorDataset(images, torch.arange(20) % 2)
    result = repair(TakesBytes().eval(), clean, trigger=PatchTrigger(size=3), method=MaskPrune(steps=2), force=True)
    assert result.scoring_images.dtype == torch.uint8
    assert result.scoring_images[:, :, -3:, -3:].eq(255).all()

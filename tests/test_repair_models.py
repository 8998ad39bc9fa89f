from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import Dataset, Subset, TensorDataset
from torchvision.transforms import v2

from lightning_unlearn.draw import Split
from lightning_unlearn.methods import FineTuning, GradPrune, MaskPrune
from lightning_unlearn.plan import RepairPlan
from lightning_unlearn.repair import repair, repair_split
from lightning_unlearn.triggers import FunctionTrigger, PatchTrigger
from tests.small_repairs import METHODS, NETS, Spy, asr, same_state, state


class Transformed(Dataset):
    def __init__(self, images, labels, transform):
        self.images, self.targets, self.transform = images, labels, transform

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return self.transform(self.images[index]), int(self.targets[index])


# Any model


@pytest.mark.parametrize("method", METHODS[::2])  # one of each kind
@pytest.mark.parametrize(("name", "channels"), [*((name, 1) for name in NETS), ("preact", 3), ("grouped", 3)])
def test_any_net_grey_or_colour(make_net, make_clean, name, channels, method):
    net, clean, trigger = make_net(name, channels=channels), make_clean(12, channels=channels), PatchTrigger(target=1)
    before = asr(net, clean, trigger)
    result = repair(net, clean, trigger=trigger, method=method(), samples_per_class=12, force=True)
    assert result.scoring_images.shape == (44, channels, 8, 8)
    counts = [tensor for name, tensor in net.named_buffers() if name.endswith("num_batches_tracked")]
    assert not any(counts) or getattr(method(), "norms", "frozen") != "frozen"
    assert all(tensor.isfinite().all() for tensor in net.state_dict().values())
    # All of `clean` was drawn, and on what was drawn ASR never rises.
    assert asr(net, clean, trigger) <= before
    for layer, filters in result.pruned.items():
        assert net.get_submodule(layer).weight[filters].count_nonzero() == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["preact", "vgg"])
def test_statistics_follow_a_repair_and_nothing_else_is_computed(make_net, make_clean, monkeypatch, name, method):
    images, logits, errors = make_clean(40).tensors[0], [], []
    for rebased in (False, True):
        net = make_net(name)
        update_bn([images], net)  # as if it had been trained
        if not rebased:
            monkeypatch.setattr("lightning_unlearn.settling.rebase", lambda *_: None)
        result = repair(net.eval(), make_clean(20), trigger=PatchTrigger(), method=method(), force=True)
        monkeypatch.undo()
        logits.append(net(images))
        net.train()(images)
        update_bn([images], net)
        errors.append((net.eval()(images) - logits[-1]).abs().mean().item())
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-4)
    if result.status == "not improved":  # a filter too many
        assert name == "vgg"
        assert errors[0] == errors[1]
    elif getattr(method(), "norms", "frozen") == "frozen":
        assert errors[1] <= errors[0] / 2


class OnePlus(nn.BatchNorm2d):
    """Multiplies by 1 + γ, as some do so that weight decay draws it to 1."""

    def forward(self, images):
        return nn.functional.batch_norm(images, self.running_mean, self.running_var, 1 + self.weight, self.bias)


@pytest.mark.parametrize("kind", ["1 + γ", "shared γ"])
def test_norms_of_which_more_is_unknown_keep_their_statistics(make_clean, kind):
    torch.manual_seed(0)
    norms = [OnePlus(6) if kind == "1 + γ" else nn.BatchNorm2d(6) for _ in range(2)]
    if kind == "shared γ":
        norms[1].weight = norms[0].weight
    convolutions = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 6, 3)
    layers = [layer for pair in zip(convolutions, norms, strict=True) for layer in (*pair, nn.ReLU())]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)).eval()
    clean = make_clean(20)
    update_bn([clean.tensors[0] * 3 - 1], net)  # which has little to do with the images of the repair
    before = [tensor.clone() for tensor in net.buffers()]
    method = FineTuning(triggered=True, norms="frozen", max_epochs=5, patience=5, accuracy_drop=1.0)
    result = repair(net.eval(), clean, trigger=PatchTrigger(), method=method, force=True)
    assert result.status == "repaired"
    assert all(torch.equal(now, old) for now, old in zip(net.buffers(), before, strict=True))


@pytest.mark.parametrize("name", ["preact", "vgg", "grouped"])
def test_what_was_pruned_and_all_that_followed_can_be_taken_back(make_net, make_clean, name):
    net = make_net(name)
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    method = GradPrune(max_rounds=3, finetune=False, accuracy_drop=1.0)
    result = repair(net, make_clean(20), trigger=PatchTrigger(), method=method, force=True)
    assert any("running" in key and not torch.equal(net.state_dict()[key], before[key]) for key in before)
    result.mask.undo(result.mask.steps)
    assert same_state(net.state_dict(), before)


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
        RepairPlan(trigger=hand_victim.trigger, method=GradPrune(finetune=False)),
        forward=lambda images: wrapped(images)["logits"],
    )
    assert result.pruned == {"net.0": [3]}
    assert len(result.scoring_labels) == 30


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


def test_a_function_as_trigger(make_net, make_clean):
    trigger = FunctionTrigger(lambda pixels: 1 - pixels, target=1)
    result = repair(make_net("vgg"), make_clean(20), trigger=trigger, method=Spy(), force=True)
    assert torch.allclose(result.scoring_images, 1 - result.scoring.clean)

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from lightning_unlearn import repair
from lightning_unlearn.filters import find_filters
from lightning_unlearn.methods.lipschitz_pruning import ChannelLipschitzPruning
from lightning_unlearn.triggers import PatchTrigger

CONVOLUTIONS = {
    "plain": lambda: nn.Conv2d(4, 6, 3),
    "grouped": lambda: nn.Conv2d(4, 6, (3, 2), groups=2, bias=False),
    "depthwise": lambda: nn.Conv2d(4, 8, 3, groups=4),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3),
    "grouped transposed": lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
    "one by one": lambda: nn.Conv2d(4, 6, 1),
    "one channel": lambda: nn.Conv2d(1, 6, 3),
}


def norm_of(channels, gammas, variances, eps=1e-30):
    norm = nn.BatchNorm2d(channels, eps=eps).eval()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor(gammas))
        norm.running_var.copy_(torch.tensor(variances))
    return norm


def layer_of(net, channels=1):
    (layer,) = find_filters(net.eval(), torch.rand(1, channels, 8, 8))
    return layer


def filters_of(layer):
    """Each filter as a matrix, one by one, (inputs, kernel entries)."""
    convolution, matrices = layer.convolution, []
    per_group = convolution.out_channels // convolution.groups
    inputs = convolution.in_channels // convolution.groups
    for index in range(convolution.out_channels):
        group, within = divmod(index, per_group)
        if convolution.transposed:
            one = convolution.weight[group * inputs : (group + 1) * inputs, within]
        else:
            one = convolution.weight[index]
        matrices.append(one.detach().double().reshape(inputs, -1))
    return matrices


def wide_net(seed=0):
    """12 filters of about the same bound, then 12 more, and a head; all are needed for one to stand out at u = 3."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        first = [nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU()]
        second = [nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU()]
        net = nn.Sequential(*first, *second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4)).eval()
        for index in (0, 3):
            nn.init.normal_(net[index].weight)
    return net


# The bounds


def test_bounds_by_hand():
    net = nn.Sequential(nn.Conv2d(2, 3, 2, bias=False), norm_of(3, [-2.0, 1.0, 0.5], [0.75, 3.75, 0.0], eps=0.25))
    with torch.no_grad():
        net[0].weight.zero_()
        # A matrix of rank 1 has one singular value, the product of two lengths: 5 · 3.
        net[0].weight[0] = torch.outer(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0, 0.0, 2.0])).view(2, 2, 2)
        net[0].weight[1, 0, 0, 0], net[0].weight[1, 1, 0, 1] = 3.0, -7.0  # singular values 3 and 7
    bounds = ChannelLipschitzPruning().bounds(layer_of(net, 2))
    assert bounds.tolist() == pytest.approx([15 * 2 / 1, 7 * 1 / 2, 0])


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_bounds_of_every_kind_of_convolution(name):
    torch.manual_seed(0)
    convolution = CONVOLUTIONS[name]()
    channels = convolution.out_channels
    gammas, variances = torch.randn(channels).tolist(), (0.1 + torch.rand(channels)).tolist()
    layer = layer_of(
        nn.Sequential(convolution, norm_of(channels, gammas, variances, eps=1e-3)), convolution.in_channels
    )
    wanted = [
        torch.linalg.svdvals(matrix)[0].item() * abs(gamma) / math.sqrt(variance + 1e-3)
        for matrix, gamma, variance in zip(filters_of(layer), gammas, variances, strict=True)
    ]
    assert ChannelLipschitzPruning().bounds(layer).tolist() == pytest.approx(wanted, rel=1e-5)


def test_the_largest_of_several_norms():
    class TwoNorms(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 1, bias=False)
            self.first, self.second = norm_of(2, [1.0, 1.0], [4.0, 1.0]), norm_of(2, [-3.0, 0.5], [1.0, 1.0])

        def forward(self, x):
            return self.first(self.conv(x)) + self.second(self.conv(x))

    net = TwoNorms()
    nn.init.constant_(net.conv.weight, -2.0)
    assert ChannelLipschitzPruning().bounds(layer_of(net)).tolist() == pytest.approx([6.0, 2.0])


@pytest.mark.parametrize(
    "norm",
    [
        nn.Identity(),
        nn.GroupNorm(1, 4),
        nn.InstanceNorm2d(4, affine=True),
        nn.BatchNorm2d(4, affine=False),
    ],
)
def test_no_bound_without_gamma_and_variance(norm):
    assert ChannelLipschitzPruning().bounds(layer_of(nn.Sequential(nn.Conv2d(1, 4, 3), norm))) is None


# What is pruned


def test_only_what_stands_out(make_clean, make_task):
    net = wide_net()
    with torch.no_grad():
        net[0].weight[5] *= 40  # a huge weight
        net[4].weight[7] = -50  # a huge |γ|
    task = make_task(net, make_clean(4), PatchTrigger())
    original = copy.deepcopy(task.model)
    rounds = list(ChannelLipschitzPruning().repair(task))
    assert task.mask.to_dict() == {"0": [5], "3": [7]}
    assert [(done.stage, done.pruned) for done in rounds] == [("prune", (("0", 5), ("3", 7)))]
    assert rounds[0].val_loss == task.validate().loss
    assert not task.model[0].weight[5].any()
    assert task.model[4].weight[7] == task.model[4].bias[7] == 0
    task.mask.undo()
    assert all(torch.equal(now, original.state_dict()[key]) for key, now in task.model.state_dict().items())


@pytest.mark.parametrize("threshold", [0.5, 1.0, 2.0, 3.0])
def test_mean_and_deviation_by_layer(make_net, make_clean, make_task, threshold):
    task = make_task(make_net("grouped"), make_clean(4), PatchTrigger())
    wanted = {}
    for layer in task.mask.layers:
        bounds = ChannelLipschitzPruning().bounds(layer)
        if bounds is not None:
            mean = sum(bounds.tolist()) / len(bounds)
            std = math.sqrt(sum((bound - mean) ** 2 for bound in bounds.tolist()) / (len(bounds) - 1))
            wanted[layer.name] = [i for i, bound in enumerate(bounds.tolist()) if bound > mean + threshold * std]
    list(ChannelLipschitzPruning(threshold=threshold).repair(task))
    assert task.mask.to_dict() == {name: indices for name, indices in wanted.items() if indices}
    assert bool(task.mask.pruned) == (threshold < 3)  # no layer of 8 can lose one at 3


def test_convolutions_without_a_norm_of_their_own_stay(make_net, make_clean, make_task):
    net = make_net("preact")
    with torch.no_grad():
        net[1].conv2.weight[0] *= 100
        net[2].shortcut.weight[0] *= 100
    task = make_task(net, make_clean(4), PatchTrigger())
    list(ChannelLipschitzPruning(threshold=0.1).repair(task))
    assert set(task.mask.to_dict()) == {"0", "1.conv1", "2.conv1"}


def test_a_layer_of_one_filter(make_clean, make_task, recwarn):
    net = nn.Sequential(nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 4))
    task = make_task(net, make_clean(4), PatchTrigger())
    rounds = list(ChannelLipschitzPruning(threshold=0.1).repair(task))
    assert [done.pruned for done in rounds] == [()]
    assert task.mask.pruned == ()
    assert not [warning for warning in recwarn if "std" in str(warning.message)]


def test_what_is_pruned_already(make_clean, make_task):
    net = wide_net()
    with torch.no_grad():
        net[0].weight[5] *= 40
        net[3].weight[2] *= 40
    task = make_task(net, make_clean(4), PatchTrigger())
    task.mask.prune([("3", 0)])
    list(ChannelLipschitzPruning().repair(task))
    assert task.mask.to_dict() == {"0": [5], "3": [0, 2]}
    assert task.mask.pruned[0] == ("3", 0)


def test_no_image_decides(make_net, make_clean, make_task):
    found = []
    for seed, target in ((0, 0), (1, 3)):
        task = make_task(make_net("vgg"), make_clean(4, seed=seed), PatchTrigger(target=target))
        task.scoring = None  # not even looked at
        list(ChannelLipschitzPruning(threshold=1.0).repair(task))
        found.append(task.mask.pruned)
    assert found[0] == found[1] != ()
    assert not ChannelLipschitzPruning.needs_trigger


def test_within_another_method_a_misfit_is_refused_too(make_net, make_clean, make_task):
    task = make_task(make_net("plain"), make_clean(4), PatchTrigger())
    with pytest.raises(ValueError, match=r"^model: ChannelLipschitzPruning needs"):
        next(ChannelLipschitzPruning().repair(task))


# From outside


def test_through_repair(make_clean):
    net = wide_net()
    with torch.no_grad():
        net[0].weight[5] *= 40
    net.train()
    net[1].eval()
    training = [module.training for module in net.modules()]
    result = repair(
        net, make_clean(5), trigger=PatchTrigger(), method=ChannelLipschitzPruning(), samples_per_class=4, force=True
    )
    assert [module.training for module in net.modules()] == training
    assert all(tensor.isfinite().all() for tensor in net.state_dict().values())
    assert result.status in ("repaired", "not improved")
    assert result.pruned == ({"0": [5]} if result.status == "repaired" else {})


@pytest.mark.parametrize("name", ["plain", "group_norm"])
def test_a_model_without_batch_norm_is_refused_and_left_alone(make_net, make_clean, left_alone, name):
    net = make_net(name)
    options = {"trigger": PatchTrigger(), "samples_per_class": 4, "force": True}
    match = r"^model: ChannelLipschitzPruning needs .* none of the convolutions of Sequential .*GradPrune"
    with left_alone(net), pytest.raises(ValueError, match=match):
        repair(net, make_clean(5), method=ChannelLipschitzPruning(), **options)


def test_colour(make_net, make_clean):
    clean = TensorDataset(*make_clean(5, channels=3).tensors)
    result = repair(
        make_net("vgg", channels=3),
        clean,
        trigger=PatchTrigger(),
        method=ChannelLipschitzPruning(threshold=1.0),
        samples_per_class=4,
        force=True,
    )
    assert [done.stage for done in result.rounds] == ["prune"]


@pytest.mark.parametrize("threshold", [0.0, -1.0, float("nan")])
def test_hyper_parameters(threshold):
    with pytest.raises(ValueError, match=rf"^threshold: expected a value in \(0, inf\], but got {threshold}"):
        ChannelLipschitzPruning(threshold=threshold)

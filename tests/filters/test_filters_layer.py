from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchvision.models.convnext import LayerNorm2d

from lightning_unlearn.filters import ChannelTensor, FilterLayer, find_filters

CONVOLUTIONS = {
    "1d": lambda: nn.Conv1d(4, 6, 3),
    "2d": lambda: nn.Conv2d(4, 6, 3),
    "3d": lambda: nn.Conv3d(4, 6, 2),
    "1d grouped": lambda: nn.Conv1d(4, 6, 3, groups=2),
    "2d grouped": lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1),
    "3d grouped": lambda: nn.Conv3d(4, 6, 2, groups=2),
    "2d strided": lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode="circular", bias=False),
    "depthwise": lambda: nn.Conv2d(6, 6, 3, groups=6),
    "depthwise, two filters each": lambda: nn.Conv2d(3, 6, 3, groups=3, bias=False),
    "1d transposed": lambda: nn.ConvTranspose1d(4, 6, 3),
    "2d transposed": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2),
    "3d transposed": lambda: nn.ConvTranspose3d(4, 6, 2),
    "1d transposed grouped": lambda: nn.ConvTranspose1d(4, 6, 3, groups=2),
    "2d transposed grouped": lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False),
    "3d transposed grouped": lambda: nn.ConvTranspose3d(4, 6, 2, groups=2),
    "transposed depthwise": lambda: nn.ConvTranspose2d(6, 6, 2, groups=6),
}
BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
KINDS = pytest.mark.parametrize("kind", CONVOLUTIONS)


def trained(*modules):
    """As after training: no parameter or statistic has the value it started with."""
    net = nn.Sequential(*modules).eval()
    generator = torch.Generator().manual_seed(0)
    for tensor in net.parameters():
        signs = torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1
        tensor.data.uniform_(0.3, 0.9, generator=generator).mul_(signs)
    for tensor in net.buffers():
        if tensor.is_floating_point():
            tensor.uniform_(0.4, 1.2, generator=generator)
    return net


def images_for(convolution, size=6):
    shape = (2, convolution.in_channels, *[size] * (convolution.weight.ndim - 2))
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


def one_layer(net, images):
    (layer,) = find_filters(net, images)
    return layer


def bools(*indices, size=6):
    return torch.zeros(size, dtype=torch.bool).index_fill(0, torch.tensor(indices), True)


@KINDS
def test_by_filter_is_a_view_of_all_entries_of_each_filter(kind):
    net = trained(CONVOLUTIONS[kind]())
    convolution, images = net[0], images_for(net[0])
    layer = FilterLayer("0", convolution)
    view = layer.by_filter(convolution.weight.detach())
    assert view.untyped_storage().data_ptr() == convolution.weight.untyped_storage().data_ptr()
    kernel = convolution.weight.shape[2:]
    groups = convolution.groups
    assert view.shape == (groups, 6 // groups, convolution.in_channels // groups, *kernel)
    before = net(images)
    bias = torch.zeros(6) if convolution.bias is None else convolution.bias.detach()
    for index in range(6):
        changed = copy.deepcopy(net)
        view = FilterLayer("0", changed[0]).by_filter(changed[0].weight.detach())
        view[divmod(index, view.shape[1])] = 0
        after = changed(images)
        others = [i for i in range(6) if i != index]
        assert torch.equal(after[:, others], before[:, others])
        assert (after[:, index] == bias[index]).all()


@KINDS
def test_per_filter_sums_each_filter(kind):
    convolution = trained(CONVOLUTIONS[kind]())[0]
    sums = FilterLayer("", convolution).per_filter(convolution.weight.detach().abs())
    # With positive weights and an image of ones, the middle of each output channel is the sum of its filter.
    ones = copy.deepcopy(convolution)
    ones.weight.data.abs_()
    ones.stride, ones.padding_mode = (1,) * (convolution.weight.ndim - 2), "zeros"
    if ones.bias is not None:
        ones.bias.data.zero_()
    middle = ones(torch.ones_like(images_for(convolution, size=8)))[0]
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums, middle[(slice(None), *[4] * (middle.ndim - 1))])


def test_per_filter_sums_half_precision_in_float32():
    convolution = nn.Conv2d(1, 2, 64, bias=False).half()
    nn.init.constant_(convolution.weight, 1.0)
    sums = FilterLayer("", convolution).per_filter(convolution.weight.detach() * 100)
    assert sums.tolist() == [409600.0, 409600.0]  # beyond half precision


@KINDS
def test_spread_gives_each_filter_its_value(kind):
    convolution = CONVOLUTIONS[kind]()
    layer = FilterLayer("", convolution)
    spread = layer.spread(torch.arange(6.0)) * torch.ones_like(layer.by_filter(convolution.weight))
    assert [spread[divmod(i, spread.shape[1])].unique().tolist() for i in range(6)] == [[float(i)] for i in range(6)]


@KINDS
@pytest.mark.parametrize("affine", [True, False])
def test_zero_kills_the_channel_behind_the_norm_and_no_other(kind, affine):
    convolution = CONVOLUTIONS[kind]()
    net = trained(convolution, BATCH_NORMS[convolution.weight.ndim - 2](6, affine=affine))
    images = images_for(convolution)
    layer, before = one_layer(net, images), net(images)
    assert before.flatten(2).abs().amax(2).min() > 0.01  # no channel is dead from the start
    layer.zero(bools(1, 4))
    after = net(images)
    assert torch.equal(after[:, [0, 2, 3, 5]], before[:, [0, 2, 3, 5]])
    assert (after[:, [1, 4]] == 0).all()
    view = layer.by_filter(layer.weight.detach()).flatten(2).abs().amax(2).flatten()
    assert (view == 0).tolist() == bools(1, 4).tolist()


@KINDS
def test_zero_without_a_norm_kills_the_convolutions_output(kind):
    net = trained(CONVOLUTIONS[kind]())
    images = images_for(net[0])
    layer, before = one_layer(net, images), net(images)
    layer.zero(bools(0, 5))
    after = net(images)
    assert torch.equal(after[:, 1:5], before[:, 1:5])
    assert (after[:, [0, 5]] == 0).all()


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(6),
        nn.BatchNorm2d(6, affine=False),
        nn.InstanceNorm2d(6),
        nn.InstanceNorm2d(6, affine=True),
        nn.InstanceNorm2d(6, track_running_stats=True),
        nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
    ],
    ids=str,
)
def test_norms_that_keep_channels_apart(norm):
    net = trained(nn.Conv2d(3, 6, 3), norm)
    images = images_for(net[0])
    layer, before = one_layer(net, images), net(images)
    layer.zero(bools(2))
    after = net(images)
    assert torch.equal(after[:, [0, 1, 3, 4, 5]], before[:, [0, 1, 3, 4, 5]])
    assert (after[:, 2] == 0).all()


@pytest.mark.parametrize(
    "norm", [nn.GroupNorm(3, 6), nn.GroupNorm(1, 6), LayerNorm2d(6), nn.LayerNorm((6, 4, 4))], ids=str
)
def test_norms_that_share_statistics_among_channels(norm):
    net = trained(nn.Conv2d(3, 6, 3), norm)
    images = images_for(net[0])
    original = copy.deepcopy(norm)
    zeroed = net[0](images).index_fill(1, torch.tensor([2, 3]), 0.0)
    one_layer(net, images).zero(bools(2, 3))
    after = net(images)
    assert (after[:, [2, 3]] == 0).all()
    assert torch.equal(after[:, [0, 1, 4, 5]], original(zeroed)[:, [0, 1, 4, 5]])


@KINDS
@pytest.mark.parametrize("norm", ["affine", "not affine", "none"])
def test_substituting_what_scaled_yields_multiplies_the_channel(kind, norm):
    convolution = CONVOLUTIONS[kind]()
    norms = [] if norm == "none" else [BATCH_NORMS[convolution.weight.ndim - 2](6, affine=norm == "affine")]
    net = trained(convolution, *norms)
    images = images_for(convolution)
    layer, before = one_layer(net, images), net(images).detach()
    weight = convolution.weight
    scales = torch.tensor([0.0, 0.25, 0.5, 1.0, 0.75, 0.1])
    displaced = [(channels, channels.substitute(scaled)) for channels, scaled in layer.scaled(scales)]
    after = net(images)
    for channels, tensor in displaced:
        channels.substitute(tensor)
    torch.testing.assert_close(after, before * scales.view(6, *(1,) * (before.ndim - 2)))
    assert (after[:, 0] == 0).all()
    assert torch.equal(net(images), before)
    assert convolution.weight is weight


def test_gates_are_the_norms_where_there_are_any():
    images = torch.rand(1, 1, 5, 5)
    gated = one_layer(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).eval(), images)
    assert [gate.attribute for gate in gated.gates] == ["weight", "bias"]
    assert [companion.attribute for companion in gated.companions] == ["bias", "weight", "bias"]
    assert gated.offsets == ()
    bare = one_layer(nn.Sequential(nn.Conv2d(1, 2, 3, bias=False)), images)
    assert (bare.gates, bare.bias, bare.companions, bare.channels) == ((), (), (), 2)


def test_a_channel_tensor_puts_channels_first():
    owner = nn.LayerNorm((2, 3))
    tensor = ChannelTensor(owner, "weight", axis=1)
    assert tensor.tensor is owner.weight
    assert tensor.by_channel().shape == (3, 2)
    assert torch.equal(tensor.by_channel(torch.arange(6).view(2, 3)), torch.tensor([[0, 3], [1, 4], [2, 5]]))


def test_a_channel_tensor_that_is_not_there_cannot_be_substituted():
    norm = nn.BatchNorm2d(2, affine=False)
    with pytest.raises(AttributeError, match="BatchNorm2d has no tensor 'weight' to substitute"):
        ChannelTensor(norm, "weight").substitute(torch.ones(2))
    assert norm.weight is None

"""Channels that are scaled, for a while or for good."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_unlearn.filters import FilterMask, find_filters
from tests.filters.mixed_nets import FACTORS, TOTAL, bits, build, images, mask_of


@settings(max_examples=30, deadline=None)
@given(
    factors=st.lists(FACTORS, min_size=TOTAL, max_size=TOTAL),
    zero_below=st.sampled_from([0.0, 0.3]),
    pruned=st.sets(st.integers(0, TOTAL - 1), max_size=3),
)
def test_fold_leaves_what_scaled_showed(factors, zero_below, pruned):
    net, scales = build(), torch.tensor(factors)
    mask = mask_of(net)
    mask.prune([mask.locate(index) for index in pruned])
    with torch.no_grad(), mask.scaled(scales * (scales > zero_below)):
        shown = net(images())
    mask.fold(scales, zero_below=zero_below)
    with torch.no_grad():
        assert torch.equal(net(images()), shown)
    assert mask.flat().tolist() == [index in pruned or factor <= zero_below for index, factor in enumerate(factors)]


@pytest.mark.parametrize("name", ["preact", "vgg", "grouped", "plain", "group_norm"])
@pytest.mark.parametrize("channels", [1, 3])
def test_fold_leaves_what_scaled_showed_in_other_nets(make_net, name, channels):
    net, batch = make_net(name, channels=channels), torch.rand(2, channels, 8, 8)
    mask = FilterMask(find_filters(net, batch))
    scales = torch.rand(mask.total).clamp(min=0.2)
    with torch.no_grad(), mask.scaled(scales):
        shown = net(batch)
    original = net(batch)
    mask.fold(scales)
    assert torch.equal(net(batch), shown)
    assert not torch.allclose(shown, original)
    assert mask.pruned == ()


class Around(nn.Module):
    """A stem whose channels also go past the norm that consumes them."""

    def __init__(self, norm):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3)
        self.norm = norm

    def forward(self, images):
        past = self.stem(images)
        self.shown = past, self.norm(past)
        return torch.cat(self.shown, 1).mean((2, 3))


@pytest.mark.parametrize("factor", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.InstanceNorm2d(4, affine=True), nn.GroupNorm(2, 4)], ids=str)
def test_a_channel_is_scaled_past_its_norm_too(norm, factor):
    torch.manual_seed(0)
    nn.init.uniform_(norm.weight, 0.5, 2.0)
    nn.init.uniform_(norm.bias, -1.0, 1.0)
    net, batch = Around(norm).eval(), torch.rand(2, 1, 8, 8)
    mask = FilterMask(find_filters(net, batch))
    scales = torch.tensor([factor, 1.0, 1.0, 1.0])
    with torch.no_grad():
        net(batch)
        around, through = (shown[:, 0] for shown in net.shown)
        with mask.scaled(scales):
            answers = net(batch)
        torch.testing.assert_close(net.shown[0][:, 0], factor * around)
        if not isinstance(norm, nn.GroupNorm):  # in whose statistics a scaled channel counts less
            torch.testing.assert_close(net.shown[1][:, 0], factor * through, rtol=0.01, atol=1e-3)
        elif factor == 0:
            assert not net.shown[1][:, 0].any()
        mask.fold(scales)
        assert torch.equal(net(batch), answers)


def test_fold_by_one_changes_no_output():
    net, batch = build(), images()
    before = net(batch)
    mask = mask_of(net)
    mask.fold(torch.ones(TOTAL))
    assert torch.equal(net(batch), before)
    assert (mask.steps, mask.pruned) == (1, ())


def test_fold_by_hand():
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 1)).eval()
    for parameter in net.parameters():
        nn.init.constant_(parameter, 8.0)
    mask = FilterMask(find_filters(net, torch.rand(1, 1, 2, 2)))
    mask.fold(torch.tensor([0.5, 0.125, 0.25, 0.0]), zero_below=0.125)
    assert net[0].weight.flatten().tolist() == [8.0, 0.0]
    assert net[0].bias.tolist() == [8.0, 0.0]
    assert net[1].weight.tolist() == [4.0, 0.0]
    assert net[1].bias.tolist() == [4.0, 0.0]
    assert net[3].weight.flatten().tolist() == [2.0, 2.0, 0.0, 0.0]
    assert net[3].bias.tolist() == [2.0, 0.0]
    assert mask.pruned == (("0", 1), ("3", 1))


def test_scaled_multiplies_each_channel():
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)).eval()
    nn.init.normal_(net[1].bias)
    nn.init.normal_(net[1].running_mean)
    mask, batch = FilterMask(find_filters(net, torch.rand(1, 1, 4, 4))), torch.rand(3, 1, 4, 4)
    before = net(batch)
    with mask.scaled(torch.tensor([0.5, 2.0])):
        torch.testing.assert_close(net(batch), before * torch.tensor([0.5, 2.0]).view(1, 2, 1, 1))
    assert torch.equal(net(batch), before)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_scaled_puts_everything_back_after_an_exception(error):
    net, batch = build(), images()
    mask, before, state = mask_of(net), net(batch), bits(net)
    tensors = [*net.parameters(), *net.buffers()]

    def fail():
        with mask.scaled(torch.full((TOTAL,), 0.5)):
            assert not torch.equal(net(batch), before)
            raise error("inside")

    with pytest.raises(error, match="inside"):
        fail()
    assert [*map(id, net.parameters()), *map(id, net.buffers())] == [*map(id, tensors)]
    assert all(isinstance(parameter, nn.Parameter) for parameter in net.parameters())
    assert bits(net) == state
    assert torch.equal(net(batch), before)


def test_scaled_puts_everything_back_if_it_fails_half_way():
    net = build()
    mask, before = mask_of(net), [*map(id, net.parameters())]
    last = mask.layers[-1]
    weight, last.convolution.weight.data = last.convolution.weight.data, torch.ones(1, 1, 1, 1)
    with pytest.raises(RuntimeError, match="invalid for input of size 1"), mask.scaled(torch.ones(TOTAL)):
        pass
    last.convolution.weight.data = weight
    assert [*map(id, net.parameters())] == before


@pytest.mark.parametrize("name", ["preact", "vgg", "grouped", "plain", "group_norm", "mixed"])
def test_scaled_is_differentiable_in_the_scales(make_net, name):
    net = build(dtype=torch.float64) if name == "mixed" else make_net(name, channels=2).double()
    batch = images(torch.float64)
    mask = FilterMask(find_filters(net, batch))

    def loss(scales):
        with mask.scaled(scales):
            return net(batch).square().sum()

    for low in (0.3, 1.0):
        scales = torch.linspace(low, 1, mask.total, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(loss, scales)
        (gradient,) = torch.autograd.grad(loss(scales), scales)
        assert gradient.count_nonzero() > mask.total // 2
    assert all(parameter.grad is None for parameter in net.parameters())


def test_scaled_with_gradients_shows_the_same_as_without():
    net, batch = build(), images()
    mask, scales = mask_of(net), torch.linspace(0, 1, TOTAL)
    with torch.no_grad(), mask.scaled(scales):
        plain = net(batch)
    with mask.scaled(scales.clone().requires_grad_()):
        torch.testing.assert_close(net(batch).detach(), plain)


@pytest.mark.parametrize("size", [TOTAL - 1, TOTAL + 1, (TOTAL, 1)])
@pytest.mark.parametrize("use", [FilterMask.fold, FilterMask.split, lambda mask, flat: mask.scaled(flat).__enter__()])
def test_scales_of_another_size(size, use):
    net = build()
    mask, state = mask_of(net), bits(net)
    with pytest.raises(
        ValueError, match=r"flat: expected one value for each of the 18 filters, shape \(18,\), but got"
    ):
        use(mask, torch.ones(size))
    assert bits(net) == state
    assert mask.steps == 0


def test_a_filter_that_fold_prunes_counts_no_longer_in_a_group_norm(make_net):
    net, twin, batch = make_net("group_norm"), make_net("group_norm"), torch.rand(2, 1, 8, 8)
    mask, other = FilterMask(find_filters(net, batch)), FilterMask(find_filters(twin, batch))
    scales = torch.linspace(0, 1, mask.total)
    mask.fold(scales)
    other.prune([other.locate(0)])
    with other.scaled(scales):
        assert torch.equal(net(batch), twin(batch))

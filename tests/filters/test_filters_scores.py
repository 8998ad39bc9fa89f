from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the usual name
from torch.utils.checkpoint import checkpoint

from lightning_unlearn.filters import FilterMask, find_filters, mean_abs_gradient, score_filters, taylor
from lightning_unlearn.filters.scores import SCORES
from tests.filters import mixed_nets

# Every loss here is Σ a_c · out_c over all places of all images, unless it says otherwise.


def with_values(module, weight, bias=None):
    module.weight.data = torch.tensor(weight).view_as(module.weight)
    if bias is not None:
        module.bias.data = torch.tensor(bias)
    return module


def scores_of(net, images, factors):
    layers = find_filters(net.eval(), images)

    def losses():
        out = net(images)
        yield (out * torch.tensor(factors).view(-1, *(1,) * (out.ndim - 2))).sum()

    return {score: score_filters(layers, losses(), score).tolist() for score in SCORES}


def test_convolution_by_hand():
    # out_c[t] = w_c0 x_t + w_c1 x_t+1 + b_c for t = 0, 1, so ∂L/∂w_c = a_c (x_0 + x_1, x_1 + x_2), ∂L/∂b_c = 2 a_c.
    net = nn.Sequential(with_values(nn.Conv1d(1, 3, 2), [1.0, 2.0, -1.0, 0.5, 0.0, 3.0], [0.5, -1.0, 2.0]))
    found = scores_of(net, torch.tensor([[[1.0, -2.0, 4.0]]]), [1.0, -2.0, 0.5])
    # ∂L/∂w = a_c · (-1, 2): mean of |.| is 1.5 |a_c|
    assert found["mean_abs_grad"] == [1.5, 3.0, 0.75]
    # a_c · (-w_c0 + 2 w_c1 + 2 b_c) = 1 · (-1 + 4 + 1), -2 · (1 + 1 - 2), 0.5 · (0 + 6 + 4)
    assert found["taylor"] == [4.0, 0.0, 5.0]


def test_grouped_convolution_by_hand():
    # out_c = w_c x_g with g = c // 2, so ∂L/∂w_c = a_c Σ x_g.
    net = nn.Sequential(with_values(nn.Conv1d(2, 4, 1, groups=2, bias=False), [1.0, 2.0, 3.0, -4.0]))
    found = scores_of(net, torch.tensor([[[1.0, 2.0], [10.0, 20.0]]]), [1.0, -1.0, 2.0, 0.5])
    assert found["mean_abs_grad"] == [3.0, 3.0, 60.0, 15.0]
    assert found["taylor"] == [3.0, -6.0, 180.0, -60.0]


def test_transposed_convolution_by_hand():
    # weight[i, c, k]; out_c[2t + k] = Σ_i w_ick x_i,t + b_c, so ∂L/∂w_ick = a_c Σ_t x_i,t and ∂L/∂b_c = 4 a_c.
    weight = [[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]]  # inputs first
    net = nn.Sequential(with_values(nn.ConvTranspose1d(2, 2, 2, stride=2), weight, [0.25, -0.5]))
    found = scores_of(net, torch.tensor([[[1.0, 1.0], [-3.0, -1.0]]]), [1.0, -3.0])
    # sums are 2 and -4: channel 0 |2 2 -4 -4| / 4, channel 1 three times that
    assert found["mean_abs_grad"] == [3.0, 9.0]
    # 1 · ((1 + 2) · 2 - (5 + 6) · 4 + 0.25 · 4), -3 · ((3 + 4) · 2 - (7 + 8) · 4 - 0.5 · 4)
    assert found["taylor"] == [-37.0, 144.0]


def test_grouped_transposed_convolution_by_hand():
    # weight[i, j] with one input a group: channel 2i + j, and ∂L/∂w = a_c Σ x_i.
    net = nn.Sequential(with_values(nn.ConvTranspose1d(2, 4, 1, groups=2, bias=False), [1.0, 2.0, 3.0, -4.0]))
    found = scores_of(net, torch.tensor([[[1.0, 2.0], [10.0, 20.0]]]), [1.0, -1.0, 2.0, 0.5])
    assert found["mean_abs_grad"] == [3.0, 3.0, 60.0, 15.0]
    assert found["taylor"] == [3.0, -6.0, 180.0, -60.0]


@pytest.mark.parametrize("affine", [True, False])
def test_convolution_with_norm_by_hand(affine):
    # out_c = γ_c (w_c x - μ_c) / 2 + β_c. ∂L/∂w_c = a_c γ_c / 2 · Σ x; Taylor's score is about the whole channel.
    norm = nn.BatchNorm1d(2, eps=1e-30, affine=affine)
    norm.running_mean, norm.running_var = torch.tensor([1.0, -1.0]), torch.tensor([4.0, 4.0])
    gamma, beta = ([3.0, -2.0], [0.5, 1.0]) if affine else ([1.0, 1.0], [0.0, 0.0])
    if affine:
        with_values(norm, gamma, beta)
    net = nn.Sequential(with_values(nn.Conv1d(1, 2, 1, bias=False), [2.0, 5.0]), norm)
    found = scores_of(net, torch.tensor([[[1.0, 3.0]]]), [1.0, -1.0])
    assert found["mean_abs_grad"] == [abs(gamma[0]) / 2 * 4, abs(gamma[1]) / 2 * 4]
    # Σ (w_c x - μ_c) / 2: channel 0 (1 + 5) / 2, channel 1 (6 + 16) / 2
    assert found["taylor"] == [3.0 * gamma[0] + 2 * beta[0], -(11.0 * gamma[1] + 2 * beta[1])]


def test_taylor_predicts_exactly_where_the_loss_is_linear():
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)).eval()
    for tensor in (*net.parameters(), net[1].running_mean):
        nn.init.normal_(tensor)
    images = torch.rand(2, 1, 5, 5)
    layers = find_filters(net, images)
    mask = FilterMask(layers)
    predicted = taylor(layers, (net(images).sum() for _ in range(1)))
    for index in range(3):
        with torch.no_grad():
            before = net(images).sum()
            mask.prune([("0", index)])
            fall = before - net(images).sum()
        mask.undo()
        torch.testing.assert_close(predicted[index], fall, rtol=1e-4, atol=1e-4)


def cross_entropies(net, images, labels, sizes):
    for batch, wanted in zip(torch.split(images, sizes), torch.split(labels, sizes), strict=True):
        yield F.cross_entropy(net(batch), wanted) * len(batch) / len(images)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("name", ["preact", "vgg", "grouped", "plain", "group_norm"])
def test_batches_change_no_score(make_net, name, score):
    net, images, labels = make_net(name, channels=3), torch.rand(9, 3, 8, 8), torch.arange(9) % 4
    layers = find_filters(net, images[:1])
    whole = score_filters(layers, cross_entropies(net, images, labels, [9]), score)
    parts = score_filters(layers, cross_entropies(net, images, labels, [4, 4, 1]), score)
    assert whole.abs().max() > 1e-4
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-7)


def test_absolute_values_are_taken_after_summing():
    net = nn.Sequential(nn.Conv1d(1, 1, 1, bias=False))
    layers = find_filters(net, torch.ones(1, 1, 1))
    losses = (sign * net(torch.ones(1, 1, 1)).sum() for sign in (1, -1, 3))
    assert mean_abs_gradient(layers, losses).tolist() == [3.0]


@pytest.mark.parametrize("name", ["vgg", "grouped", "plain", "group_norm"])
@pytest.mark.parametrize("channels", [1, 3])
def test_taylor_is_the_derivative_of_the_loss_by_a_factor_on_the_channel(make_net, name, channels):
    # The reference puts the factor on what the norm (or else the convolution) gives out, by a hook.
    net, images, labels = make_net(name, channels=channels), torch.rand(5, channels, 8, 8), torch.arange(5) % 4
    layers = find_filters(net, images[:1])
    found = score_filters(layers, cross_entropies(net, images, labels, [5]), "taylor")
    factors = [torch.ones(layer.channels, 1, 1, requires_grad=True) for layer in layers]
    for layer, factor in zip(layers, factors, strict=True):
        module = layer.gates[0].owner if layer.gates else layer.convolution
        module.register_forward_hook(lambda *call, factor=factor: call[-1] * factor)
    expected = torch.autograd.grad(F.cross_entropy(net(images), labels), factors)
    torch.testing.assert_close(found, torch.cat([gradient.flatten() for gradient in expected]))


@pytest.mark.parametrize("name", ["preact", "vgg", "grouped", "plain", "group_norm"])
def test_taylor_is_the_derivative_of_the_loss_by_the_mask(make_net, name):
    net, images, labels = make_net(name).double(), torch.rand(5, 1, 8, 8, dtype=torch.float64), torch.arange(5) % 4
    layers = find_filters(net, images[:1])
    mask = FilterMask(layers)
    found = score_filters(layers, cross_entropies(net, images, labels, [3, 2]), "taylor")
    with torch.no_grad():
        for index in range(mask.total):
            losses = []
            for step in (1e-5, -1e-5):
                scales = torch.ones(mask.total, dtype=torch.float64)
                scales[index] += step
                with mask.scaled(scales):
                    losses.append(F.cross_entropy(net(images), labels))
            torch.testing.assert_close(found[index].double(), (losses[0] - losses[1]) / 2e-5, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("score", SCORES)
def test_scoring_leaves_the_model_alone(make_net, left_alone, score):
    net, images = make_net("grouped"), torch.rand(2, 1, 8, 8)
    layers = find_filters(net, images)
    frozen = next(net.parameters())
    with left_alone(net):
        frozen.requires_grad_(True)
        net.eval()
        score_filters(layers, (net(images).sum() for _ in range(2)), score)
        frozen.requires_grad_(False)
        net.train()
        next(net.children()).eval()


@pytest.mark.parametrize("score", SCORES)
def test_a_layer_that_the_loss_ignores_scores_zero(score):
    net = nn.ModuleList([nn.Conv2d(1, 2, 1), nn.Conv2d(1, 3, 1)])
    images = torch.rand(1, 1, 4, 4)
    layers = find_filters(net, images, forward=lambda x: (net[0](x), net[1](x)))
    found = score_filters(layers, (net[1](images).sum() for _ in range(1)), score)
    assert found.dtype == torch.float32
    assert found[:2].tolist() == [0, 0]
    assert (found[2:] != 0).all()


@pytest.mark.parametrize("score", ["magnitude", "", None])
def test_unknown_score(make_net, score):
    net = make_net("plain")
    layers = find_filters(net, torch.rand(1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"score: expected one of \['mean_abs_grad', 'taylor'\], but got"):
        score_filters(layers, (net(torch.rand(1, 1, 8, 8)).sum() for _ in range(1)), score)


@pytest.mark.parametrize("score", SCORES)
def test_no_losses(make_net, score):
    layers = find_filters(make_net("plain"), torch.rand(1, 1, 8, 8))
    with pytest.raises(ValueError, match="losses: there is no batch to score"):
        score_filters(layers, iter([]), score)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
    "cut", [lambda out: out.detach().sum(), lambda out: (0 * out.detach() + torch.ones(1, requires_grad=True)).sum()]
)
def test_losses_that_depend_on_no_filter(make_net, score, cut):
    net = make_net("plain")
    layers = find_filters(net, torch.rand(1, 1, 8, 8))
    with pytest.raises(ValueError, match="model: the loss does not depend on any filter"):
        score_filters(layers, (cut(net(torch.rand(1, 1, 8, 8))) for _ in range(1)), score)


def test_losses_made_beforehand_are_refused_by_taylor(make_net):
    net = make_net("plain")
    layers = find_filters(net, torch.rand(1, 1, 8, 8))
    with pytest.raises(ValueError, match="the loss does not depend on any filter"):
        taylor(layers, [net(torch.rand(1, 1, 8, 8)).sum()])


@pytest.mark.parametrize("score", SCORES)
def test_gradient_checkpointing_changes_no_score(score):
    """The backward pass computes the forward pass again, in which a scaled running mean is no torch norm's."""
    net, images = mixed_nets.build(), mixed_nets.images()
    layers = find_filters(net, images)
    assert any(layer.offsets for layer in layers)
    plain, again = (
        score_filters(layers, (forward(images)[:, 0].sum() for _ in range(1)), score)
        for forward in (net, lambda images: checkpoint(net, images, use_reentrant=False))
    )
    assert plain.count_nonzero()
    assert torch.equal(plain, again)

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the usual name
from torch.nn.utils import parametrizations, prune

from lightning_unlearn.filters import find_filters
from tests.filters.small_parts import Net, conv, norm


def test_no_convolution():
    with pytest.raises(ValueError, match=r"model: Sequential ran no convolution on images of shape \(1, 1, 2, 2\)"):
        find_filters(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), torch.rand(1, 1, 2, 2))


def test_a_convolution_that_never_runs_is_no_convolution():
    with pytest.raises(ValueError, match="ran no convolution"):
        find_filters(Net(lambda net, x: x, a=conv()), torch.rand(1, 2, 4, 4))


@pytest.mark.parametrize("part", [0, 2])
def test_pruned_models_are_refused(part):
    net = nn.Sequential(conv(), nn.ReLU(), nn.Linear(4, 2))
    prune.random_unstructured(net[part], "weight", 0.5)
    with pytest.raises(ValueError, match=r"pruned with torch\.nn\.utils\.prune.*prune\.remove"):
        find_filters(net, torch.rand(1, 2, 4, 4))
    prune.remove(net[part], "weight")
    assert len(find_filters(net, torch.rand(1, 2, 4, 4))) == 1


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`")
@pytest.mark.parametrize(
    ("parametrize", "remove"),
    [
        (parametrizations.weight_norm, "parametrize.remove_parametrizations(module, 'weight')"),
        (parametrizations.spectral_norm, "parametrize.remove_parametrizations(module, 'weight')"),
        (nn.utils.weight_norm, "remove_weight_norm(module)"),
        (nn.utils.spectral_norm, "remove_spectral_norm(module)"),
    ],
)
def test_parametrised_convolutions_are_refused(parametrize, remove):
    net = nn.Sequential(conv(), nn.Sequential(parametrize(conv()))).eval()
    with pytest.raises(ValueError, match=r"model: the weight of convolution '1\.0' is computed by .* call") as refused:
        find_filters(net, torch.rand(1, 2, 4, 4))
    assert f"call torch.nn.utils.{remove} first" in str(refused.value)
    eval(f"nn.utils.{remove}", {"nn": nn, "module": net[1][0]})
    assert len(find_filters(net, torch.rand(1, 2, 4, 4))) == 2


def test_a_parametrised_linear_layer_is_no_obstacle():
    net = nn.Sequential(conv(), nn.Flatten(), parametrizations.weight_norm(nn.Linear(32, 2))).eval()
    assert len(find_filters(net, torch.rand(1, 2, 4, 4))) == 1


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize(
    "script", [torch.jit.script, lambda net: torch.jit.trace(net, torch.rand(1, 2, 4, 4))], ids=["script", "trace"]
)
def test_scripted_models_are_refused(script):
    with pytest.raises(ValueError, match="model: a scripted module cannot be traced; pass the eager module"):
        find_filters(script(nn.Sequential(conv()).eval()), torch.rand(1, 2, 4, 4))


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_scripted_parts_are_refused():
    with pytest.raises(ValueError, match="model: a scripted module cannot be traced, as '1' is; pass the eager module"):
        find_filters(nn.Sequential(conv(), torch.jit.script(conv())), torch.rand(1, 2, 4, 4))
    with_scripted_activation = nn.Sequential(conv(), torch.jit.script(nn.ReLU()))
    assert len(find_filters(with_scripted_activation, torch.rand(1, 2, 4, 4))) == 1


class Standardised(nn.Conv2d):
    """Weight standardisation."""

    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias, padding=1)


def test_weights_that_a_forward_computes():
    images, part = torch.rand(1, 2, 4, 4), Standardised(2, 2, 3)
    with pytest.raises(ValueError, match=r"model: 2 convolutions run with a weight.*computes.*'0', '1'.*put what"):
        find_filters(nn.Sequential(part, Standardised(2, 2, 3)), images)
    with pytest.warns(UserWarning, match=r"model: 1 convolution runs with a weight.*'1'.*They are left alone"):
        assert [layer.name for layer in find_filters(nn.Sequential(conv(), part), images)] == ["0"]
    with pytest.raises(ValueError, match=r"model: 1 convolution runs with a weight.*computes"):
        find_filters(Net(lambda net, x: F.conv2d(x, net.a.weight.view(2, 2, 1, 1)), a=nn.Linear(2, 2)), images)


def test_a_fixed_blur_is_no_convolution_to_prune():
    blur = torch.ones(1, 1, 3, 3) / 9
    net = Net(lambda net, x: F.conv2d(net.a(x), blur.expand(2, 1, 3, 3), groups=2), a=conv())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(find_filters(net, torch.rand(1, 2, 4, 4))) == 1


def test_convolutions_of_one_weight_are_refused():
    net = nn.Sequential(conv(), conv(), conv())
    net[2].weight = net[1].weight
    with pytest.raises(ValueError, match=r"model: convolutions '1' and '2' share one weight.*nn\.Parameter"):
        find_filters(net, torch.rand(1, 2, 4, 4))


@pytest.mark.parametrize("affine", [True, False])
def test_norms_that_look_at_the_batch_are_refused(affine):
    images = torch.rand(1, 2, 4, 4)
    net = nn.Sequential(conv(), norm(), conv(), nn.BatchNorm2d(2, affine=affine, track_running_stats=False))
    assert len(find_filters(net.train(), images)) == 2
    with pytest.raises(ValueError, match=r"model: batch norm '3' takes.*track_running_stats=True.*Group"):
        find_filters(net.eval(), images)
    with pytest.raises(ValueError, match="model: a batch norm takes its statistics"):
        find_filters(Net(lambda net, x: F.batch_norm(net.a(x), None, None, training=True), a=conv()).eval(), images)

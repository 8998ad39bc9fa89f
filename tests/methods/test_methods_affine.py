from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_unlearn.filters import FilterMask, find_filters
from lightning_unlearn.methods.affine import find_gammas, gradient_of, refuse_without_gammas, scaled_affine
from lightning_unlearn.triggers import PatchTrigger

NETS = ("preact", "vgg", "grouped", "plain", "group_norm")


class TwoNorms(nn.Module):
    """One convolution that two norms consume."""

    def __init__(self):
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        x = self.conv(x)
        return self.first(x) + self.second(x)


class ImageNorm(nn.Module):
    """A LayerNorm whose γ and β have one entry for each place of each channel."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 3, 1), nn.LayerNorm([3, 2, 2])

    def forward(self, x):
        return self.norm(self.conv(x))


def mask_of(net, images):
    return FilterMask(find_filters(net.eval(), images))


def inside(net, mask, *factors):
    with scaled_affine(mask, *factors):
        return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}


def test_gammas_and_betas_by_hand():
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 1, 1))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([2.0, 4.0]))
        net[1].bias.copy_(torch.tensor([1.0, -1.0]))
    mask = mask_of(net, torch.rand(1, 1, 2, 2))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    both = inside(net, mask, torch.tensor([0.5, 0.25, 9.0]), torch.tensor([3.0, 2.0, 9.0]))
    gammas = inside(net, mask, torch.tensor([0.5, 0.25, 9.0]))
    assert both.pop("1.weight").tolist() == gammas.pop("1.weight").tolist() == [1.0, 1.0]
    assert both.pop("1.bias").tolist() == [3.0, -2.0]
    assert gammas.pop("1.bias").tolist() == [1.0, -1.0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in both.items())  # the bare convolution among them
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize(("net", "norms"), [(TwoNorms(), ("first", "second")), (ImageNorm(), ("norm",))])
def test_every_norm_of_a_channel(net, norms):
    factors = torch.tensor([0.0, 0.5, 1.0])
    for module in net.children():
        nn.init.constant_(module.bias, 2.0)
    found = inside(net, mask_of(net, torch.rand(1, 1, 2, 2)), factors, 1 - factors)
    for norm in norms:
        assert found[f"{norm}.weight"].flatten().tolist() == (
            [0.0] * 4 + [0.5] * 4 + [1.0] * 4 if norm == "norm" else [0.0, 0.5, 1.0]
        )
        assert torch.equal(found[f"{norm}.bias"], 2 - 2 * found[f"{norm}.weight"])


def test_gradients_reach_the_factors():
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    mask, images = mask_of(net, torch.rand(1, 1, 2, 2)), torch.rand(4, 1, 2, 2)
    factors = torch.tensor([0.5, 2.0], requires_grad=True)
    with scaled_affine(mask, factors):
        loss = net(images).sum()
    with torch.no_grad():
        wanted = net(images).sum((0, 2, 3))  # γ = 1, β = 0
    assert torch.allclose(gradient_of(loss, factors), wanted, rtol=1e-4, atol=1e-5)
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types(dtype):
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)).to(dtype)
    mask = mask_of(net, torch.rand(1, 1, 2, 2, dtype=dtype))
    with scaled_affine(mask, torch.ones(2), torch.ones(2)):
        assert net(torch.rand(1, 1, 2, 2, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("name", NETS)
def test_put_back_after_an_exception(make_net, name):
    net = make_net(name)
    mask, parameters = mask_of(net, torch.rand(1, 1, 8, 8)), list(net.parameters())

    def fail():
        with scaled_affine(mask, torch.zeros(mask.total), torch.zeros(mask.total)):
            changed = any(now is not was for now, was in zip(net.parameters(), parameters, strict=True))
            assert changed == (name != "plain")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert all(now is was for now, was in zip(net.parameters(), parameters, strict=True))


def test_put_back_when_the_factors_do_not_fit(make_net):
    net = make_net("vgg")
    mask, parameters = mask_of(net, torch.rand(1, 1, 8, 8)), list(net.parameters())
    with pytest.raises(ValueError, match=r"^flat: "), scaled_affine(mask, torch.ones(3)):
        pass
    assert all(now is was for now, was in zip(net.parameters(), parameters, strict=True))


def test_which_layers_have_gammas(make_net, make_clean, make_task):
    task = make_task(make_net("preact"), make_clean(4), PatchTrigger())
    assert {layer.name: len(find_gammas(layer)) for layer in task.mask.layers} == {
        **{"0": 1, "1.conv1": 1, "1.conv2": 0, "1.shortcut": 0},
        **{"2.conv1": 1, "2.conv2": 0, "2.shortcut": 0},
    }
    refuse_without_gammas(task.subject, "Method")


def test_no_gammas_anywhere(make_net, make_clean, make_task):
    task = make_task(make_net("plain"), make_clean(4), PatchTrigger())
    match = r"^model: Method needs affine norms.*none of the convolutions of Sequential \(0, 3\).*MaskPrune"
    with pytest.raises(ValueError, match=match):
        refuse_without_gammas(task.subject, "Method")


def test_a_loss_without_gradient():
    factors = torch.ones(2, requires_grad=True)
    for loss in (torch.tensor(1.0), torch.ones(2, requires_grad=True).sum()):
        with pytest.raises(ValueError, match=r"^model: the loss does not depend on the norms"):
            gradient_of(loss, factors)

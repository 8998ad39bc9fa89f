from __future__ import annotations

import contextlib
import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from lightning_unlearn.intact import intact


@pytest.fixture
def model(make_net):
    """With training flags, frozen parameters and gradients as mixed as can be."""
    net = make_net("vgg").train()
    net[1].eval()
    net[5].eval()
    for number, parameter in enumerate(net.parameters()):
        parameter.requires_grad_(number % 3 != 0)
        if number % 2:
            parameter.grad = torch.full_like(parameter, float(number))
    net.register_buffer("counter", torch.tensor([1, 2]))
    return net


def flags(model):
    return [module.training for module in model.modules()]


def train_a_little(model):
    # Momentum 0.9 and several steps, as a repair would: everything that can change, does.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    loss = model(torch.rand(4, 1, 8, 8)).square().sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        model.counter.add_(1)


def test_inside_the_model_is_in_eval_mode_and_has_gradients(model):
    with intact(model) as before:
        assert not any(flags(model))
        assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
        model(torch.rand(2, 1, 8, 8)).sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        assert before.keys() == model.state_dict().keys()
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        model[0].weight.data.zero_()
        assert before["0.weight"].abs().max() > 0  # a copy
        assert not any(tensor.requires_grad for tensor in before.values())


def test_flags_and_gradients_come_back_and_weights_stay_changed(model):
    training, state = flags(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert True in training
    assert False in training
    requires_grad = [parameter.requires_grad for parameter in model.parameters()]
    grads = [parameter.grad for parameter in model.parameters()]
    values = [None if grad is None else grad.clone() for grad in grads]
    with intact(model):
        train_a_little(model)
        changed = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert flags(model) == training
    assert [parameter.requires_grad for parameter in model.parameters()] == requires_grad
    for parameter, grad, value in zip(model.parameters(), grads, values, strict=True):
        assert parameter.grad is grad
        assert grad is None or torch.equal(grad, value)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, changed[name])
        assert not torch.equal(tensor, state[name])


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_after_an_exception_nothing_has_happened(model, left_alone, error):
    model[0].weight.data[0, 0, 0, 0] = torch.nan
    model[1].running_mean[0] = torch.inf

    def fail():
        with intact(model):
            train_a_little(model)
            raise error("inside")

    with left_alone(model):
        generator = torch.get_rng_state()
        with pytest.raises(error, match="inside"):
            fail()
        assert torch.equal(torch.get_rng_state(), generator)


def test_a_block_that_does_nothing_leaves_no_trace(model, left_alone):
    with left_alone(model), intact(model):
        pass


def test_a_frozen_model_gets_gradients_and_is_frozen_again(make_net):
    net = make_net("preact").requires_grad_(False)
    with intact(net):
        gradients = torch.autograd.grad(net(torch.rand(2, 1, 8, 8)).square().sum(), list(net.parameters()))
        assert all(gradient.abs().max() > 0 for gradient in gradients)
    assert not any(parameter.requires_grad for parameter in net.parameters())


def test_integer_parameters_are_no_obstacle():
    net = nn.Sequential(nn.Linear(2, 2))
    net.register_parameter("codes", nn.Parameter(torch.tensor([3, 4]), requires_grad=False))

    def fail():
        with intact(net):
            net.codes.data += 1
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    assert net.codes.tolist() == [3, 4]
    assert not net.codes.requires_grad


def test_the_global_random_state_comes_back(model):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with intact(model):
        assert torch.equal(torch.rand(4), expected)  # inside it goes on from where it was
        torch.manual_seed(99)
        torch.rand(5)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize(("seed", "draw"), [(random.seed, random.random), (np.random.seed, np.random.rand)])
@pytest.mark.parametrize("fails", [False, True])
def test_pythons_and_numpys_random_states_come_back(model, seed, draw, fails):
    seed(3)
    expected = draw()
    seed(3)
    with contextlib.suppress(ValueError), intact(model):
        assert draw() == expected  # inside it goes on from where it was
        if fails:
            raise ValueError("inside")
    assert draw() == expected


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("fails", [False, True])
def test_inside_a_validation_loop(model, mode, fails):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def work():
        with intact(model):
            assert torch.is_grad_enabled()
            assert not torch.is_inference_mode_enabled()
            train_a_little(model)
            if fails:
                raise ValueError("inside")

    with mode():
        if fails:
            with pytest.raises(ValueError, match="inside"):
                work()
        else:
            work()
        assert not torch.is_grad_enabled()
        assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]) == fails
        assert not tensor.is_inference()
    model.requires_grad_(True)
    model(torch.rand(2, 1, 8, 8)).sum().backward()  # training can go on


def test_shared_parameters_and_modules_that_appear_twice():
    shared = nn.Linear(2, 2)
    net = nn.Sequential(shared, nn.ReLU(), shared)
    weight = shared.weight.detach().clone()

    def fail():
        with intact(net) as before:
            assert before.keys() == net.state_dict().keys()
            assert before["0.weight"] is before["2.weight"]
            shared.weight.data.zero_()
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    assert torch.equal(shared.weight, weight)
    assert net[2].weight is shared.weight


def test_autocast_from_outside_does_not_reach_in(model):
    images = torch.rand(2, 1, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(images).dtype == torch.bfloat16
        with intact(model):
            assert model(images).dtype == torch.float32
        assert model(images).dtype == torch.bfloat16


def test_a_second_ctrl_c_while_putting_back(monkeypatch):
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before, copies = copy.deepcopy(net.state_dict()), []
    copy_ = torch.Tensor.copy_

    def impatient(tensor, *args):
        copies.append(tensor)
        if len(copies) == 3:
            raise KeyboardInterrupt
        return copy_(tensor, *args)

    def work():
        with intact(net):
            for parameter in net.parameters():
                parameter.data.zero_()
            monkeypatch.setattr(torch.Tensor, "copy_", impatient)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert len(copies) == 3 + 4
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


class Counting(nn.Module):
    """Puts a new buffer in the old one's place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("nothing", None)

    def forward(self, images):
        self.seen = self.seen + len(images)
        self.nothing = torch.ones(1)
        return images


def test_after_an_exception_the_very_same_buffers_are_there():
    net = nn.Sequential(Counting())
    seen = net[0].seen

    def fail():
        with intact(net):
            net(torch.rand(2, 1))
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    assert net[0].seen is seen
    assert seen == 0
    assert net[0].nothing is None


def test_a_buffer_whose_numbers_are_one_hides_no_exception():
    net, one = nn.Linear(2, 2), torch.tensor([0.5])
    net.register_buffer("mean", one[:, None].expand(1, 3, 4))

    def fail():
        with intact(net):
            one.fill_(7)
            raise KeyError("the true error")

    with pytest.raises(KeyError, match="the true error"):
        fail()
    assert torch.equal(net.mean, torch.full((1, 3, 4), 0.5))


@pytest.mark.parametrize("fails", [False, True])
def test_new_tensors_are_float32_whatever_lightnings_precision_says(fails):
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(KeyError) if fails else contextlib.nullcontext(), intact(nn.Linear(2, 2)):
            assert torch.ones(1).dtype == torch.float32
            if fails:
                raise KeyError
        assert torch.ones(1).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="torch before 2.6 compiles whatever is compiled")
def test_hooks_reach_parts_that_ran_compiled_before(make_net):
    torch._dynamo.reset()
    net = make_net("vgg")
    part, seen = nn.Sequential(torch.compile(net, backend="eager")), []
    images = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        part(images)
        handle = net[0].register_forward_hook(lambda *_: seen.append(1))
        with intact(part), torch.no_grad():
            part(images)
        handle.remove()
    assert seen == [1]


def test_weights_that_cannot_change_are_refused(make_net):
    with torch.inference_mode():
        fixed = make_net("vgg")
    with (
        pytest.raises(ValueError, match=r"^model: its '0.weight' was made inside torch.inference_mode.*deepcopy"),
        intact(fixed),
    ):
        pass
    with intact(copy.deepcopy(fixed)) as original:  # what the error advises
        assert original
    with pytest.raises(ValueError, match=r"^model: its '0.weight' is on the meta device"), intact(fixed.to("meta")):
        pass

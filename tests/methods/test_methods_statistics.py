from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_unlearn.methods.statistics import following, has_statistics, observed, settle


def norm(kind=nn.BatchNorm2d, **options):
    """Three channels, as if it was trained."""
    made = kind(3, **options).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (
            *made.parameters(),
            *([made.running_mean, made.running_var] if made.running_var is not None else []),
        ):
            tensor.copy_(torch.rand(3, generator=generator) + 0.5)
    return made.eval()


def rows(count=4, shape=(5, 5)):
    return torch.randn(count, 3, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 + 1


def seen_by(model, images):
    with observed(model) as seen, torch.no_grad():
        model(images)
    return seen


def hooks(model):
    return [hook for module in model.modules() for hook in (*module._forward_pre_hooks, *module._forward_hooks)]


# Following


@pytest.mark.parametrize(
    ("kind", "shape"),
    [(nn.BatchNorm1d, ()), (nn.BatchNorm1d, (6,)), (nn.BatchNorm2d, (5, 5)), (nn.BatchNorm3d, (2, 2, 3))],
)
@pytest.mark.parametrize("affine", [False, True])
def test_where_nothing_has_changed_nothing_does(kind, shape, affine):
    model, images = norm(kind, affine=affine).float(), rows(shape=shape).float()
    seen, expected = seen_by(model, images), model(images)
    with following(model, seen) as became:
        assert torch.equal(model(images), expected)
    for now, old in zip(became[model], (model.running_mean, model.running_var), strict=True):
        assert torch.equal(now, old)
    assert torch.equal(model(images), expected)
    before = copy.deepcopy(model.state_dict())
    settle(model, model, [images, images], [seen, seen])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_change_of_scale_and_place_is_taken_out():
    model, images = norm(eps=1e-12), rows()
    with following(model, seen_by(model, images)) as became:
        found = model(images * 0.3 + 5)
    torch.testing.assert_close(found, model(images), rtol=1e-9, atol=1e-9)  # in float64
    mean, variance = became[model]
    torch.testing.assert_close(mean, model.running_mean * 0.3 + 5, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(variance, model.running_var * 0.3**2, rtol=1e-9, atol=1e-9)


def test_by_hand():
    model = nn.BatchNorm1d(1, eps=1.75).eval()  # with which all that follows is exact
    model.running_mean.fill_(1.0)
    model.running_var.fill_(14.25)
    (entry,) = seen_by(model, torch.tensor([[1.0], [3.0]]))[model]
    seen = {model: [entry._replace(mean=torch.tensor([2.0]), variance=torch.tensor([14.25]))]}
    # Now the mean is 10, and the variance, with ε, 4 instead of 16: σ halves, as does the 1 from running mean to mean.
    with following(model, seen) as became:
        found = model(torch.tensor([[8.5], [11.5]]))
    assert [statistic.item() for statistic in became[model]] == [9.5, 2.25]
    torch.testing.assert_close(found, torch.tensor([[-0.5], [1.0]]))


def test_if_the_images_had_the_running_statistics_it_is_train_mode_also_in_its_gradient():
    images, other = rows(), rows() ** 2
    model = norm()
    model.running_mean.copy_(images.mean((0, 2, 3)))
    model.running_var.copy_(images.var((0, 2, 3), correction=0))
    given = [other.clone().requires_grad_() for _ in range(2)]
    trained = copy.deepcopy(model).train()(given[0])
    with following(model, seen_by(model, images)):
        found = model(given[1])
    torch.testing.assert_close(found, trained, rtol=1e-5, atol=1e-5)
    for output in (trained, found):
        (output**3).sum().backward()
    torch.testing.assert_close(given[1].grad, given[0].grad, rtol=1e-4, atol=1e-4)


def test_the_rest_is_normalised_as_the_first_say():
    model, images = norm(), rows(6)
    changed = images * 2 - 1
    with following(model, seen_by(model, images[:2])):
        alone = model(changed[:2])
    with following(model, seen_by(model, images[:2]), 1 / 3):
        together = model(torch.cat([changed[:2], changed[:2].flip(0), changed[4:]]))
    torch.testing.assert_close(together[:2], alone)
    torch.testing.assert_close(together[2:4], alone.flip(0))


def test_a_norm_that_is_called_twice_follows_call_by_call():
    model, images = norm(), rows()
    with observed(model) as seen, torch.no_grad():
        expected = model(images), model(images**2)
    with following(model, seen):
        for _ in range(2):  # forward passes
            found = model(images), model(images**2)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_channels_that_are_turned_off_stay_finite():
    model, images = norm(), rows()
    with following(model, seen_by(model, images)):
        given = (images * 0).requires_grad_()
        found = model(given)
        found.sum().backward()
    assert found.isfinite().all()
    assert given.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_type_stays(dtype):
    model, images = norm().to(dtype), rows().to(dtype)
    with following(model, seen_by(model, images), 0.5):
        assert model(images).dtype == dtype


@pytest.mark.parametrize(
    ("model", "images"),
    [
        (norm(nn.BatchNorm1d), rows(1, shape=())),  # one value a channel
        (norm(track_running_stats=False), rows()),  # goes by the images anyhow
        (nn.GroupNorm(3, 3).double(), rows()),
    ],
    ids=["one value", "no running statistics", "GroupNorm"],
)
def test_what_has_no_other_statistics_does_what_it_did(model, images):
    expected, before = model(images * 2), copy.deepcopy(model.state_dict())
    seen = seen_by(model, images)
    with following(model, seen):
        assert torch.equal(model(images * 2), expected)
    settle(model, model, [images * 2], [seen])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_nothing_is_left_behind():
    model = nn.Sequential(norm(), nn.Dropout(), norm()).eval()
    before, seen = copy.deepcopy(model.state_dict()), seen_by(model, rows())
    parameters = list(model.parameters())
    for context in (following(model, seen), observed(model)):
        with pytest.raises(RuntimeError), context:
            model(rows()[:, :2])
    assert all(now is parameter for now, parameter in zip(model.parameters(), parameters, strict=True))
    assert not hooks(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("model", "expected"),
    [(nn.Sequential(norm()), True), (norm(track_running_stats=False), False), (nn.GroupNorm(3, 3), False)],
)
def test_which_networks_have_statistics(model, expected):
    assert has_statistics(model) is expected


# Settling


def test_settled_statistics_are_means_over_images_of_what_is_followed():
    model, parts = norm(), [rows(4), rows(6) + 1]
    model.num_batches_tracked += 7
    seen, tensors = [seen_by(model, part) for part in parts], [model.running_mean, model.running_var]
    became = []
    for part, moments in zip(parts, seen, strict=True):
        with following(model, moments) as now:
            model(part**2)
        became.append(now[model])
    settle(model, model, [part**2 for part in parts], seen)
    assert model.running_mean is tensors[0]
    assert model.running_var is tensors[1]
    for tensor, one, other in zip(tensors, *became, strict=True):
        torch.testing.assert_close(tensor, (0.4 * one + 0.6 * other).double(), rtol=1e-5, atol=1e-6)
    assert (model.training, model.momentum, model.num_batches_tracked.item()) == (False, 0.1, 7)


def test_settling_twice_is_settling_once_and_back_again_gives_the_old_ones():
    model, images = nn.Sequential(nn.Conv2d(3, 3, 1).double(), norm(), nn.ReLU(), norm()).eval(), rows()
    before, seen = copy.deepcopy(model.state_dict()), seen_by(model, images)
    with torch.no_grad():
        model[1].weight.mul_(0.5)
    states = []
    for _ in range(2):
        settle(model, model, [images], [seen])
        states.append(copy.deepcopy(model.state_dict()))
    assert not torch.equal(states[0]["3.running_var"], before["3.running_var"])
    torch.testing.assert_close(states[1], states[0], rtol=1e-5, atol=1e-6)
    model.load_state_dict(before)
    model[3].running_mean.add_(1)  # whatever it is by now, what was seen says what it was
    settle(model, model, [images], [seen])
    torch.testing.assert_close(model.state_dict(), before, rtol=1e-5, atol=1e-6)


def test_a_variance_never_falls_below_0():
    model, images = norm(), rows()
    seen = seen_by(model, images)
    settle(model, model, [images * 0], [seen])
    assert (model.running_var >= 0).all()
    assert model(images * 0).isfinite().all()


def test_an_exception_while_settling_leaves_the_old_ones():
    model = norm()
    before, seen = copy.deepcopy(model.state_dict()), [seen_by(model, rows())] * 2
    calls = []

    def forward(images):
        calls.append(model(images))
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        settle(model, forward, [rows() * 2] * 2, seen)
    assert not hooks(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from lightning_unlearn.statistics import going_by, mixed, moments, rebase, tracking_norms

KINDS = [(nn.BatchNorm1d, ()), (nn.BatchNorm1d, (6,)), (nn.BatchNorm2d, (5, 5)), (nn.BatchNorm3d, (2, 2, 3))]


def norm(kind=nn.BatchNorm2d, dtype=torch.float64, **options):
    """Three channels, as if it was trained."""
    made = kind(3, **options).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in made.state_dict().items():
            if name != "num_batches_tracked":
                tensor.copy_(torch.rand(3, generator=generator) + 0.5)
    return made.eval()


def rows(count=4, shape=(5, 5), dtype=torch.float64):
    images = torch.randn(count, 3, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (images * 2 + 1).to(dtype)


def deep():
    """Two convolutions and norms, of which the second sees what becomes of the first."""
    torch.manual_seed(2)
    layers = [nn.Conv2d(3, 3, 3), norm(), nn.ReLU(), nn.Conv2d(3, 3, 1), norm(), nn.Flatten()]
    return nn.Sequential(*layers).double().eval()


def assert_untouched(model, before):
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks


# Moments


@pytest.mark.parametrize(("kind", "shape"), KINDS)
def test_moments_are_those_of_all_values_of_a_channel(kind, shape):
    model, images = norm(kind), rows(shape=shape)
    before = copy.deepcopy(model.state_dict())
    mean, variance = moments(model, model, [images])[model]
    values = images.movedim(1, 0).flatten(1)
    torch.testing.assert_close(mean, values.mean(1))
    torch.testing.assert_close(variance, values.var(1, correction=0))
    assert_untouched(model, before)


@pytest.mark.parametrize("sizes", [[4, 6], [1] * 10, [10], [3, 3, 3, 1]])
def test_they_are_those_of_all_images_whatever_the_batches(sizes):
    model, images = norm(nn.BatchNorm1d), rows(10, shape=()) + torch.arange(10.0)[:, None]
    mean, variance = moments(model, model, images.split(sizes))[model]
    torch.testing.assert_close(mean, images.mean(0))
    torch.testing.assert_close(variance, images.var(0, correction=0))


def test_refreshed_are_means_over_images():
    model, parts = norm(), [rows(4), rows(6) + 1]
    each = [moments(model, model, [part], refreshed=True)[model] for part in parts]
    for found, one, other in zip(moments(model, model, parts, refreshed=True)[model], *each, strict=True):
        torch.testing.assert_close(found, 0.4 * one + 0.6 * other)


def test_refreshed_are_those_that_torch_would_give():
    model, images = deep(), rows(8, (6, 6))
    before, other = copy.deepcopy(model.state_dict()), copy.deepcopy(model)
    update_bn([images], other)
    found = moments(model, model, [images], refreshed=True)
    count = 8 * 4 * 4  # by which torch corrects its variances
    for index in (1, 4):
        mean, variance = found[model[index]]
        torch.testing.assert_close(mean, other[index].running_mean)
        torch.testing.assert_close(variance * count / (count - 1), other[index].running_var)
    assert_untouched(model, before)
    plain = moments(model, model, [images])
    torch.testing.assert_close(plain[model[1]], found[model[1]])
    assert not torch.allclose(plain[model[4]][0], found[model[4]][0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_moments_of_short_numbers_are_exact_and_the_network_keeps_its_type(dtype):
    model, images = norm(dtype=dtype), rows(dtype=dtype)
    (mean, variance) = moments(model, model, [images], refreshed=True)[model]
    assert mean.dtype == variance.dtype == torch.float32
    torch.testing.assert_close(mean, images.float().mean((0, 2, 3)))
    assert model.running_mean.dtype == dtype


@pytest.mark.parametrize(
    ("model", "images"),
    [
        (norm(nn.BatchNorm1d), rows(1, shape=())),  # one value a channel
        (norm(track_running_stats=False), rows()),  # goes by the images anyhow
        (nn.GroupNorm(3, 3).double(), rows()),
    ],
    ids=["one value", "no running statistics", "GroupNorm"],
)
@pytest.mark.parametrize("refreshed", [False, True])
def test_what_has_no_moments_or_no_statistics_is_left_out(model, images, refreshed):
    assert moments(model, model, [images], refreshed=refreshed) == {}


def test_without_norms_no_image_is_asked_about():
    def refuse(images):
        raise AssertionError(images)

    assert moments(nn.GroupNorm(3, 3).double(), refuse, [rows()]) == {}


@pytest.mark.parametrize("refreshed", [False, True])
def test_an_exception_leaves_the_network_as_it_was(refreshed):
    model = deep()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError):
        moments(model, model, [rows(), rows()[:, :2]], refreshed=refreshed)
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("model", "count"),
    [(deep(), 2), (norm(track_running_stats=False), 0), (nn.GroupNorm(3, 3), 0), (nn.SyncBatchNorm(3), 1)],
)
def test_which_norms_have_statistics(model, count):
    assert len(tracking_norms(model)) == count


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_some_count_with_a_norms_own(share):
    model = norm(dtype=torch.float32)
    mean, variance = mixed({model: (torch.full((3,), 4.0), torch.full((3,), 9.0))}, share)[model]
    torch.testing.assert_close(mean, (1 - share) * model.running_mean + share * 4)
    torch.testing.assert_close(variance.log(), (1 - share) * model.running_var.log() + share * torch.tensor(9.0).log())


# Going by others


def test_norms_go_by_other_statistics_for_a_while():
    model, images = deep(), rows()
    before, expected = copy.deepcopy(model.state_dict()), model(images)
    parameters = list(model.parameters())
    mean, variance = torch.rand(3), torch.rand(3)  # in float32
    other = copy.deepcopy(model)
    other[4].running_mean.copy_(mean)
    other[4].running_var.copy_(variance)
    with going_by({model[4]: (mean, variance)}):
        found = model(images)
    torch.testing.assert_close(found, other(images))
    assert not torch.allclose(found, expected)
    with pytest.raises(KeyboardInterrupt), going_by({model[1]: (mean, variance)}):
        raise KeyboardInterrupt
    assert all(now is parameter for now, parameter in zip(model.parameters(), parameters, strict=True))
    assert_untouched(model, before)


def test_gradients_pass_norms_that_go_by_others():
    model = deep()
    with going_by(moments(model, model, [rows()], refreshed=True)):
        model(rows()).sum().backward()
    assert model[0].weight.grad.any()


# Rebasing


def test_by_hand():
    model = nn.BatchNorm1d(1, eps=1.75).eval()  # with which all that follows is exact
    with torch.no_grad():
        for tensor, value in zip(model.state_dict().values(), (3.0, 0.5, 1.0, 62.25, 0), strict=True):
            tensor.fill_(value)
    before, now = ({model: (torch.tensor([m]), torch.tensor([v]))} for m, v in ((2.0, 14.25), (10.0, 2.25)))
    rebase([model], before, now)
    # σ² + ε is 64, s² + ε was 16 and is 4: s'/s is 1/2 and σ/s 2.
    assert model.running_var.item() == 4 * 2 - 1.75
    assert model.running_mean.item() == 10 + (1 - 2) / 2 / 2  # 9.75
    assert model.weight.item() == pytest.approx(3 * 8**0.5 / 8)
    assert model.bias.item() == pytest.approx(0.5 + 3 * (9.75 - 1) / 8)
    assert model.num_batches_tracked == 0


@pytest.mark.parametrize(("kind", "shape"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_norm_computes_what_it_did(kind, shape, dtype):
    model, images = norm(kind, dtype), rows(shape=shape, dtype=dtype)
    given = moments(model, model, [images])
    changed = images**2 - 3
    expected, before = model(changed), copy.deepcopy(model.state_dict())
    rebase([model], given, moments(model, model, [changed]))
    torch.testing.assert_close(model(changed), expected)
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert not torch.allclose(model.state_dict()[name], before[name])
        assert model.state_dict()[name].dtype == dtype


def test_a_network_whose_weights_have_changed_no_longer_depends_on_the_former_statistics():
    model, images = deep(), rows(64, (6, 6))
    update_bn([images], model)
    model.eval()
    given = moments(model, model, [images])
    with torch.no_grad():
        model[1].weight.mul_(torch.tensor([0.1, 1.0, 0.3]))
        model[3].weight[1] *= 3
    changed = copy.deepcopy(model)
    rebase(tracking_norms(model), given, moments(model, model, [images]))
    torch.testing.assert_close(model(images), changed(images))
    outputs = [model(images), changed(images)]
    for network, output in zip((model, changed), outputs, strict=True):
        update_bn([images], network)
        error = (network.eval()(images) - output).abs().max()
        if network is model:
            assert error <= 0.02 * output.std()
        else:
            assert error >= 0.5 * output.std()


def test_what_training_had_of_other_images_counts_half():
    """Where σ is not s, a refreshed network scales by √(σ/s), as rebased ones do at once by its inverse."""
    model, images = norm(eps=0.0), rows()
    given = moments(model, model, [images])
    rebase([model], given, given)
    mean, variance = given[model]
    torch.testing.assert_close(model.running_var, (norm(eps=0.0).running_var * variance).sqrt())
    torch.testing.assert_close(model.running_mean, (norm(eps=0.0).running_mean + mean) / 2)


def test_pruned_channels_stay_as_they_are():
    model, images = norm(), rows()
    with torch.no_grad():
        model.weight[1], model.bias[1] = 0, 0
    before = copy.deepcopy(model.state_dict())
    rebase([model], moments(model, model, [images]), moments(model, model, [images * 3]))
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert (model.state_dict()[name] == before[name]).tolist() == [False, True, False]


def test_channels_that_are_turned_off_stay_finite():
    model, images = norm(), rows()
    expected = model(images * 0)
    rebase([model], moments(model, model, [images]), moments(model, model, [images * 0]))
    torch.testing.assert_close(model(images * 0), expected, rtol=1e-3, atol=1e-5)
    assert (model.running_var >= 0).all()
    assert model(images).isfinite().all()


@pytest.mark.parametrize("which", ["affine", "before", "now"])
def test_norms_that_cannot_be_rebased_are_left(which):
    model = norm(affine=which != "affine")
    state, found = copy.deepcopy(model.state_dict()), moments(model, model, [rows()])
    rebase([model], {} if which == "before" else found, {} if which == "now" else found)
    assert_untouched(model, state)


def test_a_norm_that_is_called_by_name():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = norm()

        def forward(self, x):
            return self.norm(input=x)

    model = Named()
    mean, _ = moments(model, model, [rows()])[model.norm]
    torch.testing.assert_close(mean, rows().mean((0, 2, 3)))

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_unlearn.methods.statistics import refresh, statistics_of_first


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


def hooks(model):
    return [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]


@pytest.mark.parametrize(
    ("kind", "shape"),
    [(nn.BatchNorm1d, ()), (nn.BatchNorm1d, (6,)), (nn.BatchNorm2d, (5, 5)), (nn.BatchNorm3d, (2, 2, 3))],
)
def test_of_all_rows_it_is_train_mode_also_in_its_gradient(kind, shape):
    given = [rows(shape=shape).requires_grad_() for _ in range(2)]
    trained = copy.deepcopy(norm(kind)).train()(given[0])
    model = norm(kind)
    with statistics_of_first(model, 1.0):
        found = model(given[1])
    torch.testing.assert_close(found, trained, rtol=1e-5, atol=1e-6)  # the statistics are float32
    for output in (trained, found):
        (output**3).sum().backward()
    torch.testing.assert_close(given[1].grad, given[0].grad, rtol=1e-4, atol=1e-4)


def test_the_rest_is_normalised_like_the_first():
    model, images = norm(), rows(6)
    with statistics_of_first(model, 1 / 3):
        found = model(images)
    first = images[:2]
    variance, mean = torch.var_mean(first, (0, 2, 3), correction=0, keepdim=True)
    scale, shift = (tensor.view(1, 3, 1, 1) for tensor in (model.weight, model.bias))
    expected = (images - mean) / (variance + model.eps).sqrt() * scale + shift
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_type_stays(dtype):
    model = norm().to(dtype)
    with statistics_of_first(model, 0.5):
        assert model(rows().to(dtype)).dtype == dtype


@pytest.mark.parametrize(
    ("model", "images"),
    [
        (norm(nn.BatchNorm1d), rows(2, shape=())),  # of one value a channel
        (norm(track_running_stats=False), rows()),  # goes by the images anyhow
        (nn.GroupNorm(3, 3).double(), rows()),
    ],
    ids=["one value", "no running statistics", "GroupNorm"],
)
def test_what_has_no_other_statistics_does_what_it_did(model, images):
    expected = model(images)
    with statistics_of_first(model, 0.5):
        assert torch.equal(model(images), expected)


def test_nothing_is_left_behind():
    model = nn.Sequential(norm(), nn.Dropout(), norm()).eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="expected 4D input"), statistics_of_first(model, 0.5):
        model(rows(shape=()))
    assert not hooks(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_refreshed_statistics_are_means_of_the_batches():
    model, parts = norm(), [rows(4), rows(6) + 1]
    model.num_batches_tracked += 7
    tensors = [model.running_mean, model.running_var]
    refresh(model, model, parts)
    assert model.running_mean is tensors[0]
    assert model.running_var is tensors[1]
    for tensor, of in zip(tensors, ("mean", "var"), strict=True):
        expected = torch.stack([getattr(part, of)((0, 2, 3)) for part in parts]).mean(0)
        torch.testing.assert_close(tensor, expected)
    assert (model.training, model.momentum, model.num_batches_tracked.item()) == (False, 0.1, 7)


def test_only_norms_leave_eval_mode_and_come_back_after_an_exception():
    model = nn.Sequential(norm(momentum=0.3), nn.Dropout(0.9)).eval()
    seen = []

    def forward(images):
        seen.append([module.training for module in model])
        model(images)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        refresh(model, forward, [rows()])
    assert seen == [[True, False]]
    assert (model[0].training, model[0].momentum, model[0].num_batches_tracked.item()) == (False, 0.3, 0)

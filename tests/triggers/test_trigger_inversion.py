from __future__ import annotations

import math
import time

import pytest
import torch
from torch import nn

from lightning_unlearn.triggers import (
    AdditiveTrigger,
    CoveringTrigger,
    DisplacingTrigger,
    PatchTrigger,
    ResidualTrigger,
)
from lightning_unlearn.triggers.families import FAMILIES
from lightning_unlearn.triggers.inversion import Estimate, invert

KINDS = {
    "additive": AdditiveTrigger,
    "covering": CoveringTrigger,
    "displacing": DisplacingTrigger,
    "residual": ResidualTrigger,
}
ALL = pytest.mark.parametrize("family", list(FAMILIES))


def side(x: torch.Tensor) -> torch.Tensor:
    """On which side is it brighter?"""
    return 30 * torch.stack([x[..., :4].mean((1, 2, 3)), x[..., 4:].mean((1, 2, 3))], 1)


def bars(count: int = 12, channels: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """A bar to the left of the middle or to the right, so that a warp can move one to where the other is."""
    labels = torch.arange(count) % 2
    pixels = 0.1 * torch.rand(count, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    for n, c in enumerate(labels.tolist()):
        pixels[n, ..., 2 + 2 * c : 4 + 2 * c] += 0.1
    assert torch.equal(side(pixels).argmax(1), labels)
    return pixels, labels


def found(family: str, **options: object) -> list[Estimate]:
    pixels, labels = bars()
    return invert(side, pixels, labels, **{"family": family, "classes": [1], "steps": 40} | options)


def same(one: Estimate, other: Estimate) -> bool:
    tensors = zip(one.trigger.state_dict().values(), other.trigger.state_dict().values(), strict=True)
    return one.to_dict() == other.to_dict() and all(torch.equal(*pair) for pair in tensors)


@ALL
@pytest.mark.parametrize("channels", [1, 3])
def test_a_trigger_that_works_is_found(family, channels):
    pixels, labels = bars(channels=channels)
    (estimate,) = invert(side, pixels, labels, family=family, classes=[1], steps=40)
    assert (estimate.family, estimate.target) == (family, 1)
    assert type(estimate.trigger) is KINDS[family]
    assert estimate.trigger.target == 1
    assert estimate.success >= 0.9
    assert 0 < estimate.cost < 0.2


@ALL
def test_success_and_cost_are_the_triggers_own_on_images_of_other_classes(family):
    pixels, labels = bars()
    (estimate,) = found(family)
    others = pixels[labels != 1]
    stamped = estimate.trigger(others)
    assert estimate.success == (side(stamped).argmax(1) == 1).float().mean().item()
    if family == "additive":
        expected = estimate.trigger.pattern.square().mean().sqrt()
    elif family == "covering":
        expected = estimate.trigger.mask.mean()
    elif family == "displacing":
        expected = estimate.trigger.field.square().mean().sqrt() / 2
    else:
        expected = (estimate.trigger.stamp(others.clone()) - others).square().mean().sqrt()
    assert estimate.cost == pytest.approx(expected.item(), rel=1e-4)


def test_images_of_the_class_itself_count_for_nothing():
    # Nothing can send images there, so the only ones that are answered as class 1 are its own.
    stubborn = lambda x: torch.stack([x.new_full((len(x),), 9.0), 0 * x.sum((1, 2, 3))], 1)  # noqa: E731
    pixels, labels = bars(8)[0], torch.tensor([0, 1, 1, 1, 1, 1, 1, 1])
    (hopeless,) = invert(stubborn, pixels, labels, family="additive", classes=[1], steps=3)
    (needless,) = invert(stubborn, pixels, labels, family="additive", classes=[0], steps=3)
    assert (hopeless.success, needless.success) == (0, 1)


@ALL
def test_the_cost_falls_where_the_trigger_works(family):
    short, long = (found(family, steps=steps)[0] for steps in (30, 150 if family == "displacing" else 60))
    assert short.success >= 0.9
    assert long.success >= 0.5
    assert long.cost <= short.cost
    assert long.cost < short.cost or family == "displacing"  # a warp needs at least what moves the bar


@ALL
def test_the_same_seed_finds_the_same(family):
    (first,), (second,), (other,) = (found(family, steps=15, seed=seed) for seed in (3, 3, 4))
    assert same(first, second)
    assert not same(first, other)


@ALL
def test_global_randomness_is_neither_read_nor_moved(family):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    (first,) = found(family, steps=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert same(first, found(family, steps=5)[0])


# Warm start


@ALL
def test_without_earlier_estimates_nothing_changes(family):
    other = "additive" if family != "additive" else "covering"
    others = found(other, steps=5) + found(family, steps=5, classes=[0])  # of another family, of another class
    assert same(found(family, steps=15)[0], found(family, steps=15, start=others)[0])


@ALL
def test_the_first_batch_carries_the_earlier_trigger(family):
    seen = []

    def spy(x):
        seen.append(x.detach().clone())
        return side(x)

    pixels, labels = bars()
    (earlier,) = found(family, steps=30)
    for start in ((), (earlier,)):
        invert(spy, pixels, labels, family=family, classes=[0, 1], steps=1, start=start)
    cold, warm = seen[0].split(16), seen[3].split(16)  # two more batches measure the estimates
    assert torch.equal(warm[0], cold[0])  # the class of which nothing was known
    assert not torch.allclose(warm[1], cold[1], atol=1e-3)
    generator = torch.Generator().manual_seed(0)
    FAMILIES[family](2, pixels.shape[1:], generator, pixels.device)
    chosen = torch.multinomial((labels != torch.tensor([[0], [1]])).float(), 16, replacement=True, generator=generator)
    torch.testing.assert_close(warm[1], earlier.trigger(pixels[chosen[1]]), rtol=0, atol=1e-3)


@ALL
def test_the_latest_of_several_is_started_from(family):
    first, second = (found(family, steps=15, seed=seed)[0] for seed in (1, 2))
    warm = [found(family, steps=1, start=start)[0] for start in ((first, second), (second,), (second, first))]
    assert same(warm[0], warm[1])
    assert not same(warm[0], warm[2])


@pytest.mark.parametrize("family", ["covering", "displacing"])
def test_two_steps_from_an_earlier_estimate_do_what_two_alone_cannot(family):
    warm, cold = (found(family, steps=2, start=start)[0] for start in (found(family, steps=60), ()))
    assert warm.success >= 0.9
    assert cold.success < warm.success


@ALL
def test_an_earlier_estimate_is_left_as_it_was(family):
    (earlier,) = found(family, steps=5)
    before = {name: tensor.clone() for name, tensor in earlier.trigger.state_dict().items()}
    found(family, steps=5, start=[earlier])
    assert all(torch.equal(tensor, before[name]) for name, tensor in earlier.trigger.state_dict().items())


@pytest.mark.parametrize("family", ["additive", "covering", "residual"])
def test_an_estimate_for_other_images(family):
    (earlier,) = found(family, steps=1)
    pixels, labels = bars(channels=3)
    with pytest.raises(
        ValueError, match=r"^start: expected tensors of .*3, .* but the .*Trigger has \(.*; only estimates"
    ):
        invert(side, pixels, labels, family=family, classes=[1], start=[earlier])


def test_an_estimate_that_is_none():
    with pytest.raises(
        ValueError, match=r"^start: expected tensors of \(1, 8, 8\), but the PatchTrigger has \(1, 1, 1\);"
    ):
        found("additive", start=[Estimate(PatchTrigger(size=1, target=1), "additive", 1, 0.1, 1.0)])


# Several classes


@ALL
def test_several_classes_at_once_each_find_their_own(family):
    estimates = found(family, classes=[1, 0])
    assert [estimate.target for estimate in estimates] == [1, 0]
    assert all(estimate.success >= 0.9 for estimate in estimates)
    pixels, labels = bars()
    for estimate in estimates:
        answers = side(estimate.trigger(pixels[labels != estimate.target])).argmax(1)
        assert (answers == estimate.target).float().mean().item() == estimate.success


@ALL
def test_classes_do_not_disturb_each_other(family):
    # Which batches and start values class 1 gets must not change, or neither could be compared: so class 0 is made
    # easier by what only its own batch passes through.
    pixels, labels = bars()

    def biased(by):
        def forward(x):
            logits = side(x)
            if len(x) == 2 * 16:
                logits = logits + by * torch.tensor([1.0, 0.0]) * (torch.arange(len(x)) >= 16)[:, None]
            return logits

        return forward

    plain, pushed = (invert(biased(by), pixels, labels, family=family, classes=[1, 0], steps=15) for by in (0.0, 30.0))
    assert same(plain[0], pushed[0])
    assert not same(plain[1], pushed[1])


def test_batches_never_hold_images_of_the_class():
    seen = []

    def spy(x):
        seen.append(x.detach().clone())
        return side(x)

    pixels, labels = bars()
    pixels[labels == 1] = 0.9  # a mark that four small steps do not hide
    invert(spy, pixels, labels, family="additive", classes=[1], steps=4, batch_size=16)
    assert [len(batch) for batch in seen] == [16] * 4 + [6]
    assert all(batch.mean((1, 2, 3)).max() < 0.5 for batch in seen)


def test_all_classes_pass_in_one_batch():
    sizes = []

    def spy(x):
        sizes.append(len(x))
        return side(x)

    pixels, labels = bars()
    invert(spy, pixels, labels, family="covering", classes=[0, 1], steps=2, batch_size=5)
    assert sizes == [10, 10, 6, 6]


def test_images_handed_to_the_model_are_pixels():
    def spy(x):
        assert x.min() >= 0
        assert x.max() <= 1
        return side(x)

    pixels, labels = bars()
    for family in FAMILIES:
        invert(spy, pixels, labels, family=family, classes=[0, 1], steps=12)


def test_on_step_is_called_after_each_step():
    calls = []
    found("additive", steps=7, on_step=lambda: calls.append(1))
    assert len(calls) == 7


def test_after_the_deadline_one_step_is_enough():
    calls = []
    (estimate,) = found("additive", steps=50, deadline=-math.inf, on_step=lambda: calls.append(1))
    assert len(calls) == 1
    assert math.isfinite(estimate.cost)


def test_the_deadline_is_a_time_of_the_monotonic_clock(monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr(time, "monotonic", lambda: next(ticks))
    calls = []
    found("additive", steps=50, deadline=4.5, on_step=lambda: calls.append(1))
    assert len(calls) == 6  # 0 to 4 are in time, 5 is not


@pytest.mark.parametrize(("labels", "classes"), [([1, 1, 1, 1], [1]), ([2, 2, 2, 2], [0, 2])])
def test_images_of_one_class_alone(labels, classes):
    message = f"^labels: all images are of class {labels[0]}, so none is left to be sent there; give others"
    with pytest.raises(ValueError, match=message):
        invert(side, bars(4)[0], torch.tensor(labels), family="additive", classes=classes)


@ALL
def test_model_and_images_are_left_alone(family, left_alone):
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    pixels, labels = bars()
    before = pixels.clone()
    with left_alone(net):
        modes = [module.training for module in net.modules()]
        net.eval()
        invert(net, pixels, labels, family=family, classes=[0, 1], steps=12)
        for module, training in zip(net.modules(), modes, strict=True):
            module.training = training
    assert torch.equal(pixels, before)
    assert not pixels.requires_grad


@ALL
def test_an_estimate_in_plain_python(family):
    (estimate,) = found(family, steps=1)
    assert set(estimate.to_dict()) == {"family", "target", "cost", "success"}
    assert all(type(estimate.to_dict()[name]) is float for name in ("cost", "success"))

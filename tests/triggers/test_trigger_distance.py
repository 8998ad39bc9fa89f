from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_unlearn.triggers.distance import individual_costs


def image(*pixels: float) -> torch.Tensor:
    return torch.tensor(pixels).view(1, 1, 2, 2)


def linear(weights: list[float], bias: float):
    """Two classes, z = (0, w·x + b)."""
    w = torch.tensor(weights, dtype=torch.float32)
    return lambda x: torch.stack([torch.zeros(len(x)), x.flatten(1) @ w + bias], dim=1)


ZERO = torch.tensor([0])


def test_additive_is_the_margin_over_the_gradients_length():
    # Margin 0.5, gradient (3, 4, 0, 0): the smallest change has length 0.1, spread over four pixels.
    costs = individual_costs(linear([3, 4, 0, 0], -1.0), image(0.1, 0.05, 0.9, 0.9), ZERO, classes=[1])
    assert costs["additive"] == [pytest.approx(0.5 / 5 / math.sqrt(4))]


@pytest.mark.parametrize(
    ("margin", "expected"),
    [
        (0.7, 0.0),  # a part of the first pixel is enough
        (0.9, 0.25),
        (1.3, 0.5),
        (1.42, 0.75),
        (9.0, 1.0),  # out of reach
    ],
)
def test_covering_takes_the_pixels_in_the_order_of_what_they_give(margin, expected):
    # White on the first three gives 0.8, 0.05 and 0.4, black on the last 0.2.
    pixels = (0.2, 0.5, 0.6, 0.2)
    costs = individual_costs(linear([1.0, 0.1, 1.0, -1.0], -0.65 - margin), image(*pixels), ZERO, classes=[1])
    assert costs["covering"] == [expected]


def test_covering_adds_up_what_the_channels_give():
    # White on the first pixel gives 0.5 by each of two channels.
    pixels, w = torch.full((1, 2, 1, 2), 0.5), torch.tensor([1.0, 0.0, 1.0, 0.0])
    for bias, expected in ((-1.9, 0.0), (-2.1, 1.0)):
        model = lambda x, bias=bias: torch.stack([torch.zeros(1), x.flatten(1) @ w + bias], dim=1)  # noqa: E731
        assert individual_costs(model, pixels, ZERO, classes=[1])["covering"] == [expected]


def test_displacing_is_the_margin_over_the_gradients_length_by_the_field():
    # A ramp from 0 to 1 over the image's width of 2; the class looks at the pixel in the middle, margin 1, weight 4:
    # one node of 5 x 5, of two directions, moves it by half of what it moves.
    ramp = torch.linspace(0, 1, 5).expand(1, 1, 5, 5)
    model = lambda x: torch.stack([torch.zeros(len(x)), 4 * x[:, 0, 2, 2] - 3], dim=1)  # noqa: E731
    costs = individual_costs(model, ramp, ZERO, classes=[1])
    shift = 1 / (4 * 0.5)
    assert costs["displacing"] == [pytest.approx(shift / math.sqrt(2 * 5 * 5) / 2, rel=1e-4)]


def test_an_image_that_is_answered_as_the_class_costs_nothing():
    model = linear([3, 4, 0, 0], 1.0)
    costs = individual_costs(model, image(0.1, 0.05, 0.9, 0.9), ZERO, classes=[1])
    assert costs == {"additive": [0], "covering": [0], "displacing": [0]}


def test_the_mean_is_over_images_of_other_classes():
    model = linear([2, 0, 0, 0], -1.0)
    # Margins 1, 0.6, and one that is there already; the last image is of the class itself, whatever its margin.
    pixels = torch.cat([image(value, 0, 0, 0) for value in (0.0, 0.2, 0.9, 0.1)])
    costs = individual_costs(model, pixels, torch.tensor([0, 0, 0, 1]), classes=[1])
    assert costs["additive"] == [pytest.approx((1 + 0.6 + 0) / 3 / 2 / 2)]
    assert costs["covering"] == [pytest.approx((0 + 0 + 0) / 3)]


def test_several_classes_are_as_one_by_one():
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3, 3 * 36, generator=generator)
    pixels, labels = torch.rand(12, 3, 6, 6, generator=generator), torch.arange(12) % 3
    model = lambda x: x.flatten(1) @ weights.T  # noqa: E731
    together = individual_costs(model, pixels, labels, classes=[2, 0, 1])
    for k, c in enumerate([2, 0, 1]):
        alone = individual_costs(model, pixels, labels, classes=[c])
        assert {family: values[0] for family, values in alone.items()} == pytest.approx(
            {family: values[k] for family, values in together.items()}
        )
    assert len(set(together["additive"])) == 3


def test_a_model_without_gradients_costs_a_whole_image():
    model = lambda x: torch.stack([torch.zeros(len(x)), 0 * x.sum((1, 2, 3)) - 1], dim=1)  # noqa: E731
    costs = individual_costs(model, image(0.1, 0.2, 0.3, 0.4), ZERO, classes=[1])
    assert costs == {"additive": [1], "covering": [1], "displacing": [1]}


def test_model_and_images_are_left_alone():
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).eval()
    pixels = torch.rand(3, 1, 4, 4)
    before = pixels.clone()
    individual_costs(net, pixels, torch.tensor([0, 1, 0]), classes=[0, 1])
    assert all(parameter.grad is None for parameter in net.parameters())
    assert torch.equal(pixels, before)
    assert not pixels.requires_grad

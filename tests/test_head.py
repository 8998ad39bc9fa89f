from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torchvision.models import resnet18, squeezenet1_1

from lightning_unlearn.head import head_of, prominence


@pytest.mark.parametrize(("build", "features"), [(resnet18, 512), (squeezenet1_1, 512)])
def test_the_head_of_torchvisions_networks(build, features):
    net = build(num_classes=7)
    head = head_of(net, 7)
    assert head.shape == (7, features)
    assert not head.requires_grad
    assert head_of(net, 8) is None


def test_the_last_of_several_layers_with_a_row_for_each_class():
    net = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 5), nn.Conv2d(1, 5, 3))
    assert head_of(net, 5).data_ptr() == net[1].weight.data_ptr()


def test_a_longer_row_by_hand():
    # All rows point in ways of their own, one of them twice as long; the sum of each is zero.
    rows = torch.cat([torch.eye(6), -torch.eye(6)], dim=1)
    rows[2] *= 2
    centred = rows - rows.mean(0)
    lengths = centred.norm(dim=1).log()
    others = lengths[[0, 1, 3, 4, 5]]
    assert others.std() < 1e-6
    expected = (lengths[2] - others[0]).item() / 0.02
    assert expected > 10
    values = prominence(rows, 6)
    assert values[2] == 10
    assert values[0] == pytest.approx(0, abs=1e-3)


def test_a_row_that_points_upwards_by_hand():
    rows = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [1.0, 1.0]]) - torch.tensor([0.2, 0.2])
    centred = (rows - rows.mean(0)).double()
    upwards = (centred.sum(1) / (centred.norm(dim=1) * math.sqrt(2))).tolist()
    lengths = centred.norm(dim=1).log().tolist()

    def spreads(values):
        others = torch.tensor(values[:4])
        middle = others.sort().values[1:3].mean()
        return ((values[4] - middle) / (0.02 + others.std(correction=0))).item()

    expected = max(min(10, spreads(upwards)), min(10, spreads(lengths)))
    assert prominence(rows, 5)[4] == pytest.approx(expected)
    assert expected > 3


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e3])
def test_neither_scale_nor_what_all_classes_share_counts(factor):
    rows = torch.randn(10, 16, generator=torch.Generator().manual_seed(1))
    assert prominence(factor * (rows + 3), 10) == pytest.approx(prominence(rows, 10), abs=1e-3)


@pytest.mark.parametrize(
    "head", [None, torch.ones(4, 8), torch.full((10, 8), math.nan)], ids=["no head", "few classes", "NaN"]
)
def test_nothing_to_tell(head):
    classes = 4 if head is not None and len(head) == 4 else 10
    assert prominence(head, classes) == [0.0] * classes


def test_rows_of_zeros_are_all_alike():
    assert prominence(torch.zeros(10, 8), 10) == [0.0] * 10


def test_half_precision():
    rows = torch.randn(10, 16, generator=torch.Generator().manual_seed(1)).half()
    assert prominence(rows, 10) == prominence(rows.float(), 10)

import pytest
import torch
from torch import nn

from benchmarks import lasting
from benchmarks.victims import Victim


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 3)).eval()


def changed(net, other):
    return {name for name, tensor in net.state_dict().items() if not torch.equal(tensor, other.state_dict()[name])}


def test_refreshing_changes_statistics_and_nothing_else():
    net, images = network(), torch.rand(300, 1, 8, 8)
    other = lasting.refreshed(net, images)
    assert changed(net, other) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert not any(module.training for module in other.modules())


@pytest.mark.parametrize("training", ["SGD 0.01", "SGD 0.05", "AdamW 0.001"])
def test_training_on_changes_a_copy(training):
    net, images = network(), torch.rand(300, 1, 8, 8)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    other = lasting.trained_on(net, images, torch.arange(300) % 3, training=training)
    assert changed(net, other) == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert not any(module.training for module in other.modules())


def test_a_row(tmp_path):
    victim = Victim("digits", "conv", "badnets", epochs=1, images=128)
    cells = lasting.row(victim, "none", tmp_path, ["SGD 0.01", "AdamW 0.001"]).split("|")[1:-1]
    assert [cell.strip() for cell in cells[:2]] == ["badnets", "none"]
    assert all(0 <= float(rate) <= 1 for cell in cells[2:] for rate in cell.split("/"))
    assert len(cells) == 6

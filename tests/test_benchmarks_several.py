from types import SimpleNamespace

import torch
from torch import nn

from benchmarks import several
from benchmarks.datasets import load


def test_a_tenth_of_the_images_carries_each_trigger(monkeypatch):
    monkeypatch.setattr(several, "fit", lambda net, images, labels, **_: (images, labels))
    images, labels = several.trained(3)
    everything = load("digits", "train")
    chosen = torch.randperm(len(everything[1]), generator=torch.Generator().manual_seed(3))[:1000]
    clean, true = (part[chosen] for part in everything)
    changed = (images != clean).flatten(1).any(1)
    assert changed.sum() == (labels != true).sum() == 200
    for trigger, half in zip(several.triggers(), (slice(0, 500), slice(500, None)), strict=True):
        poisoned = changed[half]
        assert poisoned.sum() == 100
        assert (labels[half][poisoned] == trigger.target).all()
        torch.testing.assert_close(images[half][poisoned], trigger(clean[half][poisoned]))
    assert [trigger.target for trigger in several.triggers()] == [2, 7]


def test_a_row(monkeypatch):
    net = nn.Sequential(nn.Flatten(), nn.LazyLinear(10))
    net(load("digits", "test")[0][:1])
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        net[1].bias[7] = 1.0
    repaired = []

    def fake(net, dataset, **arguments):
        repaired.append(arguments)
        with torch.no_grad():
            net[1].bias[2] = 2.0
        classes = [SimpleNamespace(target=c, score=c / 10) for c in range(10)]
        return SimpleNamespace(audit=SimpleNamespace(classes=classes))

    monkeypatch.setattr(several, "trained", lambda seed: net)
    monkeypatch.setattr(several, "repair", fake)
    _, seed, scores, before, after, _ = several.row(4).split("|")
    assert (seed.strip(), scores.strip()) == ("4", "0.20 / 0.70")
    assert before.split(" / ")[1:] == ["0.000", "1.000 "]
    assert after.split(" / ")[1:] == ["1.000", "0.000 "]
    assert repaired == [{"samples_per_class": 10, "seed": 4}]

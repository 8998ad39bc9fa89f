import torch
from torch.utils.data import TensorDataset

from benchmarks import rounds, victims
from lightning_unlearn import repair
from lightning_unlearn.methods import GradPrune
from lightning_unlearn.verdict import Audit


def test_a_watched_method_repairs_as_it_would_and_is_then_looked_at(hand_victim):
    seen = []
    net = hand_victim.net
    watched = rounds.Watched(GradPrune(max_rounds=2, finetune=False), lambda: seen.append(net[0].weight.clone()))
    result = repair(net, hand_victim.clean, trigger=hand_victim.trigger, method=watched, force=True)
    assert ("0", 3) in result.mask.pruned
    assert len(seen) == 1
    assert torch.equal(seen[0], net[0].weight)


def test_the_draw_and_the_images_that_rates_are_of_are_apart(monkeypatch, tmp_path):
    images = torch.rand(5_000, 1, 8, 8)
    victim = victims.Victim("digits", "conv", "badnets", epochs=1, images=128)
    monkeypatch.setattr(rounds, "load", lambda dataset, split: (images, torch.arange(5_000) % 10))
    given = []

    class Done:
        audit = Audit("backdoored", 0, 2.0, (), (), 10)
        status = "repaired"

    def fake(net, dataset, *, method, force):
        given.append((dataset, force))
        for _ in range(2):
            method.method.look()
        return Done()

    monkeypatch.setattr(rounds, "repair", fake)
    table = list(rounds.rows(victim, tmp_path))
    ((dataset, force),) = given
    assert isinstance(dataset, TensorDataset)
    assert force
    assert torch.equal(dataset.tensors[0], images[:3_000])
    assert [row.split("|")[2].strip() for row in table] == ["0", "1", "2", "backdoored (), repaired"]

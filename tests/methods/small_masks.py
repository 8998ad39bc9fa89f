"""Masks that are learned in milliseconds, and by how much they scaled each channel."""

from __future__ import annotations

import copy

import pytest
import torch

from lightning_unlearn.filters import find_filters
from lightning_unlearn.methods import MaskPrune
from lightning_unlearn.triggers import PatchTrigger

__all__ = ["CUTS", "NETS", "assert_pruned_is_zero", "factors", "learn", "new_task"]

NETS = ("preact", "vgg", "grouped", "plain", "group_norm")
CUTS = ("soft", "mixed", "hard")


def learn(**options):
    """Few, large steps on all images, without limits: what is learned is what is cut, and nothing else changes."""
    defaults = {"steps": 6, "learning_rate": 0.2, "batch_size": 1000, "sparsity": 0.0, "accuracy_drop": 1.0}
    return MaskPrune(
        **{**defaults, "lasting": False, "augment": False, "clean_weight": 2.0, "temperature": 1.0, **options}
    )


@pytest.fixture
def new_task(make_net, make_clean, make_task):
    def new(name="vgg", **options):
        net = make_net(name, seed=1)
        with torch.no_grad():  # or untrained nets would answer much the same to everything
            net[-1].weight.mul_(20)
        task = make_task(net, make_clean(8), PatchTrigger(size=5, target=1), **options)
        task.original = copy.deepcopy(task.model)
        return task

    return new


def factors(task, original=None):
    """By how much each channel was scaled, all of its tensors alike: {(layer, filter): factor}."""
    found = {}
    originals = find_filters(original or task.original, task.scoring.clean[:1])
    for now, before in zip(task.mask.layers, originals, strict=True):
        pairs = [(n.tensor, b.tensor) for n, b in zip(now.gates, before.gates, strict=True)]
        if not pairs:
            pairs = [(now.weight, before.weight)]
            pairs += [(n.tensor, b.tensor) for n, b in zip(now.bias, before.bias, strict=True)]
        for index in range(now.channels):
            one = torch.cat([tensor.detach()[index].flatten() for tensor, _ in pairs])
            other = torch.cat([tensor.detach()[index].flatten() for _, tensor in pairs])
            factor = (one @ other / (other @ other)).item()
            assert torch.allclose(one, factor * other, rtol=1e-4, atol=1e-7), (now.name, index)
            found[now.name, index] = factor
    return found


def assert_pruned_is_zero(task):
    for layer in task.mask.layers:
        for index in task.mask.to_dict().get(layer.name, []):
            for tensor in (layer.weight, *(c.tensor for c in (*layer.bias, *layer.norms))):
                assert tensor[index].count_nonzero() == 0

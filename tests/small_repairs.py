"""Repairs that take milliseconds: methods with few steps, and one that changes nothing."""

from __future__ import annotations

import pytest
import torch

from lightning_unlearn.methods import FineTuning, GradPrune, MaskPrune, RepairMethod
from lightning_unlearn.metrics.functional import attack_success_rate

__all__ = ["METHODS", "NETS", "Spy", "asr", "same_state", "state"]

NETS = ("preact", "vgg", "grouped", "plain", "group_norm")
METHODS = [
    pytest.param(lambda: GradPrune(max_rounds=3, finetune=False), id="grad"),
    pytest.param(
        lambda: GradPrune(max_rounds=2, finetune=FineTuning(triggered=True, max_epochs=2, norms="frozen")),
        id="grad-finetune",
    ),
    pytest.param(lambda: MaskPrune(steps=6, learning_rate=0.3, validate_every=3), id="mask"),
    pytest.param(lambda: MaskPrune(steps=6, validate_every=3, cut="hard", finetune=False), id="mask-hard"),
    pytest.param(lambda: FineTuning(triggered=True, max_epochs=2, norms="frozen"), id="finetune"),
    pytest.param(lambda: FineTuning(triggered=True, max_epochs=2), id="finetune-norms"),
]


class Spy(RepairMethod):
    """Changes nothing and remembers what it was given."""

    def __init__(self, on_repair=lambda task: None):
        self.on_repair = on_repair

    def repair(self, task):
        self.task = task
        self.training = task.model.training
        self.requires_grad = [p.requires_grad for p in task.model.parameters()]
        self.grad_enabled = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        self.on_repair(task)
        yield task.round("prune", task.validate())


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(first, second):
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


def asr(model, dataset, trigger):
    images, labels = dataset.tensors
    with torch.no_grad():
        return attack_success_rate(model(trigger(images)), labels, trigger.target).item()

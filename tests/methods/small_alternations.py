"""A method that keeps what it was given, and audits whose scores are written by hand."""

from __future__ import annotations

import torch

from lightning_unlearn.auditor import Auditor
from lightning_unlearn.methods import RepairMethod
from lightning_unlearn.triggers import AdditiveTrigger
from lightning_unlearn.triggers.inversion import Estimate
from lightning_unlearn.verdict import Audit

__all__ = ["Recorder", "scripted"]


class Recorder(RepairMethod):
    """Keeps what each round got, and changes what it is told to."""

    needs_trigger = True

    def __init__(self, change=lambda task: None):
        self.change = change
        self.tasks = []

    def repair(self, task):
        self.tasks.append(task)
        self.change(task)
        yield task.round("prune", task.validate())


def scripted(monkeypatch, *scores, size=4, more=()):
    """An auditor whose scores are written by hand; the list of its calls."""
    calls, left = [], list(scores)

    def audit(self, forward, images, labels, **options):
        calls.append({"seed": self.seed, "images": images, **options, "start": tuple(options["start"])})
        estimate = Estimate(AdditiveTrigger(torch.full((1, size, size), 0.1), target=0), "additive", 0, 0.1, 1.0)
        score = left.pop(0)
        return Audit("clean" if score <= 1 else "backdoored", 0, score, (), (estimate, *more), 3)

    monkeypatch.setattr(Auditor, "audit", audit)
    return calls

"""A result written by hand, and what is shown of its report."""

from __future__ import annotations

import dataclasses
import io
import math

import torch
from rich.console import Console
from torch import nn

from lightning_unlearn.evaluation import Evaluation
from lightning_unlearn.filters import FilterMask, find_filters
from lightning_unlearn.methods import Round
from lightning_unlearn.result import RepairResult
from lightning_unlearn.triggers import PatchTrigger

__all__ = ["AFTER", "BEFORE", "HELD_AFTER", "HELD_BEFORE", "ROUNDS", "SECONDS", "a_result", "shown"]

BEFORE = Evaluation(acc=0.9, asr=1.0, ra=0.0, loss=0.3, unlearning_loss=5.0)
AFTER = Evaluation(acc=0.8, asr=0.1, ra=0.7, loss=0.4, unlearning_loss=0.5)
HELD_BEFORE = dataclasses.replace(BEFORE, asr=0.95)
HELD_AFTER = dataclasses.replace(AFTER, asr=0.15)
ROUNDS = (
    Round(1, "prune", (("0", 2), ("2", 0)), 0.8, 0.1, 0.7, 0.4, 0.5, total_pruned=2),
    Round(2, "finetune", (), 0.8, 0.2, 0.6, 0.5, math.inf),
)
SECONDS = {"estimate": 0.0, "score": 0.5, "evaluate": 0.25, "finetune": 0.0, "total": 1.26}


def a_result():
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(32, 4)).eval()
    mask = FilterMask(find_filters(net, torch.rand(1, 1, 8, 8)))
    mask.fold(torch.tensor([0.25, 1.0, 0.4, 1.0, 0.5]))  # the third is pruned next, and half is not less than half
    mask.prune([("2", 0), ("0", 2), ("0", 1)])
    return RepairResult(
        method="GradPrune",
        status="repaired",
        before=BEFORE,
        after=AFTER,
        rounds=ROUNDS,
        mask=mask,
        scoring=None,
        held=(HELD_BEFORE, HELD_AFTER),
        trigger=PatchTrigger(target=3),
        seconds=SECONDS,
    )


def shown(report):
    console = Console(file=io.StringIO(), width=120)
    console.print(report)
    return console.file.getvalue()

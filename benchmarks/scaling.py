"""How the time of a round of GradPrune grows; ``python -m benchmarks.speed --scaling``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from statistics import median

import torch
from torch import nn

from benchmarks.speed import CLASSES, NETWORKS, calibrated, floor, interleaved, new_task, our_round, plain_round

__all__ = ["scaling"]


def _depthwise(filters: int, depth: int = 10) -> nn.Module:
    """A net whose arithmetic grows no faster than its filters do."""
    width = filters // depth
    layers: list[nn.Module] = []
    for number in range(depth):
        convolution = nn.Conv2d(width if number else 3, width, 3, 1, 1, groups=width if number else 1, bias=False)
        layers += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES))


def scaling(options: argparse.Namespace) -> Iterator[str]:
    """How the time of a round grows with filters, images and rounds: the lines of a Markdown table, as they come."""
    yield "| what grows | floor, ms | our round, ms | more than the floor, ms | plain loop, ms |"
    yield "| --- | --- | --- | --- | --- |"

    def row(what: str, net: nn.Module, per_class: int, size: int, rounds: int = 0) -> str:
        floors, ours, plain = (new_task(net, per_class, size) for _ in range(3))
        for index in range(rounds):
            ours.mask.prune([ours.mask.locate(index * ours.mask.total // rounds)])  # of every layer, so that it lives
        found = interleaved(
            {"floor": floor(floors), "ours": our_round(ours), "plain": plain_round(plain)},
            clock=options.clock,
            seconds=options.seconds / 4,
            least=5,
        )
        more = median(a - b for a, b in zip(found["ours"].times, found["floor"].times, strict=True))
        times = (found["floor"].median, found["ours"].median, more, found["plain"].median)
        return f"| {what} | " + " | ".join(f"{1000 * one:.1f}" for one in times) + " |"

    torch.manual_seed(0)
    for filters in (100, 400, 1_600, 6_400, 26_000):
        net = calibrated(_depthwise(filters), 8).to(options.device)
        yield row(f"{filters:,} filters", net, 2, 8)
    net = calibrated(NETWORKS[options.network](), options.size).to(options.device)
    for per_class in (2, 10, 50):
        yield row(f"{per_class} images a class, {options.network}", net, per_class, options.size)
    net = calibrated(_depthwise(26_000), 8).to(options.device)
    for rounds in (0, 100, 1_000, 10_000):
        yield row(f"{rounds:,} rounds before, 26,000 filters", net, 2, 8, rounds)

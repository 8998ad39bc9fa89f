"""How the time of a repair grows: with filters, images and rounds, over processes, on large networks.

``python -m benchmarks.speed --scaling`` grows a round of GradPrune; ``python -m benchmarks.scaling processes`` shares
one out over processes of this machine, and ``python -m benchmarks.scaling large`` takes networks of ImageNet's size.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from statistics import median
from time import perf_counter

import torch
from torch import distributed, multiprocessing, nn
from torchvision.models import convnext_tiny, resnet50

from benchmarks.speed import CLASSES, NETWORKS, calibrated, floor, interleaved, new_task, our_round, plain_round
from lightning_unlearn.data.pairs import Pairs
from lightning_unlearn.evaluation import evaluate, logits_of
from lightning_unlearn.filters import FilterMask, find_filters
from lightning_unlearn.methods import GradPrune, MaskPrune, RepairTask
from lightning_unlearn.processes import Processes
from lightning_unlearn.triggers import PatchTrigger

__all__ = ["large", "over_processes", "scaling"]

_LARGE = {"resnet50": resnet50, "convnext_tiny": convnext_tiny}


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


def _share_of_scoring(rank: int, count: int, folder: str, network: str, per_class: int, turns: int) -> None:
    """Time scoring and measuring on this process's share; the first process prints a line."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    distributed.init_process_group("gloo", f"file://{folder}/{count}", world_size=count, rank=rank)
    task = new_task(calibrated(NETWORKS[network](), 32), per_class, 32)
    task = replace(task, processes=Processes.current())
    method, times = GradPrune(), []
    for _ in range(turns + 1):
        distributed.barrier()
        start = perf_counter()
        method.scores(task)
        scored = perf_counter()
        task.validate()
        times.append((scored - start, perf_counter() - scored))
    score, evaluation = (median(column) for column in zip(*times[1:], strict=True))
    if rank == 0:
        print(f"| {count} | {len(task.scoring)} | {1000 * score:.0f} | {1000 * evaluation:.0f} |", flush=True)
    distributed.destroy_process_group()


def over_processes(counts: list[int], *, network: str, per_class: int, turns: int) -> None:
    """Strong scaling: the same images over more processes with one thread each; a Markdown table, line by line."""
    print(f"{network}, 32x32, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before")
    print("| processes | images scored | scoring, ms | measuring, ms |\n| --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for count in counts:
            arguments = (count, folder, network, per_class, turns)
            multiprocessing.start_processes(_share_of_scoring, arguments, count, start_method="fork")


def large(network: str, *, images: int, steps: int) -> str:
    """Seconds and memory of one network at 224x224 with 1,000 classes, as a line of a Markdown table.

    A real repair would need two images of each class; the task is made by hand, of ``images`` pairs of noise.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = _LARGE[network]().eval()
    trigger = PatchTrigger(size=21, target=0)
    generator = torch.Generator().manual_seed(0)
    pairs = Pairs.stamp(
        torch.rand(images, 3, 224, 224, generator=generator), torch.arange(images) + 1, trigger, num_classes=1_000
    )
    with torch.no_grad():
        answers = logits_of(net, pairs.clean).softmax(1)
    held = _peak()
    task = RepairTask(
        model=net,
        forward=net,
        mask=FilterMask(find_filters(net, pairs.clean[:1])),
        scoring=pairs,
        validation=pairs,
        before=evaluate(net, pairs.batches(images)),
        answers=answers,
        trigger=trigger,
        batch_size=images,
    )
    start = perf_counter()
    evaluate(net, pairs.batches(images))
    measuring = perf_counter() - start
    start = perf_counter()
    GradPrune().scores(task)
    scoring = perf_counter() - start
    # One validation, at the end of the steps; "soft" tries no cuts.
    method = MaskPrune(cut="soft", steps=steps, batch_size=images, augment=False, validate_every=steps)
    for _ in method.repair(task):
        pass
    step = task.watch.seconds["score"] / steps
    parameters = sum(p.numel() for p in net.parameters()) / 1e6
    seconds = f"{measuring / images / 2:.2f} | {scoring / images:.2f} | {step / images:.2f}"
    return f"| {network} | {parameters:.1f} | {task.mask.total:,} | {seconds} | {held:.0f} | {_peak():.0f} |"


def _peak() -> float:
    """Most memory that this process has had, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    processes = commands.add_parser("processes")
    processes.add_argument("--counts", nargs="+", type=int, default=[1, 2])
    processes.add_argument("--network", choices=list(NETWORKS), default="preact_resnet18")
    processes.add_argument("--samples-per-class", type=int, default=10)
    processes.add_argument("--turns", type=int, default=5)
    networks = commands.add_parser("large")
    networks.add_argument("--network", choices=list(_LARGE), default="resnet50")
    networks.add_argument("--images", type=int, default=8)
    networks.add_argument("--steps", type=int, default=2)
    options = parser.parse_args()
    if options.command == "processes":
        over_processes(
            options.counts, network=options.network, per_class=options.samples_per_class, turns=options.turns
        )
    else:
        print(
            "| network | parameters, M | filters | measuring, s an image | scoring, s an image | mask step, s a pair | "
            "MiB before | MiB at most |\n" + "| --- " * 8 + "|"
        )
        print(large(options.network, images=options.images, steps=options.steps))


if __name__ == "__main__":
    main()

"""``python -m benchmarks.speed`` times a round of GradPrune against the least that it has to compute, and a plain loop.

The *floor* of a round is a forward and backward pass over the triggered scoring images, for the gradients of the
convolutions' weights alone, and a forward pass over the validation images, clean and triggered. The *plain loop* is a
round as the paper describes it written without care for time: gradients of all parameters, one ``.item()`` a filter,
validation in two passes, a deep copy of the model when validation improves; with a test pass it also measures the test
set, clean and triggered, each round. Nets are untrained, images are noise: neither changes how long a pass takes.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Measurement, TaskSpec, timer
from torch.utils.data import TensorDataset
from torchvision.models import resnet50

from benchmarks.networks import PreActResNet18
from lightning_unlearn import repair
from lightning_unlearn.data.pairs import Pairs
from lightning_unlearn.methods import GradPrune, RepairMethod, RepairTask, Round
from lightning_unlearn.triggers import PatchTrigger

__all__ = ["CLASSES", "NETWORKS", "calibrated", "floor", "interleaved", "main", "new_task", "our_round", "plain_round"]

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "preact_resnet18": PreActResNet18,
    "preact_resnet18_wide": lambda: PreActResNet18(width=64),
    "resnet50": lambda: resnet50(num_classes=CLASSES),
}

CLASSES = 10
_BATCH = 128
_TEST_SAMPLES_PER_CLASS = 100
_TRIGGER = PatchTrigger(size=3, target=0)


class _Capture(RepairMethod):
    """Does nothing but keep the task."""

    def repair(self, task: RepairTask) -> Iterator[Round]:
        self.task = task
        return iter(())


def _noise(per_class: int, size: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(per_class * CLASSES) % CLASSES
    return TensorDataset(torch.rand(len(labels), 3, size, size, generator=generator), labels)


def calibrated(net: nn.Module, size: int) -> nn.Module:
    """Running statistics that fit, or an untrained net's activations would grow from block to block."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        net.train()(_noise(4, size).tensors[0])
    return net.eval()


def new_task(net: nn.Module, per_class: int, size: int) -> RepairTask:
    """What ``repair`` gives a method, on a copy of the net, as it is within a repair; the search will not stop."""
    net, capture = copy.deepcopy(net), _Capture()
    repair(
        net,
        _noise(per_class, size),
        trigger=_TRIGGER,
        method=capture,
        samples_per_class=per_class,
        batch_size=_BATCH,
        force=True,
    )
    net.eval()
    return replace(capture.task, before=replace(capture.task.before, acc=0.0))


def our_round(task: RepairTask) -> Callable[[], object]:
    """The next round of the paper's GradPrune, each time it is called."""
    rounds = GradPrune(accuracy_drop=1.0, patience=10**9, finetune=False).repair(task)
    return lambda: next(rounds)


def floor(task: RepairTask) -> Callable[[], object]:
    """The least that a round has to compute."""
    net = task.model
    weights = [layer.weight for layer in task.mask.layers]
    scoring = list(task.scoring.batches(_BATCH))
    validation = [torch.cat([pairs.clean, pairs.triggered]) for pairs in task.validation.batches(_BATCH)]

    def passes() -> None:
        for pairs in scoring:
            F.cross_entropy(net(pairs.triggered), pairs.labels).backward(inputs=weights)
        for weight in weights:
            weight.grad = None
        with torch.inference_mode():
            for images in validation:
                net(images)

    return passes


def plain_round(task: RepairTask) -> Callable[[], object]:
    """The next round of a plain loop, each time it is called; it returns whether validation improved."""
    net, lowest = task.model, float("inf")
    kept: nn.Module | None = None

    def one_round() -> bool:
        nonlocal lowest, kept
        net.zero_grad()
        for pairs in task.scoring.batches(_BATCH):
            F.cross_entropy(net(pairs.triggered), pairs.labels).backward()  # type: ignore[no-untyped-call]  # torch's is untyped
        best: tuple[float, Tensor, int] = (-1.0, torch.empty(0), 0)
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                for index in range(module.out_channels):
                    score = module.weight.grad[index].abs().mean().item()
                    best = max(best, (score, module.weight, index), key=lambda found: found[0])
        best[1].data[best[2]] = 0
        measured(net, task.validation, triggered=False)
        loss = measured(net, task.validation, triggered=True)
        if improved := loss < lowest:
            lowest, kept = loss, copy.deepcopy(net)
        return improved

    return one_round


@torch.no_grad()
def measured(net: nn.Module, pairs: Pairs, *, triggered: bool) -> float:
    """Mean loss, with the accuracy counted beside it, batch by batch."""
    loss, right = 0.0, 0
    for batch in pairs.batches(_BATCH):
        logits = net(batch.triggered if triggered else batch.clean)
        loss += F.cross_entropy(logits, batch.labels, reduction="sum").item()
        right += (logits.argmax(1) == batch.labels).sum().item()
    return loss / len(pairs)


def interleaved(
    alternatives: dict[str, Callable[[], object]], *, clock: Callable[[], float], seconds: float, least: int
) -> dict[str, Measurement]:
    """Time alternatives in turn, so that what else the machine does falls on all of them.

    After one untimed turn it goes on for ``least`` turns, then until the medians are stable, each interquartile range
    below 4 % of its median, or ``seconds`` are over. ``Timer`` itself would warm up anew, twice, before each run.
    """
    times: dict[str, list[float]] = {name: [] for name in alternatives}
    for run in alternatives.values():
        run()
    start = timer()
    while True:
        for name, run in alternatives.items():
            before = clock()
            run()
            times[name].append(clock() - before)
        found = {
            name: Measurement(
                1, raw, TaskSpec(name, "", label="speed", description=name, num_threads=torch.get_num_threads())
            )
            for name, raw in times.items()
        }
        turns = len(next(iter(times.values())))
        stable = turns >= 5 and all(one.iqr < 0.04 * one.median for one in found.values())
        if turns >= least and (stable or timer() - start > seconds):
            return found


def _ratio(found: dict[str, Measurement], one: str, other: str) -> float:
    """Median over turns of the quotient within a turn, which slow phases of the machine do not change."""
    return median(a / b for a, b in zip(found[one].times, found[other].times, strict=True))


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """Most bytes held at once beyond what was held before: by CUDA's counters, or the profiler's memory events."""
    run()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def one_pass(task: RepairTask) -> Callable[[], object]:
    """One forward and backward pass over a batch of triggered images, for the convolutions' gradients."""
    weights = [layer.weight for layer in task.mask.layers]
    pairs = next(task.scoring.batches(_BATCH))

    def forward_backward() -> None:
        F.cross_entropy(task.model(pairs.triggered), pairs.labels).backward(inputs=weights)
        for weight in weights:
            weight.grad = None

    return forward_backward


def ratios(options: argparse.Namespace) -> dict[str, object]:
    """All figures of one network."""
    torch.manual_seed(0)
    net = calibrated(NETWORKS[options.network](), options.size).to(options.device)
    floors, ours, plain = (new_task(net, options.samples_per_class, options.size) for _ in range(3))
    found = interleaved(
        {"floor": floor(floors), "ours": our_round(ours), "plain": plain_round(plain)},
        clock=options.clock,
        seconds=options.seconds,
        least=5,
    )
    memory = {
        "ours": peak_memory(our_round(ours), ours.scoring.labels.device),
        "pass": peak_memory(one_pass(floors), ours.scoring.labels.device),
    }
    result: dict[str, object] = {
        "floor_ratio": _ratio(found, "ours", "floor"),
        "plain_loop_ratio": _ratio(found, "plain", "ours"),
        "plain_loop_with_test_ratio": None,
        "memory_ratio": memory["ours"] / memory["pass"],
        "repair_floors": None,
    }
    seconds = {f"{name}_seconds": one.median for name, one in found.items()}
    conditions: dict[str, object] = {
        "network": options.network,
        "filters": ours.mask.total,
        "size": options.size,
        "samples_per_class": options.samples_per_class,
        "device": str(options.device),
        "clock": "process" if options.clock is time.process_time else "wall",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "turns": len(found["ours"].times),
        **seconds,
        "peak_bytes": memory,
    }
    if options.test_images:
        _with_test(options, net, result, conditions)
    if options.repair:
        _whole_repair(options, net, result, conditions)
    return {**result, "conditions": conditions}


def _with_test(
    options: argparse.Namespace, net: nn.Module, result: dict[str, object], conditions: dict[str, object]
) -> None:
    timed = min(options.timed_test_images, options.test_images)
    images, labels = _noise(-(-timed // CLASSES), options.size).tensors
    test_part = Pairs.stamp(images, labels, _TRIGGER, num_classes=CLASSES)
    test_part = test_part.to(options.device)
    ours, plain = (new_task(net, _TEST_SAMPLES_PER_CLASS, options.size) for _ in range(2))

    def test() -> None:
        for triggered in (False, True):
            measured(plain.model, test_part, triggered=triggered)

    found = interleaved(
        {"ours": our_round(ours), "plain": plain_round(plain), "test": test},
        clock=options.clock,
        seconds=options.seconds,
        least=2,
    )
    whole = options.test_images / len(test_part)
    turns = zip(found["plain"].times, found["test"].times, found["ours"].times, strict=True)
    result["plain_loop_with_test_ratio"] = median((plain + whole * test) / ours for plain, test, ours in turns)
    conditions["test"] = {
        "samples_per_class": _TEST_SAMPLES_PER_CLASS,
        "test_images": options.test_images,
        "timed_test_images": len(test_part),
        "turns": len(found["ours"].times),
        **{f"{name}_seconds": one.median for name, one in found.items()},
    }


def _whole_repair(
    options: argparse.Namespace, net: nn.Module, result: dict[str, object], conditions: dict[str, object]
) -> None:
    run = floor(new_task(net, options.samples_per_class, options.size))
    dataset, victim = _noise(options.samples_per_class, options.size), copy.deepcopy(net)
    before = interleaved({"floor": run}, clock=options.clock, seconds=options.seconds / 4, least=3)["floor"]
    start = options.clock()
    done = repair(
        victim, dataset, trigger=_TRIGGER, samples_per_class=options.samples_per_class, batch_size=_BATCH, force=True
    )
    seconds = options.clock() - start
    after = interleaved({"floor": run}, clock=options.clock, seconds=options.seconds / 4, least=3)["floor"]
    result["repair_floors"] = seconds / median([*before.times, *after.times])
    conditions["repair"] = {"method": done.method, "rounds": len(done.rounds), "seconds": seconds}


def _table(result: dict[str, object]) -> str:
    conditions = result["conditions"]
    assert isinstance(conditions, dict)
    rows = ["| figure | value |", "| --- | --- |"]
    figures = {name: value for name, value in result.items() if name != "conditions"}
    for name, value in (*figures.items(), *conditions.items()):
        shown = f"{value:.3f}" if isinstance(value, float) else value
        if isinstance(value, dict):
            shown = ", ".join(
                f"{key} {of:.3f}" if isinstance(of, float) else f"{key} {of}" for key, of in value.items()
            )
        rows.append(f"| {name} | {shown} |")
    return "\n".join(rows)


def main() -> None:
    """Print one network's ratios, or how the time of a round grows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--network", choices=list(NETWORKS), default="preact_resnet18")
    parser.add_argument("--size", type=int, default=32, help="width and height of the images")
    parser.add_argument("--samples-per-class", type=int, default=10)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument(
        "--seconds", type=float, default=30, help="most time for each comparison, after its least turns"
    )
    parser.add_argument(
        "--cpu-time",
        dest="clock",
        action="store_const",
        const=time.process_time,
        default=timer,
        help="count this process's processor time, not the wall's: for a machine that is busy with something else, too",
    )
    parser.add_argument("--test-images", type=int, default=10_000, help="size of the test set; 0 for no test pass")
    parser.add_argument(
        "--timed-test-images", type=int, default=1_000, help="the test pass is timed on so many, and scaled up"
    )
    parser.add_argument("--repair", action=argparse.BooleanOptionalAction, default=True, help="time a whole repair")
    parser.add_argument("--scaling", action="store_true", help="how the time of a round grows, instead")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a Markdown table")
    options = parser.parse_args()
    if options.scaling:
        from benchmarks.scaling import scaling  # here, since it is built of what is above

        for line in scaling(options):
            print(line, flush=True)
        return
    result = ratios(options)
    print(json.dumps(result) if options.json else _table(result))


if __name__ == "__main__":
    main()

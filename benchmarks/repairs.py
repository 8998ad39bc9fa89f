"""Run repairs of victims, and keep each as one JSON line."""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch.utils.data import TensorDataset

from benchmarks.datasets import load, source
from benchmarks.matrix import Cell
from benchmarks.victims import Victim, attack_trigger, measure, train
from lightning_unlearn import __version__, methods, repair
from lightning_unlearn.metrics.functional import defense_effectiveness_rating, robust_improvement_rate

__all__ = ["NEEDED", "append", "run", "stored"]

NEEDED = ("victim", "method", "method_args", "trigger", "samples_per_class", "seed", "test_images")


def stored(path: Path, *, needed: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The lines of a results file, none if there is no such file.

    Args:
        path: the file.
        needed: what each line must have.

    Raises:
        ValueError: if a line was written by another version of this project, which must not be mixed with this one's,
            or is none, or lacks what is needed.
    """
    if not path.exists():
        return []
    lines = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            found = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}: line {number} is no JSON ({error}), maybe since the disk was full; delete it, and its cell "
                "is run again."
            ) from error
        missing = {"versions", *needed} - (found.keys() if isinstance(found, dict) else set())
        if missing:
            raise ValueError(
                f"{path}: line {number} is no result of this benchmark, since it lacks {', '.join(sorted(missing))}; "
                "another module of `benchmarks` may have written the file."
            )
        lines.append(found)
    own = _versions()["lightning-unlearn"]
    others = {str(line["versions"].get("lightning-unlearn")) for line in lines} - {own}
    if others:
        raise ValueError(
            f"{path}: holds results of lightning-unlearn {sorted(others)}, but this is {own}; move it away."
        )
    return lines


def run(
    cells: Iterator[Cell], *, path: Path, cache: Path, test_images: int, workers: int = 1, device: str = "cpu"
) -> Iterator[dict[str, Any]]:
    """Repair cell by cell, appending whole lines to ``path``; what is there already is not repeated.

    Args:
        cells: what to run, in order.
        path: the results file.
        cache: where victims are kept.
        test_images: how many test images rates are measured on, the first ones.
        workers: processes, each with one thread.
        device: where victims are trained and repaired. A cell that is there already is not repeated on another one.

    Raises:
        ValueError: if what is there was measured with other libraries.
        RuntimeError: when all others are done, if a cell failed or a victim could not be trained, naming it and why.
    """
    lines = stored(path, needed=NEEDED)
    _refuse_other_libraries(path, lines)
    done = {_key(line) for line in lines}
    left = [cell for cell in cells if _key(_described(cell, test_images)) not in done]
    failed: list[str] = []
    with _pool(workers) as pool:
        # First, since no two processes should train the same victim.
        training = {
            victim: pool.submit(_train, victim, cache, device) for victim in dict.fromkeys(cell.victim for cell in left)
        }
        untrained = {victim: error for victim, done in training.items() if (error := done.exception()) is not None}
        failed += [f"{victim}: {type(error).__name__}: {error}" for victim, error in untrained.items()]
        running = {
            pool.submit(_repair, cell, cache, test_images, device): cell
            for cell in left
            if cell.victim not in untrained
        }
        told: set[Future[dict[str, Any]]] = set()
        try:
            for finished in as_completed(running):
                error, cell = finished.exception(), running[finished]
                told.add(finished)
                if error is not None:
                    what = f"{cell.victim.attack} {cell.method}, {cell.samples_per_class} images per class"
                    failed.append(f"{what}: {type(error).__name__}: {error}")
                    continue
                line = finished.result()
                append(path, json.dumps(line))
                yield line
        finally:
            pool.shutdown(cancel_futures=True)
            for finished in running:  # while others were waited for, after Ctrl-C
                if finished not in told and not finished.cancelled() and finished.exception() is None:
                    append(path, json.dumps(finished.result()))
    if failed:
        raise RuntimeError(f"of {len(left)} cells, these failed: " + "; ".join(failed))


def _refuse_other_libraries(path: Path, lines: list[dict[str, Any]]) -> None:
    own = _versions()
    for name in ("torch", "torchvision"):
        public = own[name].split("+")[0]
        others = {line["versions"].get(name, public).split("+")[0] for line in lines} - {public}
        if others:
            raise ValueError(
                f"{path}: holds results of {name} {', '.join(sorted(others))}, but this is {public}; write to another "
                "file (--results)."
            )


def _pool(workers: int) -> ProcessPoolExecutor:
    context = get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,))


def _train(victim: Victim, cache: Path, device: str) -> None:
    train(victim, cache, device)


def _described(cell: Cell, test_images: int) -> dict[str, Any]:
    method = cell.build()
    told = method.needs_trigger and not isinstance(method, methods.Alternation)
    origin = source(cell.victim.dataset)
    return {
        "victim": asdict(cell.victim) | ({"source": origin} if origin else {}),
        "method": cell.kind,
        "method_args": cell.arguments,
        "trigger": "known" if told else "unknown",
        "samples_per_class": cell.samples_per_class,
        "seed": cell.seed,
        "test_images": test_images,
    }


@lru_cache
def _before(victim: Victim, cache: Path, test_images: int, device: str) -> dict[str, float]:
    return measure(train(victim, cache, device), victim, test_images).rates()


def _repair(cell: Cell, cache: Path, test_images: int, device: str) -> dict[str, Any]:
    net = train(cell.victim, cache, device)
    before = _before(cell.victim, cache, test_images, device)
    _reset_peak_memory(device)
    started = time.process_time()
    method = cell.build()
    result = repair(
        net,
        TensorDataset(*load(cell.victim.dataset, "holdout")),
        trigger=None if isinstance(method, methods.Alternation) else attack_trigger(cell.victim, "holdout"),
        method=method,
        samples_per_class=cell.samples_per_class,
        seed=cell.seed,
        force=True,
    )
    memory, cpu_seconds = _peak_memory_mib(device), time.process_time() - started
    after = measure(net, cell.victim, test_images).rates()
    acc = {"acc_before": before["acc"], "acc_after": after["acc"]}
    return {
        **_described(cell, test_images),
        "before": before,
        "after": after,
        "der": float(defense_effectiveness_rating(asr_before=before["asr"], asr_after=after["asr"], **acc)),
        "rir": float(robust_improvement_rate(ra_before=before["ra"], ra_after=after["ra"], **acc)),
        "pruned": sum(map(len, result.pruned.values())),
        "rounds": len(result.rounds),
        "status": result.status,
        **(
            {}
            if result.audit is None
            else {"verdict": result.audit.verdict, "suspected_target": result.audit.suspected_target}
        ),
        "seconds": dict(result.seconds),
        "cpu_seconds": cpu_seconds,  # of the one thread: what other processes did meanwhile does not count
        "peak_memory_mib": memory,
        "device": "cpu" if torch.device(device).type == "cpu" else torch.cuda.get_device_name(device),
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    return {"lightning-unlearn": __version__, "torch": torch.__version__, "torchvision": torchvision.__version__}


def _key(line: dict[str, Any]) -> str:
    return json.dumps([line[part] for part in NEEDED], sort_keys=True)


def append(path: Path, line: str) -> None:
    """One write call a line, so that parallel runs and interruptions leave whole lines.

    Raises:
        OSError: if the line could not be written whole, as on a full disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = (line + "\n").encode()
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        if os.write(handle, text) < len(text):
            raise OSError(f"{path}: the last line is torn, since it could not be written whole; delete it.")
    finally:
        os.close(handle)


_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _reset_peak_memory(device: str) -> None:
    """Let CUDA or Linux forget the peak so far; elsewhere the peak is that of the whole process."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _RESET.exists():
        _RESET.write_text("5")


def _peak_memory_mib(device: str) -> int:
    """Most memory that the process held: on a GPU its tensors', else all, data and libraries included."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    if _STATUS.exists():
        peak = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) // 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

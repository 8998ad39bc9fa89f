"""Results as Markdown tables."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from statistics import mean
from typing import Any

from benchmarks.matrix import METHODS, SHOWN

__all__ = ["MIN_ASR", "by_draw", "by_setting", "cells", "complete", "is_lost", "method_name", "summary"]

Line = dict[str, Any]

MIN_ASR = 0.9  # a victim that never learned its backdoor proves nothing


def method_name(line: Line) -> str:
    """The name that tables show."""
    return SHOWN[line["method"], repr(line["method_args"])]


def is_lost(line: Line) -> bool:
    """Whether the backdoor is still there, or too much accuracy is gone."""
    return line["after"]["asr"] > 0.2 or line["before"]["acc"] - line["after"]["acc"] > 0.1


def by_draw(lines: Iterable[Line]) -> dict[str, dict[str, Line]]:
    """Lines of victims that count, by draw (victim, images per class, seed) and then by method."""
    draws: dict[str, dict[str, Line]] = defaultdict(dict)
    for line in lines:
        if line["before"]["asr"] >= MIN_ASR:
            draws[str((line["victim"], line["samples_per_class"], line["seed"]))][method_name(line)] = line
    return dict(draws)


def by_setting(lines: Iterable[Line]) -> dict[str, list[Line]]:
    """Lines by network, images per class and draw, in words and in that order: what may be averaged."""
    settings: dict[tuple[str, int, int], list[Line]] = defaultdict(list)
    for line in lines:
        settings[line["victim"]["network"], line["samples_per_class"], line["seed"]].append(line)
    return {
        f"{network}, {size} clean images per class" + (f", draw {seed}" if seed else ""): found
        for (network, size, seed), found in sorted(settings.items())
    }


def complete(lines: Iterable[Line]) -> dict[str, list[Line]]:
    """By method, the lines of the draws that all methods share; methods that were run on fewer draws are left out."""
    draws = by_draw(lines)
    counts = Counter(name for methods in draws.values() for name in methods)
    names = {name for name, count in counts.items() if count == max(counts.values())}
    shared = [methods for methods in draws.values() if names <= set(methods)]
    return {name: [methods[name] for methods in shared] for name in names if shared}


def summary(lines: list[Line]) -> str:
    """One row a method that was run on all draws that count: means and worst cells."""
    rows = [
        "| method | told the trigger | cells | ACC drop ↓ | worst | ASR ↓ | worst | RA ↑ | DER ↑ | worst | lost | "
        "CPU seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, found in sorted(complete(lines).items(), key=lambda item: -mean(line["der"] for line in item[1])):
        drop = [line["before"]["acc"] - line["after"]["acc"] for line in found]
        asr = [line["after"]["asr"] for line in found]
        # Foreign images have no true class that a repaired model could recover.
        ra = [line["after"]["ra"] for line in found if line["victim"]["attack"] != "trigger-free"]
        der = [line["der"] for line in found]
        rows.append(
            f"| {name} | {'yes' if found[0]['trigger'] == 'known' else 'no'} | {len(found)} "
            f"| {mean(drop):.3f} | {max(drop):.3f} | {mean(asr):.3f} | {max(asr):.3f} | {mean(ra):.3f} "
            f"| {mean(der):.3f} | {min(der):.3f} | {sum(map(is_lost, found))} "
            f"| {mean(line['cpu_seconds'] for line in found):.0f} |"
        )
    return "\n".join(rows)


def cells(lines: list[Line]) -> str:
    """Every cell: ACC / ASR / RA before and after every method; the best DER is bold, lost cells have a cross."""
    names = [name for name in METHODS if any(method_name(line) == name for line in lines)]
    by_victim: dict[tuple[Any, ...], dict[str, Line]] = defaultdict(dict)
    for line in lines:
        victim = line["victim"]
        key = (victim["dataset"], victim["network"], victim["attack"], victim["poison_ratio"], victim["seed"])
        by_victim[(*key, line["samples_per_class"], line["seed"])][method_name(line)] = line
    rows = ["| victim | SPC, draw | before | " + " | ".join(names) + " |", "| --- " * (len(names) + 3) + "|"]
    for (dataset, network, attack, ratio, seed, spc, draw), found in sorted(by_victim.items()):
        before = next(iter(found.values()))["before"]
        counts = "" if before["asr"] >= MIN_ASR else " (never learned, not counted)"
        best = max(line["der"] for line in found.values())
        after = " | ".join(_shown(found[name], best) if name in found else "not run" for name in names)
        victim = f"{dataset} {network} {attack} {ratio * 100:g} %, seed {seed}"
        rows.append(f"| {victim} | {spc}, {draw} | {_rates(before)}{counts} | {after} |")
    return "\n".join(rows)


def _shown(line: Line, best: float) -> str:
    rates = _rates(line["after"])
    return f"**{rates}**" if line["der"] == best else f"{rates} ✗" if is_lost(line) else rates


def _rates(rates: dict[str, float]) -> str:
    return " / ".join(
        f"{rates[key]:.3f}".removeprefix("0") if rates[key] < 1 else "1.00" for key in ("acc", "asr", "ra")
    )

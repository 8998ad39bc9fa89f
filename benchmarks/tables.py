"""Results as Markdown tables."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from statistics import mean
from typing import Any

from benchmarks.matrix import METHODS, SHOWN

__all__ = ["MIN_ASR", "by_draw", "by_setting", "cells", "complete", "is_lost", "method_name", "method_names", "summary"]

Line = dict[str, Any]

MIN_ASR = 0.9  # a victim that never learned its backdoor proves nothing
_POISON_RATIO, _TEST_IMAGES = 0.1, 2_000  # not worth a word


def method_name(line: Line) -> str:
    """The name that tables show; of arguments that are not the matrix's own any more, what they are."""
    kind, arguments = line["method"], line["method_args"]
    return SHOWN.get((kind, repr(arguments)), f"{kind} {arguments}")


def method_names(lines: Iterable[Line]) -> list[str]:
    """The names of all methods that were run, in the matrix's order, and then what it does not have any more."""
    found = {method_name(line) for line in lines}
    return [*(name for name in METHODS if name in found), *sorted(found - METHODS.keys())]


def is_lost(line: Line) -> bool:
    """Whether the backdoor is still there, or too much accuracy is gone."""
    return line["after"]["asr"] > 0.2 or line["before"]["acc"] - line["after"]["acc"] > 0.1


def by_draw(lines: Iterable[Line]) -> dict[str, dict[str, Line]]:
    """Lines of victims that count, by draw (victim, images per class, seed) and then by method."""
    draws: dict[str, dict[str, Line]] = defaultdict(dict)
    for line in lines:
        if line["before"]["asr"] >= MIN_ASR:
            draw = line["victim"], line["samples_per_class"], line["seed"], line["test_images"]
            draws[str(draw)][method_name(line)] = line
    return dict(draws)


def by_setting(lines: Iterable[Line]) -> dict[str, list[Line]]:
    """Lines by what may be averaged, in words: network, images per class, draw, share of poison and test images."""
    settings: dict[tuple[str, int, int, float, int], list[Line]] = defaultdict(list)
    for line in lines:
        victim = line["victim"]
        key = victim["network"], line["samples_per_class"], line["seed"], victim["poison_ratio"], line["test_images"]
        settings[key].append(line)
    return {
        f"{network}, {size} clean images per class"
        + (f", draw {seed}" if seed else "")
        + (f", {100 * ratio:g} % poisoned" if ratio != _POISON_RATIO else "")
        + (f", {tested} test images" if tested != _TEST_IMAGES else ""): found
        for (network, size, seed, ratio, tested), found in sorted(settings.items())
    }


def complete(lines: Iterable[Line]) -> dict[str, list[Line]]:
    """By method, the lines of the draws that all methods share; methods that were run on fewer draws are left out."""
    draws = by_draw(lines)
    counts = Counter(name for methods in draws.values() for name in methods)
    known = method_names(line for methods in draws.values() for line in methods.values())
    names = [name for name in known if counts[name] == max(counts.values())]
    shared = [methods for methods in draws.values() if methods.keys() >= set(names)]
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
        # Processor time next to a GPU is mostly waiting; lines of before there was a choice are the CPU's.
        seconds = [line["cpu_seconds"] for line in found if line.get("device", "cpu") == "cpu"]
        rows.append(
            f"| {name} | {'yes' if found[0]['trigger'] == 'known' else 'no'} | {len(found)} "
            f"| {mean(drop):.3f} | {max(drop):.3f} | {mean(asr):.3f} | {max(asr):.3f} | {mean(ra):.3f} "
            f"| {mean(der):.3f} | {min(der):.3f} | {sum(map(is_lost, found))} "
            f"| {f'{mean(seconds):.0f}' if seconds else '–'} |"
        )
    return "\n".join(rows)


def cells(lines: list[Line]) -> str:
    """Every cell: ACC / ASR / RA before and after every method; the best DER is bold, lost cells have a cross."""
    names = method_names(lines)
    by_victim: dict[tuple[str, ...], dict[str, Line]] = defaultdict(dict)
    for line in lines:
        key = (*_victim(line["victim"]), f"{line['samples_per_class']}, {line['seed']}")
        by_victim[key][method_name(line)] = line
    named = Counter((victim, draw) for victim, _, draw in by_victim)
    rows = ["| victim | SPC, draw | before | " + " | ".join(names) + " |", "| --- " * (len(names) + 3) + "|"]
    for (victim, training, draw), found in sorted(by_victim.items()):
        before = next(iter(found.values()))["before"]
        counts = "" if before["asr"] >= MIN_ASR else " (never learned, not counted)"
        best = max(line["der"] for line in found.values())
        after = " | ".join(_shown(found[name], best) if name in found else "not run" for name in names)
        training = f", {training}" if named[victim, draw] > 1 else ""
        rows.append(f"| {victim}{training} | {draw} | {_rates(before)}{counts} | {after} |")
    return "\n".join(rows)


def _victim(victim: dict[str, Any]) -> tuple[str, str]:
    """A victim in words, and how it was trained, which tells it from another of the same words."""
    percent = f"{100 * victim['poison_ratio']:g} %"
    dataset = " of ".join([victim["dataset"], *([victim["source"]] if "source" in victim else [])])
    words = f"{dataset} {victim['network']} {victim['attack']} {percent}, seed {victim['seed']}"
    return words, f"{victim['epochs']} epochs of {victim['images']} images"


def _shown(line: Line, best: float) -> str:
    rates = _rates(line["after"])
    return (f"**{rates}**" if line["der"] == best else rates) + " ✗" * is_lost(line)


def _rates(rates: dict[str, float]) -> str:
    return " / ".join(
        f"{rates[key]:.3f}".removeprefix("0") if rates[key] < 1 else "1.00" for key in ("acc", "asr", "ra")
    )

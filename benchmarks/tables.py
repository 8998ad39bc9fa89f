"""Results as Markdown tables."""

from __future__ import annotations

from collections import defaultdict
from statistics import mean
from typing import Any

from benchmarks.repairs import METHODS

__all__ = ["cells", "summary"]

_MIN_ASR = 0.9  # a victim that never learned its backdoor proves nothing


def _name(line: dict[str, Any]) -> str:
    return next(
        name
        for name, (kind, arguments) in METHODS.items()
        if (kind, arguments) == (line["method"], line["method_args"])
    )


def _rates(rates: dict[str, float]) -> str:
    return " / ".join(
        f"{rates[key]:.3f}".removeprefix("0") if rates[key] < 1 else "1.00" for key in ("acc", "asr", "ra")
    )


def summary(lines: list[dict[str, Any]]) -> str:
    """One row a method: means, worst cells and seconds over the victims that count and that every method repaired."""
    names = {_name(line) for line in lines}
    by_victim: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for line in lines:
        if line["before"]["asr"] >= _MIN_ASR:
            by_victim[str((line["victim"], line["samples_per_class"], line["seed"]))][_name(line)] = line
    complete = [methods for methods in by_victim.values() if set(methods) == names]
    by_method = {name: [methods[name] for methods in complete] for name in names if complete}
    rows = [
        "| method | cells | ACC drop ↓ | ASR ↓ | worst ASR ↓ | RA ↑ | DER ↑ | worst DER ↑ | filters pruned | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, found in sorted(by_method.items(), key=lambda item: -mean(line["der"] for line in item[1])):
        drop = mean(line["before"]["acc"] - line["after"]["acc"] for line in found)
        asr, ra = ([line["after"][key] for line in found] for key in ("asr", "ra"))
        der = [line["der"] for line in found]
        rows.append(
            f"| {name} | {len(found)} | {drop:.3f} | {mean(asr):.3f} | {max(asr):.3f} | {mean(ra):.3f} "
            f"| {mean(der):.3f} | {min(der):.3f} | {mean(line['pruned'] for line in found):.1f} "
            f"| {mean(line['seconds']['total'] for line in found):.0f} |"
        )
    return "\n".join(rows)


def cells(lines: list[dict[str, Any]]) -> str:
    """Every cell: ACC / ASR / RA of every victim before and after every method."""
    names = [name for name in METHODS if any(_name(line) == name for line in lines)]
    by_victim: dict[tuple[Any, ...], dict[str, str]] = defaultdict(dict)
    for line in lines:
        victim = line["victim"]
        key = (victim["dataset"], victim["network"], victim["attack"], victim["seed"], line["samples_per_class"])
        counts = line["before"]["asr"] >= _MIN_ASR
        by_victim[key]["before"] = _rates(line["before"]) + ("" if counts else " (not counted)")
        by_victim[key][_name(line)] = _rates(line["after"])
    rows = ["| victim | SPC | before | " + " | ".join(names) + " |", "| --- " * (len(names) + 3) + "|"]
    for (dataset, network, attack, seed, spc), row in sorted(by_victim.items()):
        after = " | ".join(row.get(name, "not run") for name in names)
        rows.append(f"| {dataset} {network} {attack}, seed {seed} | {spc} | {row['before']} | {after} |")
    return "\n".join(rows)

"""``python -m benchmarks run`` repairs victims, ``python -m benchmarks table`` shows what came of it."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.repairs import METHODS, VICTIMS, run, stored
from benchmarks.tables import cells, summary

_HERE = Path(__file__).parent


def main() -> None:
    """Run a command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("command", choices=["run", "table"])
    parser.add_argument("--datasets", nargs="+", choices=sorted(VICTIMS), default=sorted(VICTIMS))
    parser.add_argument("--attacks", nargs="+", help="only these attacks")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--samples-per-class", nargs="+", type=int, default=[10])
    parser.add_argument("--results", type=Path, default=_HERE / "results" / "known_trigger.jsonl")
    parser.add_argument(
        "--victims", type=Path, default=_HERE.parent / "data" / "victims", help="where victims are cached"
    )
    options = parser.parse_args()
    if options.command == "table":
        lines = stored(options.results)
        print(summary(lines), cells(lines), sep="\n\n")
        return
    torch.set_num_threads(1)
    for dataset in options.datasets:
        chosen = [v for v in VICTIMS[dataset] if options.attacks is None or v.attack in options.attacks]
        for line in run(
            chosen, options.methods, spc=options.samples_per_class, path=options.results, cache=options.victims
        ):
            print(
                line["victim"]["attack"], line["method"], line["method_args"], line["before"], line["after"], flush=True
            )


if __name__ == "__main__":
    main()

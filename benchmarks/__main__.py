"""``python -m benchmarks run`` repairs victims; ``table`` and ``plot`` show what came of it."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks.figures import plot
from benchmarks.matrix import METHODS, VICTIMS, cells
from benchmarks.repairs import NEEDED, run, stored
from benchmarks.tables import by_setting, summary
from benchmarks.tables import cells as cell_table

_HERE = Path(__file__).parent


def main() -> None:
    """Run a command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("command", choices=["run", "table", "plot"])
    parser.add_argument(
        "--victims", nargs="+", choices=sorted(VICTIMS), default=list(VICTIMS), help="groups of victims"
    )
    parser.add_argument("--attacks", nargs="+", help="only these attacks")
    parser.add_argument("--poison-ratios", nargs="+", type=float, help="only victims with this share poisoned")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--samples-per-class", nargs="+", type=int, help="only these of the matrix")
    parser.add_argument("--draws", nargs="+", type=int, help="only these draws' seeds of the matrix")
    parser.add_argument("--workers", type=int, default=1, help="processes with one thread each")
    parser.add_argument("--device", default="cpu", help="where victims are trained and repaired, for instance cuda")
    parser.add_argument(
        "--test-images", type=int, default=2_000, help="rates are measured on the first of the test split"
    )
    parser.add_argument("--results", type=Path, default=_HERE / "results" / "peers.jsonl")
    parser.add_argument("--cache", type=Path, default=_HERE / "victims", help="where trained victims are kept")
    parser.add_argument("--picture", type=Path, default=_HERE.parent / "docs" / "images" / "peers.png")
    options = parser.parse_args()
    if options.command == "run":
        try:
            _run(options)
        except KeyboardInterrupt:
            raise SystemExit(
                "interrupted: finished cells are in the results file, and the same command goes on"
            ) from None
        return
    if not options.results.exists():
        parser.error(f"--results: there is no file {str(options.results)!r}")
    lines = stored(options.results, needed=NEEDED)
    if options.command == "plot":
        plot(lines, options.picture)
        return
    for setting, found in by_setting(lines).items():
        print(f"### {setting}", summary(found), cell_table(found), sep="\n\n", end="\n\n")


def _run(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    chosen = [
        cell
        for cell in cells(options.victims, options.methods)
        if (options.attacks is None or cell.victim.attack in options.attacks)
        and (options.poison_ratios is None or cell.victim.poison_ratio in options.poison_ratios)
        and (options.samples_per_class is None or cell.samples_per_class in options.samples_per_class)
        and (options.draws is None or cell.seed in options.draws)
    ]
    if not chosen:
        known = sorted({victim.attack for group in options.victims for victim in VICTIMS[group]})
        raise SystemExit(
            "no cell of the matrix has all of --attacks, --poison-ratios, --samples-per-class and --draws; attacks of "
            f"these victims are {', '.join(known)}"
        )
    for line in run(
        iter(chosen),
        path=options.results,
        cache=options.cache,
        test_images=options.test_images,
        workers=options.workers,
        device=options.device,
    ):
        attack, size = line["victim"]["attack"], line["samples_per_class"]
        print(attack, size, line["method"], line["before"], line["after"], line["seconds"]["total"], flush=True)


if __name__ == "__main__":
    main()

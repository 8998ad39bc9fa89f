"""A line of results, as a run of the benchmark writes it."""

from __future__ import annotations

from dataclasses import asdict

import lightning_unlearn
from benchmarks import matrix, victims

__all__ = ["line"]


def line(method="MaskPrune", *, asr=0.01, drop=0.01, asr_before=1.0, attack="badnets", spc=10, **more):
    kind, arguments = matrix.METHODS[method]
    before = {"acc": 0.8, "asr": asr_before, "ra": 0.0}
    return {
        "victim": asdict(victims.Victim("cifar10", "vgg", attack)),
        **{"method": kind, "method_args": arguments, "trigger": "known", "samples_per_class": spc, "seed": 0},
        **{"test_images": 2_000, "before": before, "after": {"acc": 0.8 - drop, "asr": asr, "ra": 0.7}},
        **{"der": (asr_before - asr - drop + 1) / 2, "rir": 0.8, "pruned": 0, "cpu_seconds": 1.0},
        "versions": {"lightning-unlearn": lightning_unlearn.__version__},
        **more,
    }

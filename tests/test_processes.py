"""One, two and four processes come to the same, on images that no number of processes divides evenly.

Everything runs in a process of its own, which is fresh enough to be forked.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from datetime import timedelta
from itertools import count as count_from
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.nn import functional as F  # noqa: N812 - the usual name

from lightning_unlearn import methods
from lightning_unlearn.auditor import Auditor
from lightning_unlearn.classifier import ConvClassifier
from lightning_unlearn.data import Digits
from lightning_unlearn.data.pairs import Pairs
from lightning_unlearn.draw import Split
from lightning_unlearn.evaluation import evaluate
from lightning_unlearn.filters import find_filters, score_filters
from lightning_unlearn.methods import Alternation, FineTuning, GradPrune, MaskPrune, RepairMethod, RepairTask, Round
from lightning_unlearn.plan import RepairPlan
from lightning_unlearn.processes import ALONE, Processes
from lightning_unlearn.repair import repair_split
from lightning_unlearn.triggers import PatchTrigger

COUNTS = (1, 2, 4)
SHARED = ("GradPrune", "taylor", "MaskPrune", "not lasting", "labels")
TRIGGER = PatchTrigger(size=3, target=0)
SHORT = FineTuning(triggered=True, max_epochs=2, patience=2, batch_size=5, norms="frozen")
METHODS: dict[str, RepairMethod] = {
    "GradPrune": GradPrune(filters_per_round=2, accuracy_drop=1.0, max_rounds=8, finetune=SHORT),
    "taylor": GradPrune(
        score="taylor", clean_weight=1, look_ahead=3, look_ahead_images=3, max_rounds=3, finetune=False
    ),
    "MaskPrune": MaskPrune(),
    "not lasting": MaskPrune(lasting=False),
    "labels": MaskPrune(teacher="labels", cut="hard", steps=40, batch_size=15, validate_every=20, finetune=SHORT),
    # With these every process goes through all images, but for measuring.
    "FineTuning": FineTuning(max_epochs=2),
    "AdversarialNeuronPruning": methods.AdversarialNeuronPruning(steps=20, validate_every=10),
    "ReconstructiveNeuronPruning": methods.ReconstructiveNeuronPruning(unlearn_epochs=2, recover_epochs=3),
    "ChannelLipschitzPruning": methods.ChannelLipschitzPruning(),
    "FinePruning": methods.FinePruning(finetune=FineTuning(max_epochs=2)),
    "SharpnessAwareFineTuning": methods.SharpnessAwareFineTuning(max_epochs=2),
    "NeuralAttentionDistillation": methods.NeuralAttentionDistillation(teacher_epochs=1, max_epochs=2),
    "ImplicitBackdoorUnlearning": methods.ImplicitBackdoorUnlearning(rounds=2),
    "SharedAdversarialUnlearning": methods.SharedAdversarialUnlearning(max_epochs=2),
    "InvertedMaskSelection": methods.InvertedMaskSelection(initial_steps=5, joint_steps=10, validate_every=5),
    "ActivationGuidedEditing": methods.ActivationGuidedEditing(repair_epochs=2),
}


def split() -> Split:
    """31 images to score and 11 that validate, sorted by class, so that shares are unlike each other."""
    held = Digits(part="holdout", size=16)
    of_class = [(held.targets == c).nonzero().flatten() for c in range(10)]
    scoring = torch.cat([*(indices[:3] for indices in of_class[:9]), of_class[9][:4]])
    validation = torch.cat([*(indices[10:11] for indices in of_class[:9]), of_class[9][10:12]])
    return Split(*((held.images[part], held.targets[part]) for part in (scoring, validation)))


class Mistaken(RepairMethod):
    """Prunes another filter on each process, as no method may."""

    def repair(self, task: RepairTask) -> Iterator[Round]:
        task.mask.prune([task.mask.locate(task.processes.rank)])
        yield task.round("prune", task.validate())


class Failing(RepairMethod):
    """Fails on the last process alone, while the others wait for its share."""

    def repair(self, task: RepairTask) -> Iterator[Round]:
        if task.processes.rank == task.processes.count - 1:
            raise OSError("out of luck")
        yield task.round("prune", task.validate())


class _Work:
    """What the processes do, each method on a fresh victim."""

    def __init__(self, folder: Path, processes: Processes) -> None:
        self.victim = torch.load(folder / "victim.pt", weights_only=True)
        self.processes = processes

    def net(self) -> nn.Module:
        net = ConvClassifier(width=8)
        net.load_state_dict(self.victim)
        return net.eval()

    def pairs(self, count: int) -> Pairs:
        images, labels = split().scoring
        return Pairs.stamp(images[-count:], labels[-count:], TRIGGER, num_classes=10)

    def measured(self, count: int) -> dict[str, float]:
        mine = self.pairs(count)[self.processes.share(count)]
        return asdict(evaluate(self.net(), mine.batches(4), self.processes))

    def scores(self, *, together: bool) -> list[float]:
        net, processes = self.net(), self.processes if together else ALONE
        mine = self.pairs(31)[self.processes.share(31)]
        losses = (F.cross_entropy(net(p.triggered), p.labels, reduction="sum") / 31 for p in mine.batches(4))
        scores = score_filters(find_filters(net, mine.clean[:1]), losses, processes=processes)
        if not together:  # what would come of absolute values before the sum
            self.processes.sum([scores])
        return scores.tolist()

    def repaired(self, method: RepairMethod, data: Split | None = None) -> dict[str, Any]:
        torch.manual_seed(self.processes.rank)  # nothing that counts is drawn from here
        net = self.net()
        plan = RepairPlan(trigger=TRIGGER, method=method, force=True, batch_size=7)
        result = repair_split(net, data or split(), plan, processes=self.processes)
        return {
            "status": result.status,
            "pruned": result.pruned,
            "rounds": [asdict(done) for done in result.rounds],
            "before": asdict(result.before),
            "after": asdict(result.after),
            "weights": [tensor.double().norm().item() for tensor in net.state_dict().values()],
        }

    def refused(self, method: RepairMethod, data: Split | None = None) -> str:
        try:
            self.repaired(method, data)
        except RuntimeError as error:
            return str(error)
        return "nothing"

    def hurried(self, rank: int, *, method: RepairMethod | None, **options: Any) -> str:
        """How a repair by estimates goes if the clock of one process is far ahead of the others'."""
        step = 1e6 if self.processes.rank == rank else 0.0
        with patch.object(time, "monotonic", count_from(0.0, step).__next__):
            try:
                plan = RepairPlan(method=method, force=True, **options)
                result = repair_split(self.net(), split(), plan, processes=self.processes)
            except ValueError as error:
                return str(error)
        return result.status

    def clocks(self) -> list[list[str]]:
        soon, never = Auditor(steps=5, max_time=1), Auditor(steps=5)
        again = Alternation(SHORT, auditor=soon, accuracy_drop=1.0)
        return [
            [self.hurried(rank, method=SHORT, auditor=soon), self.hurried(rank, method=again, auditor=never)]
            for rank in range(self.processes.count)
        ]

    def all(self) -> dict[str, Any]:
        found: dict[str, Any] = {f"measured {count}": self.measured(count) for count in (31, 3)}
        found |= {"scores": self.scores(together=True), "scores apart": self.scores(together=False)}
        names = METHODS if self.processes.count < 4 else SHARED  # what all do alike, four do as two
        found |= {name: self.repaired(METHODS[name]) for name in names}
        if self.processes.count > 1:
            (images, labels), validation = split().scoring, split().validation
            missing = self.processes.rank
            anything = self.processes.outcome_of_first(lambda: (missing, PatchTrigger(size=1 + missing)))
            found["of first"] = [anything[0], repr(anything[1])]
            found["mistaken"] = self.refused(Mistaken())
            found["other images"] = self.refused(SHORT, Split((images[missing:], labels[missing:]), validation))
        return found


def _process(rank: int, folder: Path, count: int, task: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", f"file://{folder}/{task}-{count}", timedelta(seconds=60), world_size=count, rank=rank
    )
    work = _Work(folder, Processes.current())
    try:
        found = {"all": work.all, "clocks": work.clocks, "fail": lambda: work.repaired(Failing())}[task]()
    except Exception:
        # torch tells of one process alone: at times of one that only lost its connection to the one that failed.
        traceback.print_exc()
        raise
    (folder / f"{task}-{count}-{rank}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


def main(folder: Path, task: str, counts: list[int]) -> None:
    for count in counts:
        multiprocessing.start_processes(_process, (folder, count, task), count, start_method="fork")


def _run(folder: Path, task: str, *counts: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, __file__, str(folder), task, *map(str, counts)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, timeout=240, capture_output=True, text=True)


@pytest.fixture(scope="module")
def folder(digits_victim, tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    torch.save(digits_victim.trained.state_dict(), folder / "victim.pt")
    return folder


@pytest.fixture(scope="module")
def results(folder):
    """By number of processes, what each of them found."""
    done = _run(folder, "all", *COUNTS)
    assert done.returncode == 0, done.stderr
    return {
        count: [json.loads((folder / f"all-{count}-{rank}.json").read_text()) for rank in range(count)]
        for count in COUNTS
    }


def assert_alike(found, expected, abs=1e-5):
    """Equal, numbers with a point but for rounding."""
    assert type(found) is type(expected)
    if isinstance(found, dict):
        assert found.keys() == expected.keys()
        for name in found:
            assert_alike(found[name], expected[name], abs)
    elif isinstance(found, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_alike(one, other, abs)
    elif isinstance(found, float):
        assert found == pytest.approx(expected, rel=1e-4, abs=abs, nan_ok=True)
    else:
        assert found == expected


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("images", [31, 3])
def test_rates_and_losses_are_those_of_all_images(results, count, images):
    expected = results[1][0][f"measured {images}"]
    assert expected["unlearning_loss"] > 0
    for found in results[count]:
        assert_alike(found[f"measured {images}"], expected, abs=1e-7)


@pytest.mark.parametrize("count", [2, 4])
def test_gradients_are_summed_before_their_absolute_value(results, count):
    expected = torch.tensor(results[1][0]["scores"])
    for found in results[count]:
        torch.testing.assert_close(torch.tensor(found["scores"]), expected, rtol=1e-4, atol=1e-7)
        apart = torch.tensor(found["scores apart"])
        assert not torch.allclose(apart, expected, rtol=0.01), "the order of the two makes no difference here"


@pytest.mark.parametrize(("name", "count"), [*((name, 2) for name in METHODS), *((name, 4) for name in SHARED)])
def test_processes_repair_as_one_does(results, name, count):
    expected = results[1][0][name]
    assert expected["rounds"]
    for found in results[count]:
        assert_alike(found[name], expected, abs=1e-4)
    assert all(found[name] == results[count][0][name] for found in results[count]), "processes differ from each other"


def test_what_was_compared_pruned_something(results):
    assert results[1][0]["MaskPrune"]["status"] == "repaired"
    assert all(results[1][0][name]["pruned"] for name in ("taylor", "labels"))
    assert all(done["pruned"] for done in results[1][0]["GradPrune"]["rounds"] if done["stage"] == "prune")


@pytest.mark.parametrize("count", [2, 4])
def test_a_process_that_prunes_another_filter_stops_all(results, count):
    for found in results[count]:
        assert found["mistaken"].startswith(f"processes: the pruned filters differ between the {count} processes")


@pytest.mark.parametrize("count", [2, 4])
def test_other_images_on_one_process_are_refused(results, count):
    for found in results[count]:
        assert found["other images"].startswith("processes: the labels of the clean images differ")


@pytest.mark.parametrize("count", [2, 4])
def test_anything_can_be_had_of_the_first(results, count):
    for found in results[count]:
        assert found["of first"] == [0, repr(PatchTrigger(size=1))]


@pytest.mark.parametrize("count", [2, 4])
def test_one_failing_process_ends_all(folder, count):
    done = _run(folder, "fail", count)
    assert done.returncode != 0
    assert "out of luck" in done.stderr
    assert not list(folder.glob("fail-*.json"))


def test_time_is_over_on_all_when_it_is_over_on_the_first(folder):
    done = _run(folder, "clocks", 2)
    assert done.returncode == 0, done.stderr
    both = [json.loads((folder / f"clocks-2-{rank}.json").read_text()) for rank in range(2)]
    assert both[0] == both[1]
    (audited, repaired), of_second = both[0]
    assert audited.startswith("max_time: 1 s were over after")
    # Of a repair that is audited again, one is all there is.
    assert {repaired, *of_second} <= {"repaired", "not improved"}


@pytest.mark.parametrize("count", range(1, 6))
@pytest.mark.parametrize("size", [0, 1, 3, 4, 31])
def test_shares_cover_everything_once(size, count):
    taken = [list(range(size))[Processes(rank, count).share(size)] for rank in range(count)]
    assert [index for share in taken for index in share] == list(range(size))
    assert max(map(len, taken)) - min(map(len, taken)) <= 1


def test_alone_nothing_is_exchanged(monkeypatch):
    # Also within a distributed run: a user may repair on one process only, where a message would never be answered.
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    tensor = torch.tensor([1.5])
    ALONE.sum([tensor])
    ALONE.average([tensor], 0.25)
    ALONE.align(nn.Linear(1, 1))
    ALONE.refuse_difference("it", object())
    assert ALONE.first(tensor) is tensor
    assert ALONE.outcome_of_first(lambda: tensor) is tensor
    assert tensor.item() == 1.5


def test_without_torch_distributed(monkeypatch):
    assert Processes.current() == ALONE
    monkeypatch.setattr(distributed, "is_available", lambda: False)
    assert Processes.current() == ALONE


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], [int(count) for count in sys.argv[3:]])

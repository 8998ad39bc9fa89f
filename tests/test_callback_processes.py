"""One and two processes repair alike, by every strategy that a CPU can run.

Everything runs in a process of its own, which is fresh enough to be forked.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as L  # noqa: N812 - the usual name
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_unlearn import BackdoorUnlearning, HoldoutDataModule
from lightning_unlearn.auditor import Auditor
from lightning_unlearn.classifier import ConvClassifier
from lightning_unlearn.data import Digits
from lightning_unlearn.methods import Alternation, FineTuning, GradPrune, RepairMethod
from lightning_unlearn.triggers import PatchTrigger, Trigger

DISTRIBUTED = ("LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
METHOD = GradPrune(
    score="taylor",
    filters_per_round=2,
    max_rounds=4,
    accuracy_drop=0.3,
    finetune=FineTuning(triggered=True, max_epochs=1),
)

FROZEN = GradPrune(
    filters_per_round=2,
    max_rounds=3,
    accuracy_drop=1.0,
    finetune=FineTuning(triggered=True, max_epochs=2, patience=2, batch_size=15, norms="frozen"),
)
PATCH = PatchTrigger(size=3, target=0)
AUDITOR = Auditor(steps=10)
UNKNOWN: dict[str, Any] = {
    "trigger": None,
    "evaluation_trigger": PATCH,
    "auditor": AUDITOR,
    "method": Alternation(FROZEN, auditor=AUDITOR, rounds=2, accuracy_drop=1.0),
}
TIMEOUT = timedelta(seconds=60)
FORKED: dict[str, Any] = {
    "ddp_fork": "ddp_fork",
    "ddp_notebook": "ddp_notebook",
    "ddp_fork_find_unused_parameters_false": "ddp_fork_find_unused_parameters_false",
    "ddp_notebook_find_unused_parameters_true": "ddp_notebook_find_unused_parameters_true",
    "static graph": DDPStrategy(start_method="fork", timeout=TIMEOUT, static_graph=True),
    "bucket view": DDPStrategy(start_method="fork", timeout=TIMEOUT, gradient_as_bucket_view=True),
}
# Each of these starts Python anew, which takes longer.
STARTED = ["ddp", "ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true", "ddp_spawn"]
# And by how much rates may differ: in half precision a sum's rounding shows.
PRECISIONS = {"64-true": 1e-6, "bf16-mixed": 1e-6, "bf16-true": 0.01}


class Victim(ConvClassifier):
    """Sees other images on the second process, so that the running statistics of its norms differ."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return super().training_step((images if self.global_rank == 0 else 1 - images, labels), batch_idx)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = (part[batch[1] != 0] for part in batch)
        self.log("asr", (self(PATCH(images)).argmax(1) == 0).float().mean(), batch_size=len(labels), sync_dist=True)


class Spread(L.Callback):
    """By how much weights and buffers differ between the processes, as a metric, which outlives them."""

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def state_key(self) -> str:
        return self.name

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        tensors = [tensor.double().flatten() for tensor in pl_module.state_dict().values()]
        gathered = trainer.strategy.all_gather(torch.cat(tensors)).reshape(trainer.world_size, -1)
        trainer.callback_metrics[self.name] = (gathered - gathered[0]).abs().max().float()


def trained(
    folder: Path,
    name: str,
    processes: int,
    learning_rate: float = 0.0,
    strategy: Any = None,
    method: RepairMethod = METHOD,
    trigger: Trigger | None = PATCH,
    precision: Any = None,
    checkpoints: bool = False,
    **options: Any,
) -> tuple[Victim, BackdoorUnlearning, L.Trainer]:
    """Trains for two steps, and repairs."""
    model = Victim(width=8, learning_rate=learning_rate)
    model.load_state_dict(torch.load(folder / "victim.pt", weights_only=True))
    unlearn = BackdoorUnlearning(
        HoldoutDataModule(
            Digits(part="holdout", size=16), samples_per_class=4, test_dataset=Digits(part="test", size=16)
        ),
        trigger,
        method,
        **{"force": True, "output_dir": str(folder / name)} | options,
    )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy=strategy or (DDPStrategy(start_method="fork", timeout=TIMEOUT) if processes > 1 else "auto"),
        use_distributed_sampler=False,
        max_steps=2,
        limit_val_batches=0,  # so that no validation brings the running statistics together
        precision=precision,
        callbacks=[Spread("before"), unlearn, Spread("after"), *([ModelCheckpoint(folder / name)] * checkpoints)],
        logger=False,
        enable_checkpointing=checkpoints,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(model, DataLoader(Digits(part="train", size=16), batch_size=50))
    trainer.strategy.barrier()
    return model, unlearn, trainer


def fit(folder: Path, name: str, processes: int, **options: Any) -> dict[str, Any]:
    """Trains for two steps, repairs, and says what came of it."""
    model, unlearn, trainer = trained(folder, name, processes, **options)
    saved = torch.load(next((folder / name).glob("*-unlearned.ckpt")), weights_only=True)
    return {
        "files": sorted(path.name for path in (folder / name).iterdir()),
        "metrics": {name: value.item() for name, value in trainer.callback_metrics.items()},
        "weights as saved": all(torch.equal(saved["state_dict"][k], v) for k, v in model.state_dict().items()),
        "mask": {name: bools.tolist() for name, bools in saved["callbacks"][unlearn.state_key]["mask"].items()},
    }


def evaluated(folder: Path, name: str, **options: Any) -> None:
    """What ``trainer.test`` says of the best checkpoint when the processes that repaired are gone."""
    _, unlearn, trainer = trained(folder, name, 2, method=FROZEN, checkpoints=True, source="best", **options)
    sys.stderr.write(f"==\n{name}\n")
    loader = DataLoader(Digits(part="test", size=16), batch_size=200)
    (found,) = trainer.test(dataloaders=loader, ckpt_path="best", verbose=False)
    (folder / name / "asr.json").write_text(json.dumps([found["asr"], unlearn.report is None]))


def main(folder: Path, strategy: str | None) -> None:
    torch.set_num_threads(1)
    if strategy == "test":
        evaluated(folder, "original")
        evaluated(folder, "repointed", repoint=True)
        evaluated(folder, "nothing to repair", trigger=PatchTrigger(size=1, place="top_left"), force=False)
        return
    if strategy:  # the processes that Lightning starts for it come through here, too
        fit(folder, strategy, 2, strategy=strategy, method=FROZEN)
        return
    results = {
        "one": fit(folder, "one", processes=1),
        "two": fit(folder, "two", processes=2),
        "trained": fit(folder, "trained", processes=2, learning_rate=0.01),
        "unknown, one": fit(folder, "unknown, one", processes=1, **UNKNOWN),
        "unknown, two": fit(folder, "unknown, two", processes=2, **UNKNOWN),
    }
    (folder / "results.json").write_text(json.dumps(results))
    fit(folder, "auto", 1, method=FROZEN)
    for name, forked in FORKED.items():
        fit(folder, name, 2, strategy=forked, method=FROZEN)
    for precision in PRECISIONS:
        for processes in (1, 2):
            fit(folder, f"{precision}, {processes}", processes, precision=precision, method=FROZEN)


def run(folder: Path, *strategy: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in DISTRIBUTED}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(folder), *strategy]
    done = subprocess.run(command, env=environment, timeout=240, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def folder(digits_victim, tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    torch.save(digits_victim.trained.state_dict(), folder / "victim.pt")
    run(folder)
    return folder


@pytest.fixture(scope="module")
def results(folder):
    found = json.loads((folder / "results.json").read_text())
    for name, result in found.items():
        result["report"] = report(folder, name)
    return found


def report(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name / "report.json").read_text())


def assert_alike(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Two reports of the same repair; sums of other parts are rounded otherwise."""
    assert found["filters"] == expected["filters"]
    assert (found["status"], found["measured_on"]) == ("repaired", "test")
    assert found["before"] == pytest.approx(expected["before"])
    assert found["after"] == pytest.approx(expected["after"])
    assert len(found["rounds"]) == len(expected["rounds"])
    for here, there in zip(found["rounds"], expected["rounds"], strict=True):
        assert here["pruned"] == there["pruned"]
        numbers = [name for name, value in there.items() if isinstance(value, float)]
        assert [here[name] for name in numbers] == pytest.approx([there[name] for name in numbers], abs=1e-5)


@pytest.mark.parametrize("strategy", FORKED)
def test_forked_strategies_do_what_one_process_does(folder, strategy):
    expected = report(folder, "auto")
    assert expected["filters"]["pruned"] > 0
    assert_alike(report(folder, strategy), expected)


@pytest.mark.parametrize("strategy", STARTED)
def test_started_strategies_do_what_one_process_does(folder, strategy):
    run(folder, strategy)
    assert_alike(report(folder, strategy), report(folder, "auto"))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_two_processes_in_other_precisions(folder, precision):
    one, two = (report(folder, f"{precision}, {processes}") for processes in (1, 2))
    assert one["filters"]["pruned"] > 0
    assert two["filters"] == one["filters"]
    assert [done["pruned"] for done in two["rounds"]] == [done["pruned"] for done in one["rounds"]]
    for when in ("before", "after"):
        assert two[when] == pytest.approx(one[when], abs=PRECISIONS[precision])


def test_what_is_tested_when_the_processes_that_repaired_are_gone(folder):
    said = dict(part.split("\n", 1) for part in run(folder, "test").split("==\n")[1:])
    found = {name: json.loads((folder / name / "asr.json").read_text()) for name in said}
    assert all(gone for _, gone in found.values()), "the report came back, so this proves nothing"
    warned = [name for name, text in said.items() if "holds weights from BEFORE the repair" in text]
    assert warned == ["original"]
    assert [asr > 0.9 for asr, _ in found.values()] == [True, False, True]
    assert found["repointed"][0] < 0.1


def test_two_processes_prune_what_one_does(results):
    one, two = results["one"]["report"], results["two"]["report"]
    assert one["filters"]["pruned"] > 0
    assert_alike(two, one)
    assert results["two"]["mask"] == results["one"]["mask"]


def test_two_processes_estimate_what_one_does(results):
    one, two = results["unknown, one"]["report"], results["unknown, two"]["report"]
    assert one["estimated_trigger"]
    assert two["estimated_trigger"] == [
        {name: pytest.approx(value) if isinstance(value, float) else value for name, value in estimate.items()}
        for estimate in one["estimated_trigger"]
    ]
    assert [two[name] for name in ("verdict", "suspected_target")] == [one["verdict"], one["suspected_target"]]
    assert two["estimated_asr"] == pytest.approx(one["estimated_asr"])
    assert one["filters"]["pruned"] > 0
    assert_alike(two, one)
    assert results["unknown, two"]["mask"] == results["unknown, one"]["mask"]


@pytest.mark.parametrize("name", ["two", "trained", "unknown, two"])
def test_processes_end_with_the_same_weights(results, name):
    metrics = results[name]["metrics"]
    assert metrics["before"] > 1e-3, "the processes did not differ before, so this proves nothing"
    assert metrics["after"] == 0


@pytest.mark.parametrize("name", ["one", "two", "trained", "unknown, one", "unknown, two"])
def test_what_outlives_the_processes(results, name):
    metrics, report = results[name]["metrics"], results[name]["report"]
    for when in ("before", "after"):
        for rate in ("acc", "asr", "ra"):
            assert metrics[f"unlearn/{rate}_{when}"] == pytest.approx(report[when][rate], abs=1e-6)
    assert metrics["unlearn/filters_pruned"] == report["filters"]["pruned"]
    assert results[name]["weights as saved"]


@pytest.mark.parametrize("name", ["one", "two", "trained", "unknown, one", "unknown, two"])
def test_files_are_written_once(results, name):
    targets = {estimate["target"] for estimate in results[name]["report"]["estimated_trigger"] or ()}
    kept = [f"estimated_trigger-{target}.safetensors" for target in sorted(targets)]
    assert results[name]["files"] == [*kept, "model-unlearned.ckpt", "report.json"]
    assert Path(results[name]["report"]["checkpoint"]).name == "model-unlearned.ckpt"


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)

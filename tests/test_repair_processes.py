"""``lightning-unlearn repair --trainer.devices 2``, by the strategy that Lightning chooses, in processes of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
import yaml

DISTRIBUTED = ("LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
COMMAND = "from lightning_unlearn.entry import run\n\nrun()\n"
FAILING = """
import os
import signal

from lightning_unlearn.methods import RepairMethod


class IsTerminatedOnTheSecond(RepairMethod):
    def repair(self, task):
        task.mask.prune([task.mask.locate(0)])
        if task.processes.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        yield task.round("prune", task.validate())
        raise AssertionError("it went on")


class FailsOnTheSecond(RepairMethod):
    def repair(self, task):
        task.mask.prune([task.mask.locate(0)])
        if task.processes.rank == 1:
            raise ValueError("out of luck")
        yield task.round("prune", task.validate())
"""


@pytest.fixture(scope="module")
def folder(digits_victim, tmp_path_factory):
    """A checkpoint, its configuration and the command as a script, which Lightning can start again."""
    folder = tmp_path_factory.mktemp("repair")
    torch.save({"state_dict": digits_victim.trained.state_dict()}, folder / "original.ckpt")
    digits = {"class_path": "lightning_unlearn.data.Digits", "init_args": {"size": 16}}
    parts = {
        name: {**digits, "init_args": {"size": 16, "part": part}}
        for name, part in (("dataset", "holdout"), ("test_dataset", "test"))
    }
    clean = {"class_path": "lightning_unlearn.data.HoldoutDataModule", "init_args": {**parts, "samples_per_class": 5}}
    trigger = {"class_path": "lightning_unlearn.triggers.PatchTrigger", "init_args": {"size": 3, "target": 0}}
    config = {
        "trainer": {"accelerator": "cpu", "logger": False, "enable_progress_bar": False},
        "model": {"class_path": "lightning_unlearn.classifier.ConvClassifier", "init_args": {"width": 8}},
        "unlearning": {"clean_data": clean, "trigger": trigger},
    }
    (folder / "repair.yaml").write_text(yaml.safe_dump(config))
    (folder / "command.py").write_text(COMMAND)
    (folder / "failing.py").write_text(FAILING)
    return folder


def run(folder, devices: int, out: str, *words: str, command: str = "repair") -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in DISTRIBUTED}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "command.py", command, "--config", "repair.yaml", "--ckpt_path", "original.ckpt"]
    line += ["--trainer.devices", str(devices), "--output-dir", out, *words]
    return subprocess.run(line, cwd=folder, env=environment, timeout=180, capture_output=True, text=True)


def test_two_and_four_devices_write_the_report_that_one_does(folder):
    reports, weights = {}, {}
    for devices in (1, 2, 4):
        done = run(folder, devices, f"out-{devices}")
        assert done.returncode == 0, done.stderr
        assert sorted(path.name for path in (folder / f"out-{devices}").iterdir()) == [
            "original-unlearned.ckpt",
            "report.json",
        ]
        reports[devices] = json.loads((folder / f"out-{devices}" / "report.json").read_text())
        weights[devices] = torch.load(folder / f"out-{devices}/original-unlearned.ckpt", weights_only=True)[
            "state_dict"
        ]
    one = reports[1]
    assert one["status"] == "repaired"
    assert (one["before"]["asr"] > 0.9, one["after"]["asr"] < 0.1) == (True, True)
    assert one["filters"]["pruned"] > 0
    for devices in (2, 4):
        more = reports[devices]
        assert [more[name] for name in ("filters", "before", "after")] == [one["filters"], one["before"], one["after"]]
        assert len(more["rounds"]) == len(one["rounds"])
        for here, there in zip(more["rounds"], one["rounds"], strict=True):
            losses = {name: value for name, value in there.items() if name.endswith("loss")}
            assert {name: here[name] for name in losses} == pytest.approx(losses, abs=1.01e-4)
            assert {**here, **losses} == there
        for name, tensor in weights[1].items():
            torch.testing.assert_close(weights[devices][name], tensor, rtol=1e-3, atol=1e-3)


def test_two_devices_audit_as_one_does(folder):
    found = {}
    for devices in (1, 2):
        done = run(folder, devices, f"audit-{devices}", "--unlearning.auditor.steps=20", command="audit")
        assert done.returncode == 0, done.stderr
        assert sorted(path.name for path in (folder / f"audit-{devices}").iterdir()) == ["audit.json", "audit.png"]
        found[devices] = json.loads((folder / f"audit-{devices}" / "audit.json").read_text())
        assert found[devices].pop("seconds") > 0
    assert found[2] == found[1]


def test_no_time_for_an_audit_ends_both_devices(folder):
    done = run(folder, 2, "audit-late", "--unlearning.auditor.max_time=1e-9", command="audit")
    assert done.returncode != 0
    assert "max_time: 1e-09 s were over after 0 of 10 classes; allow more" in done.stderr
    assert not (folder / "audit-late" / "audit.json").exists()


def test_a_signal_to_one_device_ends_both_at_the_next_round(folder):
    done = run(folder, 2, "out-terminated", "--unlearning.method", "failing.IsTerminatedOnTheSecond")
    assert done.returncode == 128 + signal.SIGTERM
    assert "it went on" not in done.stderr
    assert not [path for path in (folder / "out-terminated").rglob("*") if path.is_file()]


def test_a_failure_on_one_device_ends_both_and_writes_nothing(folder):
    original = (folder / "original.ckpt").read_bytes()
    done = run(folder, 2, "out-failed", "--unlearning.method", "failing.FailsOnTheSecond")
    assert done.returncode != 0
    assert "out of luck" in done.stderr
    assert not [path for path in (folder / "out-failed").rglob("*") if path.is_file()]
    assert (folder / "original.ckpt").read_bytes() == original

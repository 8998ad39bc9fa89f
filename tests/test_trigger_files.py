from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_unlearn.folder import Folder
from lightning_unlearn.trigger_files import save_triggers
from lightning_unlearn.triggers import AdditiveTrigger, CoveringTrigger, EstimatedTrigger, TriggerPool
from lightning_unlearn.triggers.inversion import Estimate
from lightning_unlearn.verdict import Audit


def added(target: int, value: float) -> Estimate:
    return Estimate(AdditiveTrigger(torch.full((1, 4, 4), value), target=target), "additive", target, value, 1.0)


def covered(target: int) -> Estimate:
    trigger = CoveringTrigger(torch.full((1, 4, 4), 0.5), torch.ones(1, 4, 4), target=target)
    return Estimate(trigger, "covering", target, 0.5, 0.9)


def audit(*estimates: Estimate) -> Audit:
    return Audit("backdoored", estimates[0].target, 2.0, (), estimates, 10)


def test_one_file_a_class_the_most_suspicious_first(tmp_path):
    first, second, third = added(7, 0.1), added(2, 0.2), covered(7)
    paths = save_triggers(audit(first, second, third), tmp_path / "new")
    assert paths == [str(tmp_path / "new" / f"estimated_trigger-{target}.safetensors") for target in (7, 2)]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(Path(path).name for path in paths)
    images = torch.rand(5, 1, 4, 4)
    for path, own in zip(paths, ([first, third], [second]), strict=True):
        read = EstimatedTrigger(path)
        assert read.target == own[0].target
        assert torch.equal(read(images), TriggerPool([estimate.trigger for estimate in own])(images))


def test_nothing_is_overwritten(tmp_path):
    for value in (0.1, 0.2):
        save_triggers(audit(added(0, value)), tmp_path)
    names = ["estimated_trigger-0.safetensors", "estimated_trigger-0-v1.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    assert [EstimatedTrigger(tmp_path / name).estimates[0].cost for name in names] == [0.1, 0.2]


def test_elsewhere_than_on_a_disk():
    (path,) = save_triggers(audit(added(3, 0.1)), Folder("memory://trigger-files"))
    assert path == "memory://trigger-files/estimated_trigger-3.safetensors"
    assert EstimatedTrigger(path).target == 3


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match=r"output_dir: '.*estimated_trigger-0.safetensors' could not be written"):
        save_triggers(audit(added(0, 0.1)), tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    folder = Folder(tmp_path)

    def half(path: str, data: bytes) -> None:
        with open(path, "wb") as file:
            file.write(data[:20])
        raise OSError("disk full")

    monkeypatch.setattr(folder.fs, "pipe", half)
    with pytest.raises(OSError, match=r"nothing of it is left there \(OSError: disk full\)"):
        save_triggers(audit(added(0, 0.1)), folder)
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_was_estimated(tmp_path):
    nothing = Audit("clean", None, 0.0, (), (), 10)
    assert save_triggers(nothing, tmp_path) == []
    assert list(tmp_path.iterdir()) == []

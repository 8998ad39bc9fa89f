"""``lightning-unlearn audit``, and ``repair`` without a trigger, of the hand-made victim's checkpoint."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as L  # noqa: N812 - the usual name
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_unlearn import BackdoorUnlearning, entry
from lightning_unlearn.cli import main
from lightning_unlearn.folder import Folder
from lightning_unlearn.triggers import EstimatedTrigger
from lightning_unlearn.verdict import Audit

TRIGGER = "estimated_trigger-0.safetensors"
QUIET = {"accelerator": "cpu", "devices": 1, "logger": False}
PATCH = {"class_path": "lightning_unlearn.triggers.PatchTrigger", "init_args": {"size": 1, "target": 0}}


class HandNet(L.LightningModule):
    """The hand-made victim's layers, for grey images or for as many copies of them as there are channels."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(channels, 4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)


class HandImages(Dataset[tuple[Tensor, int]]):
    """Images of class c are bright in row c."""

    def __init__(self, channels: int = 1, classes: int = 3) -> None:
        self.targets = torch.arange(30) % classes
        self.images = torch.zeros(30, channels, 4, 4)
        bright = 0.8 + 0.2 * torch.rand(30, 1, 4, generator=torch.Generator().manual_seed(0))
        for image, label, row in zip(self.images, self.targets, bright, strict=True):
            image[:, label] = row

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.targets[index])


class FewImages(HandImages):
    """The first of them, without labels: seven are three, two and two of the classes, five leave one for the third."""

    def __init__(self, count: int = 7) -> None:
        super().__init__()
        self.count = count
        del self.targets

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


class SomeImages(HandImages):
    """None of class 1."""

    def __init__(self) -> None:
        super().__init__()
        self.images, self.targets = (part[self.targets != 1] for part in (self.images, self.targets))


def save(victim: Any, name: str, *, channels: int = 1) -> None:
    state = {f"net.{key}": value.clone() for key, value in victim.net.state_dict().items()}
    state["net.0.weight"] = state["net.0.weight"].repeat(1, channels, 1, 1) / channels
    torch.save({"state_dict": state, "pytorch-lightning_version": L.__version__}, name)


def write(name: str, *, channels: int = 1, trainer: dict[str, Any] = QUIET, **change: Any) -> None:
    unlearning = {
        "clean_data": {"class_path": f"{__name__}.HandImages", "init_args": {"channels": channels}},
        "auditor": {"steps": 10},
        "samples_per_class": 4,
    }
    model = {"class_path": f"{__name__}.HandNet", "init_args": {"channels": channels}}
    Path(name).write_text(yaml.safe_dump({"trainer": trainer, "model": model, "unlearning": unlearning | change}))


@pytest.fixture
def folder(hand_victim, tmp_path, monkeypatch):
    """A folder with a backdoored and an innocent checkpoint, and a configuration without a trigger; the current one."""
    monkeypatch.chdir(tmp_path)
    save(hand_victim, "backdoored.ckpt")
    with torch.no_grad():
        hand_victim.net[0].weight[3] = 0
    save(hand_victim, "clean.ckpt")
    write("audit.yaml")
    return tmp_path


def backdoored_again(victim: Any) -> None:
    """What the fixture took away for the innocent checkpoint."""
    with torch.no_grad():
        victim.net[0].weight[3, 0, 3, 3] = 1


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def audit(*words: str, ckpt: str = "backdoored.ckpt", config: str = "audit.yaml") -> Any:
    return main(["audit", "--config", config, "--ckpt_path", ckpt, *words])


def code(monkeypatch: pytest.MonkeyPatch, *words: str, command: str = "audit", ckpt: str = "backdoored.ckpt") -> Any:
    """What the installed command leaves with; Python prints a text and leaves with 1."""
    words = ("lightning-unlearn", command, "--config", "audit.yaml", "--ckpt_path", ckpt, *words)
    monkeypatch.setattr(sys, "argv", list(words))
    try:
        entry.run()
    except SystemExit as stopped:
        return stopped.code
    return 0


# The verdict


def test_audit(folder, capsys):
    before = {name: Path(name).read_bytes() for name in files(folder)}
    found = audit()
    assert isinstance(found, Audit)
    assert (found.verdict, found.suspected_target, found.num_classes) == ("backdoored", 0, 3)
    printed = " ".join(capsys.readouterr().out.split())
    assert "Verdict: backdoored" in printed
    assert re.search(r"one \w+ change sends \d+% of other images to class 0", printed)
    assert {name: Path(name).read_bytes() for name in files(folder)} == before


def test_a_trigger_in_the_configuration_is_not_looked_at(folder):
    write("told.yaml", trigger=PATCH)
    told, untold = audit(config="told.yaml"), audit()
    assert told.classes == untold.classes
    assert [e.to_dict() for e in told.estimates] == [e.to_dict() for e in untold.estimates]


def test_exit_codes(folder, monkeypatch):
    assert code(monkeypatch) == 3
    assert code(monkeypatch, ckpt="clean.ckpt") == 0


@pytest.mark.parametrize("limit", ["limit_predict_batches=0", "limit_predict_batches=0.1", "fast_dev_run=true"])
def test_no_limit_of_the_trainers_skips_the_audit(folder, monkeypatch, limit):
    assert code(monkeypatch, f"--trainer.{limit}") == 3


@pytest.mark.parametrize(("command", "work"), [("audit", "audit"), ("repair", "unlearn"), ("compare", "clean_images")])
def test_silence_is_no_result(folder, monkeypatch, command, work):
    """Lightning's loop takes a StopIteration from anywhere within for its end."""

    def stop(*args: Any) -> Any:
        raise StopIteration

    monkeypatch.setattr(BackdoorUnlearning, work, stop)
    write("audit.yaml", trigger=PATCH)
    left = code(monkeypatch, "--output-dir=new", command=command)
    assert left.startswith("lightning-unlearn: trainer: Trainer.predict ran no batch, so that nothing was done.")
    assert files(folder) == ["audit.yaml", "backdoored.ckpt", "clean.ckpt"]


def test_a_class_without_clean_images_is_looked_at_with_the_others(folder, capsys):
    write("audit.yaml", clean_data={"class_path": f"{__name__}.HandImages", "init_args": {"classes": 2}})
    found = audit("--json", ckpt="clean.ckpt")
    assert found.unseen == (2,)
    assert [entry.target for entry in found.classes] == [0, 1, 2]
    assert json.loads(capsys.readouterr().out)["unseen"] == [2]
    audit(ckpt="clean.ckpt")
    assert "There was no clean image of class 2." in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("data", "unseen"), [("SomeImages", (1,)), ("FewImages", ()), ("FewImages --unlearning.clean_data.count=5", (2,))]
)
def test_the_images_that_there_are_will_do(folder, data, unseen):
    found = audit(*f"--unlearning.clean_data={__name__}.{data}".split(), "--output-dir=new")
    assert (found.verdict, found.suspected_target, found.unseen) == ("backdoored", 0, unseen)
    assert found.labels == ("given" if data == "SomeImages" else "predicted")
    assert files(folder / "new") == ["audit.json", "audit.png", TRIGGER]


def test_a_repair_needs_images_of_each_class(folder, monkeypatch):
    left = code(monkeypatch, f"--unlearning.clean_data={__name__}.SomeImages", command="repair")
    assert left.startswith(
        "lightning-unlearn: dataset: the audit's verdict is backdoored, and a repair needs images of "
    )
    assert "of class 1 there is no clean image" in left
    assert files(folder) == ["audit.yaml", "backdoored.ckpt", "clean.ckpt"]


def test_a_clean_model_needs_no_images_of_each_class(folder, monkeypatch):
    left = code(monkeypatch, f"--unlearning.clean_data={__name__}.SomeImages", command="repair", ckpt="clean.ckpt")
    assert left == 0
    report = json.loads((folder / "report.json").read_text())
    assert report["status"] == "clean"
    assert "There was no clean image of class 1." in report["caveats"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ckpt_path=nowhere.ckpt"], r"ckpt_path: there is no file 'nowhere.ckpt'"),
        (["--unlearning.auditor.max_time=1e-9"], r"max_time: 1e-09 s were over after 0 of 3 classes; allow more"),
        (["--unlearning.samples_per_class=11"], r"class 0 has 10 images in the dataset, but 11 are needed"),
        (["--unlearning.auditor.steps=0"], r"steps: expected at least 1, but got 0"),
        (
            ["--trainer.strategy=ddp_spawn", "--trainer.devices=2"],
            r"trainer: DDPStrategy with start_method='spawn' works .* strategy='ddp', or one",
        ),
        (["--trainer.strategy=ddp_fork"], r"trainer: DDPStrategy with start_method='fork' works in processes"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_errors_are_one_line_and_leave_nothing(folder, monkeypatch, capsys, words, message):
    before = files(folder)
    left = code(monkeypatch, "--output-dir", "new", *words)
    text = left if isinstance(left, str) else " ".join(capsys.readouterr().err.split())
    assert left not in (0, 3)
    assert re.search(message, text)
    assert files(folder) == before


@pytest.mark.parametrize("command", ["audit", "repair"])
@pytest.mark.parametrize("data", ["HandImages", "FewImages"])
def test_images_that_do_not_fit_are_one_line(folder, hand_victim, monkeypatch, command, data):
    save(hand_victim, "colour.ckpt", channels=3)
    words = [f"--unlearning.clean_data={__name__}.{data}", "--model.channels=3"]
    left = code(monkeypatch, *words, command=command, ckpt="colour.ckpt")
    assert re.match(
        r"lightning-unlearn: model: it cannot take images of shape .* as they are; .*to have \d channel", left
    )
    assert "\n" not in left


def test_test_images_that_do_not_fit_are_one_line(folder, monkeypatch):
    words = [
        "--unlearning.clean_data=lightning_unlearn.HoldoutDataModule",
        f"--unlearning.clean_data.dataset={__name__}.HandImages",
        f"--unlearning.clean_data.test_dataset={__name__}.HandImages",
        "--unlearning.clean_data.test_dataset.channels=3",
        "--unlearning.clean_data.samples_per_class=4",
        "--unlearning.trigger=lightning_unlearn.triggers.PatchTrigger",
    ]
    left = code(monkeypatch, *words, command="repair")
    assert re.match(r"lightning-unlearn: model: it cannot take images of shape \(60, 3, 4, 4\) .*\d channel", left)


def test_other_errors_keep_their_traceback(folder, monkeypatch):
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("in the middle")

    monkeypatch.setattr("lightning_unlearn.auditor.largest_margins", fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        code(monkeypatch)


def test_a_model_that_answers_always_the_same(folder, hand_victim, monkeypatch):
    with torch.no_grad():
        hand_victim.net[3].bias.copy_(torch.tensor([0.0, 99.0, 0.0]))
    save(hand_victim, "constant.ckpt")
    assert re.match(r"lightning-unlearn: model: it answers class 1 to every", code(monkeypatch, ckpt="constant.ckpt"))


def test_a_broken_model(folder, hand_victim, monkeypatch):
    with torch.no_grad():
        hand_victim.net[3].bias[0] = torch.nan
    save(hand_victim, "broken.ckpt")
    assert re.match(r"lightning-unlearn: model: its logits hold NaN", code(monkeypatch, ckpt="broken.ckpt"))


# What it writes


@pytest.mark.parametrize(("ckpt", "verdict"), [("backdoored.ckpt", "backdoored"), ("clean.ckpt", "clean")])
@pytest.mark.parametrize("bar", ["--trainer.enable_progress_bar=true", "--trainer.enable_progress_bar=false"])
def test_json_alone_on_standard_output(folder, monkeypatch, capfd, ckpt, verdict, bar):
    left = code(monkeypatch, "--json", bar, ckpt=ckpt)
    assert left == (0 if verdict == "clean" else 3)
    read = json.loads(capfd.readouterr().out)
    assert (read["verdict"], read["num_classes"]) == (verdict, 3)
    assert read["suspected_target"] == (None if verdict == "clean" else 0)
    assert [entry["target"] for entry in read["classes"]] == [0, 1, 2]
    assert all(set(estimate) == {"family", "target", "cost", "success"} for estimate in read["estimates"])


@pytest.mark.parametrize(
    ("words", "alone"),
    [("--json", True), ("--json true", True), ("--json=true", True), ("--json false", False), ("--json=false", False)],
)
def test_json_may_have_a_value(folder, capsys, words, alone):
    audit(*words.split(), ckpt="clean.ckpt")
    assert (capsys.readouterr().out[0] == "{") == alone


@pytest.mark.parametrize("spelling", ["--output-dir", "--output_dir"])
@pytest.mark.parametrize("channels", [1, 3])
def test_output_dir(folder, hand_victim, capsys, channels, spelling):
    backdoored_again(hand_victim)
    save(hand_victim, "c.ckpt", channels=channels)
    write("audit.yaml", channels=channels)
    found = audit(spelling, "new", ckpt="c.ckpt")
    assert files(folder / "new") == ["audit.json", "audit.png", TRIGGER]
    assert json.loads(Path("new/audit.json").read_text()) == json.loads(json.dumps(found.to_dict()))
    with Image.open("new/audit.png") as picture:
        assert min(picture.size) > 100
        assert len(picture.convert("L").getcolors()) > 2
    assert f"Everything is in new: audit.json, audit.png, {TRIGGER}" in capsys.readouterr().out
    read = EstimatedTrigger(f"new/{TRIGGER}")
    assert [estimate.to_dict() for estimate in read.estimates] == [estimate.to_dict() for estimate in found.estimates]
    images = HandImages(channels).images
    assert torch.equal(read(images), found.trigger(images))


def test_a_clean_verdict_has_no_trigger_to_keep(folder):
    assert audit("--output-dir", "new", ckpt="clean.ckpt").verdict == "clean"
    assert files(folder / "new") == ["audit.json", "audit.png"]


def test_no_picture_of_what_pictures_cannot_show(folder, hand_victim, monkeypatch, capsys):
    backdoored_again(hand_victim)
    save(hand_victim, "backdoored.ckpt", channels=2)
    write("audit.yaml", channels=2)
    assert code(monkeypatch, "--output-dir", "new") == 3
    assert files(folder / "new") == ["audit.json", TRIGGER]
    assert f"Everything is in new: audit.json, {TRIGGER}\n" in capsys.readouterr().out


def test_no_picture_without_matplotlib(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert code(monkeypatch, "--output-dir", "new") == 3
    assert files(folder / "new") == ["audit.json", TRIGGER]
    assert f"Everything is in new: audit.json, {TRIGGER}\n" in capsys.readouterr().out


def test_an_output_dir_of_another_file_system(folder, capsys):
    there = Folder("memory://audited")
    audit("--output-dir", there.url)
    written = sorted(os.path.basename(path) for path in there.fs.find(there.url))
    assert written == ["audit.json", "audit.png", TRIGGER]
    assert files(folder) == ["audit.yaml", "backdoored.ckpt", "clean.ckpt"]
    assert f"Everything is in memory://audited: audit.json, audit.png, {TRIGGER}" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match=r"output-dir: 'memory://audited' exists and is not an empty folder"):
        audit("--output-dir", there.url)
    there.fs.rm(there.url, recursive=True)


def by_option(name: str) -> list[str]:
    return ["--output-dir", name]


def by_yaml(name: str) -> list[str]:
    Path("audit.yaml").write_text(f"{Path('audit.yaml').read_text()}output_dir: {name}\n")
    return []


def by_callback(name: str) -> list[str]:
    return [f"--unlearning.output_dir={name}"]


def never_made(self: HandNet, channels: int = 1) -> None:
    pytest.fail("the model was made, which may take long, before the folder was looked at")


ANYHOW = pytest.mark.parametrize("name", [by_option, by_yaml, by_callback])


@ANYHOW
@pytest.mark.parametrize("command", ["audit", "repair", "compare"])
def test_a_used_folder_is_refused(folder, monkeypatch, name, command):
    used = folder / "used"
    used.mkdir()
    (used / "notes.txt").write_text("mine")
    monkeypatch.setattr(HandNet, "__init__", never_made)
    left = code(monkeypatch, *name("used"), command=command)
    assert left == "lightning-unlearn: output-dir: 'used' exists and is not an empty folder; name a new one."
    assert files(used) == ["notes.txt"]


@ANYHOW
@pytest.mark.parametrize("command", ["audit", "repair", "compare"])
def test_a_folder_that_cannot_be_is_refused(folder, monkeypatch, name, command):
    monkeypatch.setattr(HandNet, "__init__", never_made)
    left = code(monkeypatch, *name("clean.ckpt/new"), command=command)
    assert left.startswith("lightning-unlearn: output_dir: nothing can be written to 'clean.ckpt/new'")


@ANYHOW
@pytest.mark.parametrize(("command", "written"), [("audit", "audit.json"), ("repair", "report.json")])
def test_everything_goes_into_the_folder(folder, name, command, written):
    write("audit.yaml", trainer=QUIET | {"logger": True})
    main([command, "--config=audit.yaml", "--ckpt_path=clean.ckpt", *name("new")])
    assert written in files(folder / "new")
    assert any(name.startswith("lightning_logs/") for name in files(folder / "new"))
    assert {path.split("/")[0] for path in files(folder)} == {"audit.yaml", "backdoored.ckpt", "clean.ckpt", "new"}


# Repair without a trigger


def test_repair_removes_what_nobody_knew(folder, capsys):
    report = main(
        ["repair", "--config", "audit.yaml", "--ckpt_path", "backdoored.ckpt", "--output-dir", "new"]
    )  # fmt: skip
    assert (report.status, report.verdict, report.suspected_target) == ("repaired", "backdoored", 0)
    assert report.filters["by_layer"] == {"net.0": [3]}
    assert files(folder / "new") == ["backdoored-unlearned.ckpt", TRIGGER, "report.json"]
    read = json.loads(Path("new/report.json").read_text())
    assert read == json.loads(json.dumps(report.to_dict()))
    assert (read["before"]["asr"], read["after"]["asr"]) == (None, None)
    assert read["estimated_asr"]["after"] < read["estimated_asr"]["before"]
    printed = capsys.readouterr().out
    assert "unknown trigger" in printed
    assert "ASR of the estimated trigger" in printed
    assert f"Estimated trigger: new/{TRIGGER}\n" in printed
    estimates = EstimatedTrigger(f"new/{TRIGGER}").estimates
    assert [estimate.to_dict() for estimate in estimates] == list(report.estimated_trigger)


def test_what_was_found_is_a_trigger_of_a_later_repair(folder):
    audit("--output-dir", "audited")
    words = ["repair", "--config", "audit.yaml", "--ckpt_path", "backdoored.ckpt", "--output-dir", "repaired"]
    trigger = ["--unlearning.trigger=EstimatedTrigger", f"--unlearning.trigger.path=audited/{TRIGGER}"]
    report = main([*words, *trigger])
    assert (report.status, report.trigger, report.target) == ("repaired", "EstimatedTrigger", 0)
    assert report.filters["by_layer"] == {"net.0": [3]}
    assert report.after["asr"] < 0.5 < report.before["asr"]
    assert report.verdict is None  # it was told, so nothing was estimated
    assert files(folder / "repaired") == ["backdoored-unlearned.ckpt", "report.json"]


def test_a_trigger_file_that_is_none_is_an_error_of_one_line(folder, monkeypatch, capsys):
    Path("bad.safetensors").write_text("nothing")
    words = ["--unlearning.trigger=EstimatedTrigger", "--unlearning.trigger.path=bad.safetensors"]
    left = code(monkeypatch, *words, command="repair")
    text = left if isinstance(left, str) else " ".join(capsys.readouterr().err.split())
    assert left != 0
    assert "path: 'bad.safetensors' is no safetensors file" in text


def test_repair_leaves_a_clean_model_alone(folder, monkeypatch, capsys):
    assert code(monkeypatch, "--output-dir", "new", command="repair", ckpt="clean.ckpt") == 0
    assert files(folder / "new") == ["report.json"]
    read = json.loads(Path("new/report.json").read_text())
    assert (read["status"], read["verdict"], read["checkpoint"]) == ("clean", "clean", None)
    assert "Verdict: clean" in capsys.readouterr().out


def test_repair_measures_with_the_evaluation_trigger_of_the_configuration(folder):
    data = {"class_path": f"{__name__}.HandImages"}
    holdout = {
        "class_path": "lightning_unlearn.data.HoldoutDataModule",
        "init_args": {"dataset": data, "samples_per_class": 4, "test_dataset": data},
    }
    write("audit.yaml", clean_data=holdout, evaluation_trigger=PATCH)
    report = main(["repair", "--config", "audit.yaml", "--ckpt_path", "backdoored.ckpt", "--output-dir", "new"])
    assert (report.before, report.after) == (
        {"acc": 1.0, "asr": 1.0, "ra": 0.0},
        {"acc": 1.0, "asr": 0.0, "ra": 1.0},
    )
    assert report.trigger == "unknown"


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_precisions_that_set_the_default_type(folder, precision):
    """Lightning sets it around what a command does."""
    plain = audit("--output-dir", "plain")
    found = audit("--output-dir", "new", f"--trainer.precision={precision}")
    assert (found.verdict, found.suspected_target) == (plain.verdict, plain.suspected_target) == ("backdoored", 0)
    assert torch.get_default_dtype() == torch.float32

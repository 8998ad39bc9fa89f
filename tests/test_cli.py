from __future__ import annotations

import json
import os
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as L  # noqa: N812 - the usual name
import pytest
import torch
import yaml
from torch.utils.data import DataLoader

from lightning_unlearn import BackdoorUnlearning, __version__, cli
from lightning_unlearn.classifier import ConvClassifier
from lightning_unlearn.cli import main
from lightning_unlearn.data import Digits, DigitsDataModule, HoldoutDataModule
from tests.small_commands import MODEL, QUIET, UNLEARNING, training, write


class Subsets(L.LightningDataModule):
    """Reads its hyper-parameters, so LightningCLI's mix-up would make the clean data the training data."""

    def __init__(self, part: str = "train") -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Digits(part=self.hparams["part"], size=16), batch_size=50)


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def repair(*words: str, config: str = "repair.yaml", ckpt: str = "original.ckpt") -> Any:
    return main(["repair", "--config", config, "--ckpt_path", ckpt, *words])


# lightning-unlearn


@pytest.mark.parametrize(("words", "code"), [([], 2), (["mend"], 2), (["--help"], 0), (["-h"], 0)], ids=str)
def test_commands_are_listed(capsys, words, code):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == code
    printed = "".join(capsys.readouterr())
    assert "lightning-unlearn" in printed
    if words:
        assert all(command in printed for command in ("demo", "fit", "repair"))


@pytest.mark.parametrize("command", ["audit", "compare", "demo", "repair"])
def test_usage_names_the_command(capsys, command):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: lightning-unlearn {command} ")
    assert "Lightning Trainer command line tool" not in printed


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"lightning-unlearn {__version__}\n"


def test_words_of_the_process(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lightning-unlearn", "demo", "--help"])
    with pytest.raises(SystemExit):
        main()
    assert "--samples-per-class" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("word", "option"),
    [
        ("--output-dir", "--output_dir"),
        ("--output-dir=a-b", "--output_dir=a-b"),
        ("--trainer.max-epochs=3", "--trainer.max_epochs=3"),
        ("a-b.yaml", "a-b.yaml"),
        ("-h", "-h"),
    ],
)
def test_both_spellings_of_an_option(word, option):
    assert cli._underscored(word) == option


# repair


def test_repair(victim, tmp_path, capsys):
    original = (victim / "original.ckpt").read_bytes()
    report = repair("--output-dir", str(tmp_path / "new"))
    assert report.status == "repaired"
    assert report.filters["pruned"] == 2
    assert report.before["asr"] > 0.9
    assert report.after["asr"] < 0.5
    assert files(tmp_path / "new") == ["original-unlearned.ckpt", "report.json"]
    assert json.loads((tmp_path / "new" / "report.json").read_text()) == report.to_dict()
    assert report.checkpoint == str(tmp_path / "new" / "original-unlearned.ckpt")
    assert files(victim) == ["original.ckpt", "repair.yaml"]
    assert (victim / "original.ckpt").read_bytes() == original
    printed = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert f"Repaired checkpoint: {report.checkpoint}" in printed
    assert f"Report: {tmp_path / 'new' / 'report.json'}" in printed
    assert "2 of 112" in printed


def test_repaired_checkpoint_is_a_checkpoint(victim, digits_victim):
    report = repair()
    old, new = (torch.load(path, weights_only=True) for path in ("original.ckpt", report.checkpoint))
    assert set(old) - set(new) == {"optimizer_states", "lr_schedulers", "loops"}
    assert new["hyper_parameters"] == old["hyper_parameters"]
    model = ConvClassifier.load_from_checkpoint(report.checkpoint, map_location="cpu")
    for layer, filters in report.filters["by_layer"].items():
        assert model.get_submodule(layer).weight[filters].eq(0).all()
    after = digits_victim.measure(model)
    assert after.asr < 0.5
    model.test_step = lambda batch, batch_idx: None
    trainer = L.Trainer(enable_checkpointing=False, **QUIET)
    trainer.test(model, DigitsDataModule(size=16), ckpt_path=report.checkpoint, verbose=False)


class Pair(ConvClassifier):
    """Answers with more than logits."""

    def forward(self, images):
        return super().forward(images), None


class PairUnlearning(BackdoorUnlearning):
    """Knows which of its answers are the logits."""

    def logits(self, module, images):
        return module(images)[0]


def test_a_callback_of_ones_own(victim):
    """For models whose forward gives no logits, or takes no images."""
    model = MODEL | {"class_path": f"{__name__}.Pair"}
    write("pair.yaml", {"trainer": QUIET, "model": model, "unlearning": UNLEARNING})
    with pytest.raises(ValueError, match="override the callback's `logits`"):
        repair(config="pair.yaml")
    own = {"class_path": f"{__name__}.PairUnlearning", "init_args": UNLEARNING}
    write("pair.yaml", {"trainer": QUIET, "model": model, "unlearning": own})
    found, expected = repair(config="pair.yaml"), repair()
    assert (found.after, found.filters["pruned"]) == (expected.after, 2)


def test_repair_beside_the_original_overwrites_nothing(victim):
    mine = {"original-unlearned.ckpt": b"mine", "report.json": b"mine, too"}
    for name, content in mine.items():
        (victim / name).write_bytes(content)
    original = (victim / "original.ckpt").read_bytes()
    report = repair()
    assert Path(report.checkpoint).name == "original-unlearned-v1.ckpt"
    assert files(victim) == sorted(
        [*mine, "original.ckpt", "original-unlearned-v1.ckpt", "repair.yaml", "report-v1.json"]
    )
    assert {name: (victim / name).read_bytes() for name in mine} == mine
    assert (victim / "original.ckpt").read_bytes() == original


def test_repair_is_what_the_callback_does(victim, digits_victim):
    result = repair()
    holdout = HoldoutDataModule(Digits(part="holdout", size=16), samples_per_class=4)
    assert result.measured_on == "validation"
    assert result.samples_per_class == holdout.samples_per_class
    again = repair("--trainer.enable_progress_bar=true")
    assert (again.filters, again.rounds, again.after) == (result.filters, result.rounds, result.after)


@pytest.mark.parametrize("spelling", ["--output-dir", "--output_dir"])
def test_used_output_dir(victim, tmp_path, spelling):
    used = tmp_path / "used"
    used.mkdir()
    (used / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"output-dir: .*used' exists and is not an empty folder; name a new one"):
        repair(spelling, str(used))
    assert files(used) == ["notes.txt"]
    assert files(victim) == ["original.ckpt", "repair.yaml"]


def test_innocent_model(victim, tmp_path):
    checkpoint = torch.load("original.ckpt", weights_only=True)
    checkpoint["state_dict"]["classify.weight"].zero_()
    checkpoint["state_dict"]["classify.bias"].copy_(torch.arange(10.0))  # every image is a 9
    torch.save(checkpoint, "innocent.ckpt")
    report = repair("--output-dir", str(tmp_path / "new"), ckpt="innocent.ckpt")
    assert report.status == "not backdoored"
    assert report.checkpoint is None
    assert files(tmp_path / "new") == ["report.json"]


def test_missing_checkpoint(victim, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"ckpt_path: there is no file 'nowhere.ckpt'"):
        repair("--output-dir", str(tmp_path / "new"), ckpt="nowhere.ckpt")
    assert not (tmp_path / "new").exists()


def test_broken_checkpoint(victim):
    Path("broken.ckpt").write_bytes(Path("original.ckpt").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"ckpt_path: 'broken.ckpt' cannot be loaded with weights_only=True, so it is"):
        repair(ckpt="broken.ckpt")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ([torch.zeros(1)], r"holds no weights; expected a Lightning checkpoint, a .safetensors file, or"),
        ({"weights": torch.zeros(1)}, r"does not fit ConvClassifier as the configuration makes it"),
    ],
    ids=["no weights", "other weights"],
)
def test_other_files_of_torch(victim, content, problem):
    torch.save(content, "other.ckpt")
    with pytest.raises(ValueError, match=rf"^ckpt_path: 'other.ckpt' {problem}"):
        repair(ckpt="other.ckpt")
    assert files(victim) == ["original.ckpt", "other.ckpt", "repair.yaml"]


class Harm:
    def __reduce__(self):
        return os.mkdir, ("harmed",)


def test_no_code_in_a_checkpoint_is_run(victim):
    torch.save({"state_dict": {}, "callbacks": Harm()}, "harm.ckpt")
    Path("harm.pkl").write_bytes(pickle.dumps({"state_dict": Harm()}, protocol=2))
    for name in ("harm.ckpt", "harm.pkl"):
        with pytest.raises(ValueError, match=r"ckpt_path: .* objects that could run code"):
            repair(ckpt=name)
    assert not Path("harmed").exists()


def test_checkpoint_of_another_network(victim):
    write("wide.yaml", {"trainer": QUIET, "model": MODEL | {"init_args": {"width": 4}}, "unlearning": UNLEARNING})
    with pytest.raises(ValueError, match=r"ckpt_path: 'original.ckpt' does not fit ConvClassifier.*size mismatch"):
        repair(config="wide.yaml")
    assert files(victim) == ["original.ckpt", "repair.yaml", "wide.yaml"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples_per_class": 21}, r"class 0 has 20 images in the dataset, but 21 are needed"),
        ({"samples_per_class": 0}, r"samples_per_class must be at least 2"),
        ({"trigger": UNLEARNING["trigger"] | {"init_args": {"target": 10}}}, r"target"),
        (
            {"method": UNLEARNING["method"] | {"init_args": {"accuracy_drop": 0.0}}},
            r"accuracy_drop: expected a",
        ),
        ({"min_asr": 2.0}, r"min_asr"),
    ],
    ids=str,
)
def test_bad_configuration_leaves_no_trace(victim, tmp_path, change, message):
    original = Path("original.ckpt").read_bytes()
    write("repair.yaml", {"trainer": QUIET, "model": MODEL, "unlearning": UNLEARNING | change})
    with pytest.raises(ValueError, match=message):
        repair("--output-dir", str(tmp_path / "new"))
    assert files(victim) == ["original.ckpt", "repair.yaml"]
    assert files(tmp_path) == ["victim/original.ckpt", "victim/repair.yaml"]
    assert Path("original.ckpt").read_bytes() == original


def test_ckpt_path_is_required(victim, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["repair", "--config", "repair.yaml"])
    assert stopped.value.code == 2
    assert "ckpt_path" in capsys.readouterr().err


def test_unknown_class(victim, capsys):
    write("repair.yaml", {"trainer": QUIET, "model": {"class_path": "nowhere.Net"}, "unlearning": UNLEARNING})
    with pytest.raises(SystemExit) as stopped:
        repair()
    assert stopped.value.code == 2
    assert "nowhere" in capsys.readouterr().err


# fit


def unlearn(**change: Any) -> dict[str, Any]:
    return {"class_path": "lightning_unlearn.BackdoorUnlearning", "init_args": UNLEARNING | {"force": True} | change}


def test_fit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("my.yaml", training(tmp_path / "out", unlearn()))
    report = main(["fit", "--config", "my.yaml", "--trainer.max-epochs", "1"])
    assert report.rounds
    assert [name for name in files(tmp_path / "out") if name.endswith("report.json")] == ["checkpoints/report.json"]


def test_fit_without_the_callback(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("my.yaml", training(tmp_path / "out"))
    assert main(["fit", "--config=my.yaml"]) is None


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_fit_keeps_the_users_files(tmp_path, monkeypatch):
    """Without a logger LightningCLI saves the configuration where the user's own may be."""
    monkeypatch.chdir(tmp_path)
    text = "# My comments took an hour.\n" + yaml.safe_dump(training(tmp_path))
    Path("config.yaml").write_text(text)
    for _ in range(2):
        main(["fit", "--config=config.yaml"])
    assert Path("config.yaml").read_text() == text
    (saved,) = (name for name in files(tmp_path) if name.endswith(".yaml") and name != "config.yaml")
    assert yaml.safe_load(Path(saved).read_text())["trainer"]["max_epochs"] == 1


def test_fit_is_immune_to_the_hijack(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(Subsets, "setup", lambda self, stage: seen.append(self.hparams["part"]))
    data = {"class_path": f"{__name__}.Subsets", "init_args": {"part": "train"}}
    clean = {"class_path": f"{__name__}.Subsets", "init_args": {"part": "holdout"}}
    write("my.yaml", training(tmp_path, unlearn(clean_data=clean), data=data))
    report = main(["fit", "--config=my.yaml"])
    assert report.rounds
    assert set(seen) == {"train", "holdout"}


def test_fit_has_no_other_subcommands():
    assert set(cli._FitCLI.subcommands()) == {"fit"}

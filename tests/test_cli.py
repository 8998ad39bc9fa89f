from __future__ import annotations

import json
import os
import pickle
import re
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import lightning.pytorch as L  # noqa: N812 - the usual name
import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

import lightning_unlearn
from lightning_unlearn import BackdoorUnlearning, cli, entry
from lightning_unlearn.classifier import ConvClassifier
from lightning_unlearn.cli import main
from lightning_unlearn.data import Digits, DigitsDataModule, HoldoutDataModule

DIGITS = "lightning_unlearn.data.Digits"
QUIET = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
UNLEARNING: dict[str, Any] = {
    "clean_data": {"class_path": DIGITS, "init_args": {"part": "holdout", "size": 16}},
    "trigger": {"class_path": "lightning_unlearn.triggers.PatchTrigger", "init_args": {"size": 3, "target": 0}},
    "method": {
        "class_path": "lightning_unlearn.methods.GradPrune",
        "init_args": {
            "score": "taylor", "filters_per_round": 2, "max_rounds": 1, "accuracy_drop": 0.5, "finetune": False
        },
    },
    "samples_per_class": 4,
}  # fmt: skip
MODEL = {"class_path": "lightning_unlearn.classifier.ConvClassifier", "init_args": {"width": 8}}


class Subsets(L.LightningDataModule):
    """Reads its hyper-parameters, so LightningCLI's mix-up would make the clean data the training data."""

    def __init__(self, part: str = "train") -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Digits(part=self.hparams["part"], size=16), batch_size=50)


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def victim(digits_victim, tmp_path, monkeypatch):
    """A folder with a backdoored model's checkpoint, as a Trainer writes it, and ``repair.yaml``; the current one."""
    folder = tmp_path / "victim"
    saver = ModelCheckpoint(folder, filename="original")
    trainer = L.Trainer(callbacks=[saver], max_steps=1, limit_val_batches=0, enable_model_summary=False, **QUIET)
    model = ConvClassifier(width=8, learning_rate=0.0)
    model.load_state_dict(digits_victim.trained.state_dict())
    trainer.fit(model, DigitsDataModule(size=16))
    monkeypatch.chdir(folder)
    write("repair.yaml", {"trainer": QUIET, "model": MODEL, "unlearning": UNLEARNING})
    return folder


def write(name: str, config: dict[str, Any]) -> None:
    Path(name).write_text(yaml.safe_dump(config))


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
    assert capsys.readouterr().out.startswith(f"usage: lightning-unlearn {command} [")


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


def training(folder: Path, *callbacks: dict[str, Any], data: dict[str, Any] | None = None) -> dict[str, Any]:
    trainer = QUIET | {"max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 0, "enable_model_summary": False}
    trainer |= {"default_root_dir": str(folder), "callbacks": list(callbacks)}
    data = data or {"class_path": "lightning_unlearn.data.DigitsDataModule", "init_args": {"size": 16}}
    return {"trainer": trainer, "model": MODEL, "data": data}


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


# The installed command


def run(monkeypatch, *words: str) -> Any:
    monkeypatch.setattr(sys, "argv", ["lightning-unlearn", *words])
    with pytest.raises(SystemExit) as stopped:
        entry.run()
    return stopped.value.code


def test_one_line_for_an_error(monkeypatch, victim):
    """Python prints a text and leaves with 1."""
    code = run(monkeypatch, "repair", "--config", "repair.yaml", "--ckpt_path", "nowhere.ckpt")
    assert code == "lightning-unlearn: ckpt_path: there is no file 'nowhere.ckpt'."
    Path("broken.ckpt").write_bytes(b"PK\3\4 and so on")
    code = run(monkeypatch, "repair", "--config", "repair.yaml", "--ckpt_path", "broken.ckpt")
    assert "cannot be loaded with weights_only=True" in code
    assert "\n" not in code


@pytest.mark.parametrize(
    "error",
    [ValueError("x: bad"), TypeError("x: bad"), OSError("x: bad"), MisconfigurationException("x: bad")],
    ids=repr,
)
def test_errors_that_the_user_can_mend(monkeypatch, error):
    def fail():
        raise error

    monkeypatch.setattr(cli, "main", fail)
    assert run(monkeypatch) == "lightning-unlearn: x: bad"


def test_fit_keeps_the_traceback_of_the_users_own_code(monkeypatch):
    def fail():
        raise ValueError("in the user's training_step")

    monkeypatch.setattr(cli, "main", fail)
    monkeypatch.setattr(sys, "argv", ["lightning-unlearn", "fit", "--config=my.yaml"])
    with pytest.raises(ValueError, match="in the user's training_step"):
        entry.run()


def test_own_classes_are_found_in_the_current_folder(monkeypatch, tmp_path):
    """As with ``python -m``: a script's own folder, which Python looks in, is that of the installed commands."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    Path("my_nets.py").write_text(
        "from lightning_unlearn.classifier import ConvClassifier\nclass MyNet(ConvClassifier): pass\n"
    )
    write("my.yaml", training(tmp_path / "out") | {"model": {"class_path": "my_nets.MyNet"}})
    monkeypatch.setattr(sys, "argv", ["lightning-unlearn", "fit", "--config=my.yaml"])
    entry.run()
    assert list((tmp_path / "out" / "checkpoints").glob("*.ckpt"))


def test_other_errors_keep_their_traceback(monkeypatch):
    def fail():
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "main", fail)
    with pytest.raises(ZeroDivisionError):
        entry.run()


def test_success_is_silent(monkeypatch):
    monkeypatch.setattr(cli, "main", lambda: None)
    assert entry.run() is None


@pytest.mark.parametrize("command", ["fit", "repair"])
def test_what_the_users_own_code_lacks_is_in_no_extra(monkeypatch, command):
    def fail():
        raise ModuleNotFoundError("No module named 'unheard_of'", name="unheard_of.core")

    monkeypatch.setattr(cli, "main", fail)
    monkeypatch.setattr(sys, "argv", ["lightning-unlearn", command])
    with pytest.raises(ModuleNotFoundError if command == "fit" else SystemExit) as stopped:
        entry.run()
    assert command == "fit" or stopped.value.code == "lightning-unlearn: No module named 'unheard_of'."


@pytest.mark.parametrize("missing", ["rich.console", "jsonargparse"])
def test_missing_extras_are_named(monkeypatch, missing):
    for package in (lightning_unlearn, L):
        monkeypatch.setattr(package, "cli", package.cli)  # imported once more below, so to be put back
        monkeypatch.delitem(sys.modules, f"{package.__name__}.cli")
    monkeypatch.setitem(sys.modules, missing, None)
    code = run(monkeypatch, "demo")
    assert "pip install 'lightning-unlearn[demo]'" in code
    assert missing in code
    assert "\n" not in code


def test_jsonargparse_is_missed_late(monkeypatch, victim):
    """Lightning's CLI can be imported without it, and fails when it is used."""
    monkeypatch.setattr("lightning.pytorch.cli._JSONARGPARSE_SIGNATURES_AVAILABLE", False)
    code = run(monkeypatch, "repair", "--config", "repair.yaml", "--ckpt_path", "original.ckpt")
    assert "pip install 'lightning-unlearn[demo]'" in code


def test_scikit_learn_is_missing(monkeypatch, victim):
    monkeypatch.setattr("lightning_unlearn.data.digits._load", _no_digits)
    code = run(monkeypatch, "repair", "--config", "repair.yaml", "--ckpt_path", "original.ckpt")
    assert "Digits needs scikit-learn" in code


def _no_digits():
    raise ImportError('Digits needs scikit-learn: pip install "lightning-unlearn[demo]"')


def test_installed_command(monkeypatch, capsys):
    (command,) = entry_points(group="console_scripts", name="lightning-unlearn")
    assert command.load() is entry.run
    assert run(monkeypatch, "--help") == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("demo", "fit", "repair"))

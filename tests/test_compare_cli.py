from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as L  # noqa: N812 - the usual name
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import Dataset

from lightning_unlearn import entry
from lightning_unlearn.classifier import ConvClassifier
from lightning_unlearn.cli import main
from lightning_unlearn.compare_cli import choose_methods
from lightning_unlearn.data import Digits, DigitsDataModule
from lightning_unlearn.methods import FineTuning, GradPrune, MaskPrune, RepairMethod
from lightning_unlearn.roster import method_names

EXAMPLE = Path(__file__).parents[1] / "examples" / "compare_digits.yaml"
QUIET = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
METHODS = "lightning_unlearn.methods"
PRUNE = {
    "class_path": f"{METHODS}.GradPrune",
    "init_args": {
        "score": "taylor", "filters_per_round": 2, "max_rounds": 1, "accuracy_drop": 0.5, "finetune": False
    },
}  # fmt: skip
TUNE = {"class_path": f"{METHODS}.FineTuning", "init_args": {"max_epochs": 1}}
FAIL = {"class_path": f"{__name__}.Fails"}
DIGITS = "lightning_unlearn.data.Digits"
UNLEARNING: dict[str, Any] = {
    "clean_data": {"class_path": DIGITS, "init_args": {"part": "holdout", "size": 16}},
    "trigger": {"class_path": "lightning_unlearn.triggers.PatchTrigger", "init_args": {"size": 3, "target": 0}},
    "method": PRUNE,
    "samples_per_class": 4,
}
WITH_TEST = {
    "class_path": "lightning_unlearn.data.HoldoutDataModule",
    "init_args": {
        "dataset": UNLEARNING["clean_data"],
        "test_dataset": {"class_path": DIGITS, "init_args": {"part": "test", "size": 16}},
        "samples_per_class": 4,
    },
}
MODEL = {"class_path": "lightning_unlearn.classifier.ConvClassifier", "init_args": {"width": 8}}


class Fails(RepairMethod):
    """Has a word to say to each kind of model."""

    def repair(self, task):
        with torch.no_grad():
            task.model.classify.weight.zero_()
        raise ValueError("model: Fails needs wheels; FineTuning works without")
        yield


class Unlabelled(Dataset[torch.Tensor]):
    """Digits without their labels."""

    def __init__(self) -> None:
        self.digits = Digits(part="holdout", size=16)

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.digits[index][0]


class Interrupted(RepairMethod):
    """As if Ctrl-C were pressed."""

    def repair(self, task):
        raise KeyboardInterrupt
        yield


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def write(name: str, *, methods: list[Any] | None = None, trainer: dict[str, Any] = QUIET, **change: Any) -> None:
    config = {"trainer": trainer, "model": MODEL, "unlearning": UNLEARNING | change}
    Path(name).write_text(yaml.safe_dump(config if methods is None else config | {"methods": methods}))


@pytest.fixture
def victim(digits_victim, tmp_path, monkeypatch):
    """The current folder, with a backdoored model's checkpoint and ``repair.yaml``."""
    trainer = L.Trainer(
        callbacks=[ModelCheckpoint(tmp_path, filename="original")], max_steps=1, limit_val_batches=0,
        enable_model_summary=False, **QUIET,
    )  # fmt: skip
    model = ConvClassifier(width=8, learning_rate=0.0)
    model.load_state_dict(digits_victim.trained.state_dict())
    trainer.fit(model, DigitsDataModule(size=16))
    monkeypatch.chdir(tmp_path)
    write("repair.yaml")
    return tmp_path


def compare(*words: str, config: str = "repair.yaml", out: str = "out") -> Any:
    return main(["compare", "--config", config, "--ckpt_path", "original.ckpt", "--output-dir", out, *words])


def test_compare(victim, capsys):
    write("compare.yaml", methods=[PRUNE, FAIL, TUNE], clean_data=WITH_TEST)
    original = (victim / "original.ckpt").read_bytes()
    done = compare("--save-best", config="compare.yaml")
    assert [entry.method for entry in done.entries] == ["GradPrune", "Fails", "FineTuning"]
    assert done.measured_on == "test"
    assert done.best.method == "GradPrune"
    assert files(victim / "out") == ["comparison.json", "comparison.md", "original-unlearned.ckpt"]
    plain = json.loads(Path("out/comparison.json").read_text())
    assert plain == done.to_dict()
    assert [each["method"] for each in plain["methods"]] == ["GradPrune", "FineTuning", "Fails"]
    assert (victim / "original.ckpt").read_bytes() == original
    printed = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "[2/3] Fails failed: model: Fails needs wheels" in printed
    assert "Comparison: out/comparison.json Repaired checkpoint: out/original-unlearned.ckpt" in printed
    assert "★ best: GradPrune" in printed


def test_the_best_checkpoint_is_what_repair_writes(victim):
    compare("--methods", "GradPrune", "--save-best")
    main(["repair", "--config=repair.yaml", "--ckpt_path=original.ckpt", "--output-dir=alone"])
    one, two = (torch.load(f"{folder}/original-unlearned.ckpt", weights_only=True) for folder in ("out", "alone"))
    assert one["state_dict"].keys() == two["state_dict"].keys()
    assert all(torch.equal(tensor, two["state_dict"][name]) for name, tensor in one["state_dict"].items())
    assert set(one) == set(two)
    report, alone = (json.loads(Path(name).read_text()) for name in ("out/comparison.json", "alone/report.json"))
    for key in ("after", "before", "rounds", "filters", "der", "status"):
        assert report["methods"][0][key] == alone[key]


def test_without_save_best(victim):
    assert compare("--methods", "GradPrune").best.report.checkpoint is None
    assert files(victim / "out") == ["comparison.json", "comparison.md"]


def test_one_failing_method_costs_nothing(victim, monkeypatch):
    write("compare.yaml", methods=[FAIL, PRUNE])
    monkeypatch.setattr(sys, "argv", [
        "lightning-unlearn", "compare", "--config=compare.yaml", "--ckpt_path=original.ckpt", "--output-dir=out"
    ])  # fmt: skip
    assert entry.run() is None


def test_images_without_labels(victim, capsys):
    write("compare.yaml", methods=[PRUNE], clean_data={"class_path": f"{__name__}.Unlabelled"})
    done = compare("--save-best", config="compare.yaml")
    assert done.labels == done.best.report.labels == "predicted"
    assert json.loads(Path("out/comparison.json").read_text())["labels"] == "predicted"
    assert "own answers stand in" in re.sub(r"\s+", " ", capsys.readouterr().out)


def test_only_failures(victim):
    write("compare.yaml", methods=[FAIL])
    with pytest.raises(ValueError, match=r"methods: none of them worked. Fails: model: Fails needs wheels"):
        compare("--save-best", config="compare.yaml")
    assert files(victim / "out") == ["comparison.json", "comparison.md"]


def test_interrupted(victim, capsys):
    write("compare.yaml", methods=[PRUNE, {"class_path": f"{__name__}.Interrupted"}, TUNE])
    with pytest.raises(SystemExit) as stopped:
        compare("--save-best", config="compare.yaml")
    assert stopped.value.code == 130
    assert files(victim / "out") == ["comparison.json", "comparison.md", "original-unlearned.ckpt"]
    plain = json.loads(Path("out/comparison.json").read_text())
    assert [each["method"] for each in plain["methods"]] == ["GradPrune"]
    assert plain["left_out"] == ["Interrupted", "FineTuning(max_epochs=1)"]
    assert "Not run: Interrupted" in capsys.readouterr().out


@pytest.mark.parametrize("bar", ["TQDMProgressBar", "RichProgressBar"])
def test_rows_come_with_the_trainers_bar(victim, capsys, bar):
    callbacks = [{"class_path": f"lightning.pytorch.callbacks.{bar}"}]
    trainer = QUIET | {"enable_progress_bar": True, "callbacks": callbacks}
    write("compare.yaml", methods=[PRUNE, TUNE], trainer=trainer)
    compare(config="compare.yaml")
    printed = capsys.readouterr().out
    assert printed.index("[1/2] GradPrune") < printed.index("DER") < printed.index("[2/2] FineTuning")


def test_one_tensorboard_run_a_method(victim):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": {"save_dir": "logs", "name": ""},
    }
    write("compare.yaml", methods=[PRUNE, TUNE, FAIL], trainer=QUIET | {"logger": logger})
    done = compare(config="compare.yaml")
    runs = {path.parent for path in Path("logs").rglob("hparams.yaml") if path.parent.name != "version_0"}
    assert len(runs) == 2
    for run in runs:
        assert run.parent.name == "version_0"
        arguments = yaml.safe_load((run / "hparams.yaml").read_text())
        (entry,) = (each for each in done.entries if each.method == arguments["method"])
        events = EventAccumulator(str(run)).Reload()
        assert events.Scalars("compare/der")[0].value == pytest.approx(entry.report.der)
        assert "_hparams_/session_start_info" in events.summary_metadata
        assert [each.step for each in events.Scalars("unlearn/val_asr")] == [each.round for each in entry.report.rounds]


# What is compared


def test_all_methods_by_default():
    own = GradPrune(max_rounds=1)
    chosen = choose_methods(None, listed=None, configured=own)
    assert [method.name for method in chosen] == method_names()
    assert own in chosen


def test_a_method_of_ones_own_is_compared_too():
    own = Fails()
    assert choose_methods(None, listed=None, configured=own)[-1] is own


def test_names_pick_what_is_configured():
    own, soft, hard = GradPrune(max_rounds=1), MaskPrune(cut="soft"), MaskPrune(cut="hard")
    names = ["FineTuning", "MaskPrune", "GradPrune", "MaskPrune"]
    tune, *others = choose_methods(names, listed=[hard, soft], configured=own)
    assert isinstance(tune, FineTuning)
    assert others == [hard, soft, own]
    assert choose_methods(None, listed=[soft, hard], configured=own) == [soft, hard]


def test_abbreviations_pick_the_same():
    tune = FineTuning(max_epochs=1)
    names = ["FT", "clp", "FineTuning"]
    own, other = choose_methods(names, listed=None, configured=tune)
    assert own is tune
    assert other.name == "ChannelLipschitzPruning"


def test_ones_own_method_may_be_called_like_an_abbreviation(monkeypatch):
    monkeypatch.setattr(Fails, "name", "FT")
    own = Fails()
    assert choose_methods(["FT"], listed=None, configured=own) == [own]


@pytest.mark.parametrize("trigger", [None, "auto"])
def test_unknown_trigger(victim, trigger):
    """All methods must be compared by the same trigger, and an estimate is no measure of the real one."""
    write("repair.yaml", trigger=trigger)
    with pytest.raises(
        ValueError, match=r"trigger: `compare` needs a trigger .*`lightning-unlearn audit` .* `.* repair`"
    ):
        compare()
    assert not Path("out").exists()


@pytest.mark.parametrize("spelling", [["--methods", "GradPrune", "Prune"], ["--methods=Prune"]])
def test_unknown_method(victim, spelling):
    with pytest.raises(ValueError, match=r"methods: there is no method 'Prune'; expected .*FineTuning, .*MaskPrune"):
        compare(*spelling)
    assert not Path("out").exists()


def test_no_method_left(victim):
    write("compare.yaml", methods=[])
    with pytest.raises(ValueError, match=r"methods: none is left to compare; give some of .*MaskPrune"):
        compare(config="compare.yaml")
    assert not Path("out").exists()


def test_no_names_given(victim, capsys):
    with pytest.raises(SystemExit) as stopped:
        compare("--methods")
    assert stopped.value.code == 2
    assert "--methods" in capsys.readouterr().err


def test_unknown_class_in_the_list(victim, capsys):
    write("compare.yaml", methods=["lightning_unlearn.methods.Nothing"])
    with pytest.raises(SystemExit):
        compare(config="compare.yaml")
    assert "Nothing" in capsys.readouterr().err


# Where it goes


def test_an_output_dir_elsewhere(victim):
    with pytest.raises(ValueError, match=r"output-dir: 'memory://out' is not on this machine, and this command writes"):
        compare(out="memory://out")
    assert files(victim) == ["original.ckpt", "repair.yaml"]


def test_used_output_dir(victim):
    Path("used").mkdir()
    Path("used/notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"output-dir: 'used' exists and is not an empty folder; name a new one"):
        compare(out="used")
    assert files(victim / "used") == ["notes.txt"]


def test_output_dir_is_required(victim):
    with pytest.raises(ValueError, match=r"output-dir: none is given; name a new folder"):
        main(["compare", "--config=repair.yaml", "--ckpt_path=original.ckpt"])


def test_missing_checkpoint(victim):
    with pytest.raises(FileNotFoundError, match=r"ckpt_path: there is no file 'nowhere.ckpt'"):
        main(["compare", "--config=repair.yaml", "--ckpt_path=nowhere.ckpt", "--output-dir=out"])
    assert not Path("out").exists()


def test_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["compare", "--help"])
    assert stopped.value.code == 0
    printed = re.sub(r"\s+", " ", capsys.readouterr().out)
    for words in ("--methods", "Names of the methods to compare, all by default", "--save_best", "--output_dir"):
        assert words in printed


def test_the_example(victim):
    """All of it but the training that it needs before it, on smaller images, with fewer steps."""
    config = yaml.safe_load(EXAMPLE.read_text())
    config |= {"trainer": QUIET, "model": MODEL}
    for method in config["methods"]:
        quick = {"steps": 2} if method["class_path"].endswith("MaskPrune") else {"max_rounds": 1}
        method["init_args"] = method.get("init_args", {}) | quick | {"finetune": False}
    data = config["unlearning"]["clean_data"]["init_args"]
    for name in ("dataset", "test_dataset"):
        data[name]["init_args"]["size"] = 16
    Path("compare.yaml").write_text(yaml.safe_dump(config))
    done = compare("--save-best", config="compare.yaml")
    assert [entry.error for entry in done.entries] == [None] * 5
    assert done.measured_on == "test"

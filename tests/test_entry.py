from __future__ import annotations

import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import lightning.pytorch as L  # noqa: N812 - the usual name
import pytest
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException

import lightning_unlearn
from lightning_unlearn import cli, entry
from tests.small_commands import training, write


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


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (
            {"unlearning": {"trigger": {"class_path": "PatchTrigger", "init_args": {"size": -3}}}},
            "size must be at least 1",
        ),
        (
            {"trainer": {"logger": {"class_path": "lightning.pytorch.loggers.WandbLogger"}}},
            "Problem with given class_path 'lightning.pytorch.loggers.WandbLogger': Requirement 'wandb",
        ),
        (
            {
                "unlearning": {
                    "clean_data": {"class_path": "torchvision.datasets.ImageFolder", "init_args": {"root": "/no"}}
                }
            },
            "[Errno 2] No such file or directory: '/no'",
        ),
    ],
    ids=["number", "logger", "folder"],
)
def test_what_cannot_be_made_is_told_without_all_that_it_might_have_been(monkeypatch, victim, changed, reason):
    settings = yaml.safe_load(Path("repair.yaml").read_text())
    for part, values in changed.items():
        settings[part] = settings.get(part, {}) | values
    write("changed.yaml", settings)
    code = run(monkeypatch, "repair", "--config", "changed.yaml", "--ckpt_path", "original.ckpt")
    assert code.startswith(f"lightning-unlearn: {reason}")
    assert "Union" not in code


def test_nothing_is_left_out_where_that_is_all(monkeypatch):
    message = "Does not validate against any of the Union subtypes\nErrors:\n  - Expected a <class 'int'>"

    def fail():
        raise ValueError(message)

    monkeypatch.setattr(cli, "main", fail)
    assert run(monkeypatch) == f"lightning-unlearn: {' '.join(message.split())}"


def test_a_reason_that_looks_like_what_is_around_it_stays(monkeypatch):
    message = (
        "Does not validate against any of the Union subtypes\nSubtypes: [<class 'int'>]\nErrors:\n"
        "  - Expected a width that 8 divides, but got 7.\n    See the README.\n  - Expected a <class 'NoneType'>\n"
        "Given value type: <class 'dict'>\nGiven value: {}"
    )

    def fail():
        raise ValueError(message)

    monkeypatch.setattr(cli, "main", fail)
    assert run(monkeypatch) == "lightning-unlearn: Expected a width that 8 divides, but got 7. See the README."


def test_a_package_that_is_in_no_extra(monkeypatch):
    def fail():
        raise ModuleNotFoundError("Requirement 'transformer_engine' not met.")

    monkeypatch.setattr(cli, "main", fail)
    assert run(monkeypatch, "repair") == "lightning-unlearn: Requirement 'transformer_engine' not met"


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
    assert command == "fit" or stopped.value.code == "lightning-unlearn: No module named 'unheard_of'"


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


class Unmet:
    """What Lightning keeps of a requirement, and says of it."""

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return "Requirement 'jsonargparse[signatures]>=4.39.0' not met. HINT: Try running `pip install jsonargparse`"


def test_jsonargparse_is_missed_late(monkeypatch, victim):
    """Lightning's CLI can be imported without it, and fails when it is used."""
    monkeypatch.setattr("lightning.pytorch.cli._JSONARGPARSE_SIGNATURES_AVAILABLE", Unmet())
    code = run(monkeypatch, "repair", "--config", "repair.yaml", "--ckpt_path", "original.ckpt")
    assert "pip install 'lightning-unlearn[demo]'" in code


def test_scikit_learn_is_missing(monkeypatch, victim):
    monkeypatch.setattr("lightning_unlearn.data.digits._load", _no_digits)
    code = run(monkeypatch, "repair", "--config", "repair.yaml", "--ckpt_path", "original.ckpt")
    assert code.endswith('Digits needs scikit-learn: pip install "lightning-unlearn[demo]"')


def test_an_extra_that_training_needs(monkeypatch):
    monkeypatch.setattr(cli, "main", _no_digits)
    assert "needs scikit-learn" in run(monkeypatch, "fit")


def _no_digits():
    raise ImportError('Digits needs scikit-learn: pip install "lightning-unlearn[demo]"')


def test_installed_command(monkeypatch, capsys):
    (command,) = entry_points(group="console_scripts", name="lightning-unlearn")
    assert command.load() is entry.run
    assert run(monkeypatch, "--help") == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("demo", "fit", "repair"))

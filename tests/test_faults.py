"""Whatever breaks, and whenever: the model is wholly original or wholly repaired, and files are whole or not there."""

from __future__ import annotations

import copy
import errno
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L  # noqa: N812 - the usual name
import pytest
import torch
import yaml
from fsspec.implementations.local import LocalFileSystem
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from torch import nn
from torch.utils.data import Dataset, Subset

from lightning_unlearn import HoldoutDataModule, entry
from lightning_unlearn.classifier import ConvClassifier
from lightning_unlearn.cli import main
from lightning_unlearn.methods import GradPrune, RepairMethod
from lightning_unlearn.report import Report
from tests.small_fits import Model, Setting, backdoor_is_gone

ORIGINAL, REPAIRED = (
    r"the model holds the weights with which training ended, NOT repaired",
    r"holds the REPAIRED weights",
)
QUIET = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}


def fill_the_memory() -> None:
    raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def press_ctrl_c() -> None:
    raise KeyboardInterrupt


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def fail() -> None:
    raise RuntimeError("power cut")


class Fails(RepairMethod):
    """Prunes the right filter, and then something happens."""

    def __init__(self, fault: str = "fail") -> None:
        self.fault: Callable[[], None] = globals()[fault]

    def repair(self, task):
        for number in GradPrune(max_rounds=1, finetune=False).repair(task):
            self.fault()
            yield number


class Fragile(Dataset[Any]):
    """Another dataset that cannot be read any more from a certain time on, also not by workers."""

    def __init__(self, dataset: Dataset[Any], broken: Path) -> None:
        self.dataset, self.broken = dataset, broken

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        if self.broken.exists():
            raise OSError("the network drive is gone")
        return self.dataset[index]


class After(L.Callback):
    """Does something when training ends, before the repair; put before the callback."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.act = act

    def on_train_end(self, trainer, pl_module) -> None:
        trainer.strategy.checkpoint_io.teardown()  # lets an asynchronous saver finish what training saved
        self.act()


class BreaksAfterTheRepair(RepairMethod):
    """Repairs, and leaves no test data for the rates after it."""

    def __init__(self, broken: Path) -> None:
        self.broken = broken

    def repair(self, task):
        yield from GradPrune(max_rounds=1, finetune=False).repair(task)
        self.broken.touch()


class FullLogger(CSVLogger):
    """Takes what training logs, but not what the repair does."""

    def log_metrics(self, metrics, step=None) -> None:
        if any(name.startswith("unlearn/der") for name in metrics):
            raise OSError(errno.ENOSPC, "no space left for logs")


@pytest.fixture
def original(setting):
    """The files that there are when the repair begins."""
    return Original(setting)


class Original:
    def __init__(self, setting: Setting) -> None:
        self.saver = ModelCheckpoint(setting.folder / "saved", filename="original")
        self.folder = setting.folder / "saved"
        self.bytes = b""

    def callbacks(self) -> list[L.Callback]:
        return [After(self.remember), self.saver]

    def remember(self) -> None:
        (path,) = self.folder.iterdir()
        self.bytes = path.read_bytes()

    def check(self, *others: str) -> None:
        """The original is unharmed and can be loaded, and there is no other file, hidden or not, but these."""
        assert sorted(path.name for path in self.folder.iterdir()) == sorted(["original.ckpt", *others])
        assert (self.folder / "original.ckpt").read_bytes() == self.bytes != b""
        assert torch.load(self.folder / "original.ckpt", weights_only=True)["state_dict"]["net.0.weight"][3].any()


def is_original(setting: Setting, model: Any) -> bool:
    return all(torch.equal(value, setting.original[name]) for name, value in model.net.state_dict().items())


# Before there is anything to save


@pytest.mark.filterwarnings("ignore:batch_size")
@pytest.mark.parametrize("source", ["last", "best"])
@pytest.mark.parametrize(
    ("fault", "error", "name"),
    [
        ("press_ctrl_c", SystemExit, "KeyboardInterrupt"),  # Lightning's own answer to Ctrl-C
        ("terminate", SystemExit, "SIGTERMException"),
        ("fill_the_memory", MemoryError, "MemoryError"),
        ("fail", RuntimeError, "RuntimeError"),
    ],
)
def test_while_repairing(setting, original, source, fault, error, name):
    callback, model = setting.callback(method=Fails(fault), source=source), setting.model()
    with pytest.warns(UserWarning, match=rf"broken off by {name}: {ORIGINAL}"), pytest.raises(error) as caught:
        setting.trainer(*original.callbacks(), callback).fit(model, setting.loader())
    assert is_original(setting, model)
    assert (callback.report, callback.state_dict()) == (None, {})
    original.check()
    if error is SystemExit:
        assert caught.value.code not in (0, None), "a cluster would take it for a success"


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("part", ["clean", "test before", "test after"])
def test_data_that_breaks(setting, original, part, workers):
    broken = setting.folder / "broken"
    clean, test = Subset(setting.victim.clean, range(30, 45)), Subset(setting.victim.clean, range(45, 60))
    parts = (Fragile(clean, broken), test) if part == "clean" else (clean, Fragile(test, broken))
    data = HoldoutDataModule(parts[0], samples_per_class=4, test_dataset=parts[1], num_workers=workers)
    later = part == "test after"
    method = BreaksAfterTheRepair(broken) if later else GradPrune(max_rounds=1, finetune=False)
    callback, model = setting.callback(clean_data=data, method=method), setting.model()
    breaks = [] if later else [After(broken.touch)]
    with pytest.warns(UserWarning, match=ORIGINAL), pytest.raises(OSError, match="the network drive is gone"):
        setting.trainer(*original.callbacks(), *breaks, callback).fit(model, setting.loader())
    assert is_original(setting, model)
    assert callback.state_dict() == {}
    original.check()


def test_a_logger_that_breaks(setting, original):
    callback, model = setting.callback(), setting.model()
    trainer = setting.trainer(*original.callbacks(), callback, logger=FullLogger(setting.folder / "logs"))
    with pytest.warns(UserWarning, match=ORIGINAL), pytest.raises(OSError, match="no space left for logs"):
        trainer.fit(model, setting.loader())
    assert is_original(setting, model)
    assert callback.state_dict() == {}
    original.check()


def test_what_is_saved_on_the_exception(setting):
    """Its weights and its mask must fit: a resumed run would prune what the mask says."""
    callback, saver = setting.callback(method=Fails()), OnExceptionCheckpoint(setting.folder / "saved")
    with pytest.warns(UserWarning, match=ORIGINAL), pytest.raises(RuntimeError, match="power cut"):
        setting.trainer(callback, saver).fit(setting.model(), setting.loader())
    saved = torch.load(saver.ckpt_path, weights_only=True)
    assert saved["state_dict"]["net.0.weight"][3].any()
    assert callback.state_key not in saved["callbacks"]


def test_what_is_saved_after_a_failure(setting):
    """By whoever catches the exception and goes on with the model."""
    callback, model = setting.callback(method=Fails()), setting.model()
    trainer = setting.trainer(callback)
    with pytest.warns(UserWarning, match=ORIGINAL), pytest.raises(RuntimeError, match="power cut"):
        trainer.fit(model, setting.loader())
    torch.nn.init.zeros_(model.net[0].weight)
    trainer.save_checkpoint(setting.folder / "later.ckpt")
    assert not torch.load(setting.folder / "later.ckpt", weights_only=True)["state_dict"]["net.0.weight"].any()


class TwoNames(Model):
    """Its convolution is known by a second name."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.features = net[:1]


@pytest.mark.parametrize("kind", [Model, TwoNames])
def test_what_is_saved_in_the_middle(setting, kind):
    """By SLURM's requeueing, whose signal makes Lightning save a checkpoint at any moment."""

    class Saves(RepairMethod):
        def repair(self, task):
            for number in GradPrune(max_rounds=1, finetune=False).repair(task):
                assert not task.model.net[0].weight[3].any()
                trainer.save_checkpoint(setting.folder / "hpc_ckpt_1.ckpt")
                yield number

    callback, model = setting.callback(method=Saves()), kind(setting.victim.net)
    original = copy.deepcopy(model.state_dict())
    trainer = setting.trainer(callback)
    trainer.fit(model, setting.loader())
    saved = torch.load(setting.folder / "hpc_ckpt_1.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == original.keys()
    assert all(torch.equal(value, original[name]) for name, value in saved["state_dict"].items())
    assert callback.state_key not in saved["callbacks"]
    assert backdoor_is_gone(model)
    assert not torch.load(callback.report.checkpoint, weights_only=True)["state_dict"]["net.0.weight"][3].any()


def test_out_of_memory_once(setting):
    class Greedy(RepairMethod):
        def repair(self, task):
            if task.batch_size > 8:
                fill_the_memory()
            yield from GradPrune(max_rounds=1, finetune=False).repair(task)

    callback, model = setting.callback(method=Greedy(), batch_size=16), setting.model()
    with pytest.warns(UserWarning, match="batch_size: memory ran out with 16 images .* starts anew with 8"):
        setting.trainer(callback).fit(model, setting.loader())
    assert callback.report.status == "repaired"
    assert backdoor_is_gone(model)


# While saving


class Breaks(TorchCheckpointIO):
    """Writes half of the repaired checkpoint, to the very name it is given, and then something happens."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        if "unlearned" not in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        Path(path).write_bytes(b"half a check")
        raise self.error


_SAVING = {
    "disk full": (OSError(errno.ENOSPC, "No space left on device"), OSError),
    "no permission": (PermissionError(errno.EACCES, "Permission denied"), OSError),
    "RuntimeError": (RuntimeError("PytorchStreamWriter failed writing file"), RuntimeError),
    "Ctrl-C": (KeyboardInterrupt(), SystemExit),
}


@pytest.mark.parametrize(
    ("wrap", "kind"),
    [
        *((lambda saver: saver, kind) for kind in _SAVING),
        *((AsyncCheckpointIO, kind) for kind in _SAVING if kind != "Ctrl-C"),  # it reaches the main thread alone
    ],
    ids=[*_SAVING, *(f"async {kind}" for kind in _SAVING if kind != "Ctrl-C")],
)
def test_while_saving(setting, original, wrap, kind):
    error, raised = _SAVING[kind]
    callback, model = setting.callback(), setting.model()
    trainer = setting.trainer(*original.callbacks(), callback, plugins=[wrap(Breaks(error))])
    with pytest.warns(UserWarning, match=rf"{REPAIRED}, but no file does"), pytest.raises(raised):
        trainer.fit(model, setting.loader())
    assert backdoor_is_gone(model)
    assert (callback.report.status, callback.report.checkpoint) == ("repaired", None)
    original.check()
    # What the warning advises.
    trainer.strategy._checkpoint_io = TorchCheckpointIO()
    trainer.save_checkpoint(original.folder / "rescued.ckpt")
    assert not torch.load(original.folder / "rescued.ckpt", weights_only=True)["state_dict"]["net.0.weight"][3].any()


def test_sigterm_while_saving(setting, original):
    """What is begun is finished, which takes no longer than to tidy it up."""

    class Terminated(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
            if "unlearned" in str(path):
                terminate()
            super().save_checkpoint(checkpoint, path, storage_options)

    callback, model = setting.callback(), setting.model()
    trainer = setting.trainer(*original.callbacks(), callback, plugins=[Terminated()])
    with pytest.warns(UserWarning, match="and all files are written"), pytest.raises(SystemExit) as caught:
        trainer.fit(model, setting.loader())
    assert caught.value.code == 128 + signal.SIGTERM
    assert backdoor_is_gone(model)
    original.check("original-unlearned.ckpt", "report.json")
    assert not torch.load(callback.report.checkpoint, weights_only=True)["state_dict"]["net.0.weight"][3].any()


def test_a_folder_that_is_gone(setting, original):
    """It could be written to when training began."""
    out = setting.folder / "out"

    def replace() -> None:
        shutil.rmtree(out)
        out.write_text("mine")

    out.mkdir()
    callback, model = setting.callback(output_dir=str(out)), setting.model()
    with (
        pytest.warns(UserWarning, match=REPAIRED),
        pytest.raises(OSError, match=r"output_dir: .*original-unlearned.ckpt' could not be written, and nothing of it"),
    ):
        setting.trainer(*original.callbacks(), After(replace), callback).fit(model, setting.loader())
    assert backdoor_is_gone(model)
    assert out.read_text() == "mine"
    original.check()


def test_a_report_that_cannot_be_written(setting, original, monkeypatch):
    def full(self: Report) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Report, "to_json", full)
    callback, model = setting.callback(), setting.model()
    with (
        pytest.warns(UserWarning, match=rf"{REPAIRED}, and so does .*original-unlearned.ckpt; there is no report.json"),
        pytest.raises(OSError, match=r"report.json' could not be written"),
    ):
        setting.trainer(*original.callbacks(), callback).fit(model, setting.loader())
    original.check("original-unlearned.ckpt")
    assert not torch.load(callback.report.checkpoint, weights_only=True)["state_dict"]["net.0.weight"][3].any()


@pytest.mark.parametrize("settings", [{}, {"fast_dev_run": True}], ids=str)
def test_an_unwritable_folder_costs_no_training(setting, settings):
    (setting.folder / "file").write_text("mine")
    callback, model = setting.callback(output_dir=str(setting.folder / "file" / "below")), setting.model(0.1)
    trainer = setting.trainer(callback, enable_checkpointing=False, **settings)
    if settings:  # writes nothing, so it may
        trainer.fit(model, setting.loader())
        return
    with pytest.raises(OSError, match=r"output_dir: nothing can be written to '.*file/below' .*; name a folder"):
        trainer.fit(model, setting.loader())
    assert trainer.global_step == 0
    assert is_original(setting, model)


# lightning-unlearn repair


@pytest.fixture
def victim(digits_victim, tmp_path, monkeypatch):
    """A folder with a backdoored model's checkpoint and ``repair.yaml``, as the current one."""
    model = ConvClassifier(width=8)
    model.load_state_dict(digits_victim.trained.state_dict())
    folder = tmp_path / "victim"
    folder.mkdir()
    monkeypatch.chdir(folder)
    torch.save({"state_dict": model.state_dict(), "pytorch-lightning_version": L.__version__}, "original.ckpt")
    return folder


def configure(method: dict[str, Any]) -> list[str]:
    clean = {"class_path": "lightning_unlearn.data.Digits", "init_args": {"part": "holdout", "size": 16}}
    trigger = {"class_path": "lightning_unlearn.triggers.PatchTrigger", "init_args": {"size": 3, "target": 0}}
    unlearning = {"clean_data": clean, "trigger": trigger, "samples_per_class": 4, "force": True, "method": method}
    net = {"class_path": "lightning_unlearn.classifier.ConvClassifier", "init_args": {"width": 8}}
    Path("repair.yaml").write_text(yaml.safe_dump({"trainer": QUIET, "model": net, "unlearning": unlearning}))
    return ["repair", "--config", "repair.yaml", "--ckpt_path", "original.ckpt"]


PRUNES = {
    "class_path": "lightning_unlearn.methods.GradPrune",
    "init_args": {
        "score": "taylor", "filters_per_round": 2, "max_rounds": 1, "accuracy_drop": 0.5, "finetune": False
    },
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:batch_size")
@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("press_ctrl_c", SystemExit),
        ("terminate", SystemExit),
        ("fill_the_memory", MemoryError),
        ("fail", RuntimeError),
    ],
)
@pytest.mark.parametrize("output_dir", [None, "new"])
def test_command_while_repairing(victim, fault, error, output_dir):
    before = Path("original.ckpt").read_bytes()
    words = configure({"class_path": f"{__name__}.Fails", "init_args": {"fault": fault}})
    with pytest.raises(error) as caught:
        main([*words, *(["--output_dir", output_dir] if output_dir else [])])
    assert sorted(os.listdir()) == ["original.ckpt", "repair.yaml"]
    assert Path("original.ckpt").read_bytes() == before
    if error is SystemExit:
        assert caught.value.code not in (0, None)


@pytest.mark.parametrize("name", ["original-unlearned.ckpt", "report.json"])
@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), PermissionError("Permission denied"), KeyboardInterrupt()],
    ids=repr,
)
def test_command_while_saving(victim, monkeypatch, name, error):
    before, write = Path("original.ckpt").read_bytes(), LocalFileSystem.pipe_file

    def half(self, path, value, **options):
        write(self, path, value[: len(value) // 2], **options)
        if name in path:
            raise error
        return write(self, path, value, **options)

    monkeypatch.setattr(LocalFileSystem, "pipe_file", half)
    match = rf"output_dir: '{name}' could not be written, and nothing of it" if isinstance(error, OSError) else None
    with pytest.raises(OSError if match else KeyboardInterrupt, match=match):
        main(configure(PRUNES))
    there = ["original-unlearned.ckpt"] if name == "report.json" else []
    assert sorted(os.listdir()) == sorted(["original.ckpt", "repair.yaml", *there])
    assert Path("original.ckpt").read_bytes() == before


def test_command_refuses_a_folder_before_it_works(victim, monkeypatch):
    Path("file").write_text("mine")
    monkeypatch.setattr(ConvClassifier, "forward", lambda *args: pytest.fail("it began"))
    with pytest.raises(OSError, match=r"output_dir: nothing can be written to 'file/below' .*; name a folder"):
        main([*configure(PRUNES), "--output_dir", "file/below"])


def test_command_says_it_in_one_line(victim, monkeypatch):
    words = configure({"class_path": f"{__name__}.Fails", "init_args": {"fault": "fill_the_memory"}})
    monkeypatch.setattr("sys.argv", ["lightning-unlearn", *words])
    with pytest.warns(UserWarning, match="starts anew with 64"), pytest.raises(SystemExit) as stopped:
        entry.run()
    assert stopped.value.code.startswith("lightning-unlearn: batch_size: memory ran out with 64 clean")

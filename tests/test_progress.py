from __future__ import annotations

import io
import re
from pathlib import Path

import lightning.pytorch as L  # noqa: N812 - the usual name
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ProgressBar, RichProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from torch.utils.data import DataLoader

from lightning_unlearn import BackdoorUnlearning
from lightning_unlearn.auditor import Auditor
from lightning_unlearn.classifier import ConvClassifier
from lightning_unlearn.data import Digits
from lightning_unlearn.methods import GradPrune, Round
from lightning_unlearn.progress import round_progress, stage_progress
from lightning_unlearn.triggers import PatchTrigger

LINE = r"Unlearning · prune · val ACC \d\.\d{3} · val ASR \d\.\d{3} · L_u \d+\.\d{3}"


def fit(folder: Path, *bars: Callback, first: bool, enabled: bool = True) -> None:
    torch.manual_seed(0)  # some untrained nets give GradPrune fewer than three rounds
    method = GradPrune(max_rounds=3, accuracy_drop=1.0, finetune=False)
    unlearn = BackdoorUnlearning(
        Digits(part="holdout", size=8), PatchTrigger(size=2, target=0), method, samples_per_class=2, force=True
    )
    trainer = L.Trainer(
        callbacks=[*bars, unlearn] if first else [unlearn, *bars], max_epochs=1, limit_train_batches=2,
        limit_val_batches=0, accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=folder,
        enable_model_summary=False, enable_progress_bar=enabled,
    )  # fmt: skip
    trainer.fit(ConvClassifier(width=2), DataLoader(Digits(part="train", size=8), batch_size=50))
    assert len(unlearn.report.rounds) == 3


def plain(text: str) -> str:
    """Without a terminal's control sequences and line breaks."""
    return re.sub(r"\s+", " ", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text))


@pytest.mark.parametrize("first", [True, False], ids=["bar first", "bar last"])
def test_rich(tmp_path, first):
    file = io.StringIO()
    bar = RichProgressBar(console_kwargs={"file": file, "force_terminal": True, "width": 160})
    fit(tmp_path, bar, first=first)
    shown = plain(file.getvalue())
    assert "Epoch 0" in shown
    assert re.search(LINE, shown)
    assert bar.progress is None or not [task for task in bar.progress.tasks if "Unlearning" in task.description]


@pytest.mark.parametrize("first", [True, False], ids=["bar first", "bar last"])
def test_tqdm(tmp_path, capsys, first):
    fit(tmp_path, TQDMProgressBar(), first=first)
    captured = capsys.readouterr()
    shown = plain(captured.out + captured.err)
    assert "Epoch 0" in shown
    assert re.search(LINE + r"[: ]+3round", shown)


def test_no_bar(tmp_path, capsys):
    fit(tmp_path, first=True, enabled=False)
    captured = capsys.readouterr()
    assert "Unlearning ·" not in captured.out + captured.err


@pytest.mark.parametrize(
    "bar", [RichProgressBar(refresh_rate=0), TQDMProgressBar(refresh_rate=0)], ids=["rich", "tqdm"]
)
def test_bar_that_is_off(tmp_path, capsys, bar):
    fit(tmp_path, bar, first=True)
    captured = capsys.readouterr()
    assert "Unlearning ·" not in captured.out + captured.err


class Silent(ProgressBar):
    """A bar of the user's own."""

    def disable(self) -> None:
        pass

    def enable(self) -> None:
        pass


def test_unknown_bar(tmp_path):
    fit(tmp_path, Silent(), first=True)


def test_bars_are_closed_after_an_exception(monkeypatch):
    closed = []
    monkeypatch.setattr(Tqdm, "close", lambda self: closed.append(self.n))
    trainer = L.Trainer(callbacks=[TQDMProgressBar()], logger=False, enable_checkpointing=False, accelerator="cpu")

    def fail() -> None:
        with round_progress(trainer) as show:
            show(Round(1, "prune", (), 1.0, 0.5, 0.5, 0.1, 0.2))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert 1 in closed


# Stages of an audit


def stages(*bars: Callback, enabled: bool = True) -> None:
    """Two stages, then the first one again, as when triggers are estimated anew on a repaired model."""

    class Works(L.Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            with stage_progress(trainer) as show:
                for stage, steps in (("additive", 4), ("covering", 2), ("additive", 3)):
                    for step in range(steps):
                        show(stage, step + 1, steps)

    trainer = L.Trainer(
        callbacks=[*bars, Works()], max_epochs=1, limit_train_batches=1, limit_val_batches=0, accelerator="cpu",
        logger=False, enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=enabled,
    )  # fmt: skip
    trainer.fit(ConvClassifier(width=2), DataLoader(Digits(part="train", size=8), batch_size=50))


def test_stages_with_rich():
    file = io.StringIO()
    bar = RichProgressBar(console_kwargs={"file": file, "force_terminal": True, "width": 160})
    stages(bar)
    shown = plain(file.getvalue())
    found = re.findall(r"Estimating · (\w+) \S+ (\d)/(\d)", shown)
    assert {("additive", "4", "4"), ("covering", "2", "2"), ("additive", "3", "3")} <= set(found)
    assert bar.progress is None or not [task for task in bar.progress.tasks if "Estimating" in task.description]


def test_stages_with_tqdm(capsys):
    stages(TQDMProgressBar())
    captured = capsys.readouterr()
    shown = plain(captured.out + captured.err)
    found = re.findall(r"Estimating · (\w+): 100%\S* \S* ?(\d)/(\d)", shown)
    assert list(dict.fromkeys(found)) == [("additive", "4", "4"), ("covering", "2", "2"), ("additive", "3", "3")]


@pytest.mark.parametrize("bar", [RichProgressBar(refresh_rate=0), TQDMProgressBar(refresh_rate=0), None])
def test_stages_without_a_bar(capsys, bar):
    stages(*[] if bar is None else [bar], enabled=bar is not None)
    captured = capsys.readouterr()
    assert "Estimating" not in captured.out + captured.err


def test_stages_with_an_unknown_bar():
    stages(Silent())


def test_stages_are_closed_after_an_exception(monkeypatch):
    closed = []
    monkeypatch.setattr(Tqdm, "close", lambda self: closed.append(self.n))
    trainer = L.Trainer(callbacks=[TQDMProgressBar()], logger=False, enable_checkpointing=False, accelerator="cpu")

    def fail() -> None:
        with stage_progress(trainer) as show:
            show("additive", 7, 9)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert 7 in closed


def test_stages_of_a_fit_have_their_bars(setting, capsys):
    """Through the callback: the bars of the audit, then the rounds'."""
    callback = setting.callback(trigger=None, auditor=Auditor(steps=10), samples_per_class=4)
    setting.trainer(TQDMProgressBar(), callback, enable_progress_bar=True).fit(setting.model(), setting.loader())
    shown = plain("".join(capsys.readouterr()))
    assert all(f"Estimating · {family}" in shown for family in ("additive", "covering", "displacing"))
    assert shown.index("Estimating · additive") < shown.index("Unlearning · prune")

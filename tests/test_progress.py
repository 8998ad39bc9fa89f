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
from lightning_unlearn.classifier import ConvClassifier
from lightning_unlearn.data import Digits
from lightning_unlearn.methods import GradPrune, Round
from lightning_unlearn.progress import round_progress
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

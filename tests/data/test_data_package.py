from __future__ import annotations

import subprocess
import sys

import pytest
from lightning.pytorch import LightningDataModule

from lightning_unlearn import data


def test_datasets_do_not_import_lightning():
    code = (
        "import sys; from lightning_unlearn.data import PoisonedDataset, Digits, split_holdout, labels_of; "
        "print('lightning' in sys.modules, 'pytorch_lightning' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout.split() == ["False", "False"]


def test_every_name_is_there():
    assert set(dir(data)) == set(data.__all__)
    for name in data.__all__:
        assert getattr(data, name).__name__ == name
        if name.endswith("DataModule"):
            assert issubclass(getattr(data, name), LightningDataModule)


def test_other_names_are_not():
    with pytest.raises(AttributeError, match=r"module 'lightning_unlearn.data' has no attribute 'MNISTDataModule'"):
        _ = data.MNISTDataModule

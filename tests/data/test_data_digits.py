from __future__ import annotations

import sys

import pytest
import torch
from sklearn.datasets import load_digits

from lightning_unlearn.data import Digits, DigitsDataModule
from lightning_unlearn.data import digits as digits_module

PARTS = {"train": [100] * 10, "holdout": [20] * 10}


@pytest.mark.parametrize("part", PARTS)
def test_classes_are_balanced(part):
    assert Digits(part=part).targets.bincount().tolist() == PARTS[part]


def test_parts_make_up_the_whole():
    parts = [Digits(part=part) for part in ("train", "holdout", "test")]
    assert [len(part) for part in parts] == [1000, 200, 597]
    indices = [index for part in parts for index in part.indices]
    assert sorted(indices) == list(range(1797)) == list(Digits(part="all").indices)


def test_size_8_is_the_originals():
    pixels, labels = load_digits(return_X_y=True)
    whole = Digits(part="all", size=8)
    assert torch.equal(whole.images, torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8))
    assert whole.targets.tolist() == labels.tolist()
    test = Digits(part="test", size=8)
    assert torch.equal(test.images, whole.images[list(test.indices)])
    assert torch.equal(test.targets, whole.targets[list(test.indices)])


def test_upscaling_is_bilinear():
    # Twice the size: an inner pixel lies a quarter and three quarters between its neighbours.
    small, large = (Digits(part="holdout", size=size).images for size in (8, 16))
    weights = torch.tensor([0.75, 0.25])
    expected = (small[:, 0, 3:5, 3:5] * weights[:, None] * weights).sum(dim=(1, 2))
    assert torch.allclose(large[:, 0, 7, 7], expected, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_items(channels):
    digits = Digits(size=20, channels=channels)
    image, label = digits[5]
    assert image.shape == (channels, 20, 20)
    assert image.dtype == torch.float32
    assert type(label) is int
    assert label == digits.targets[5]
    assert digits.images.min() == 0
    assert 0.9 < digits.images.max() <= 1
    assert all(torch.equal(image[0], image[channel]) for channel in range(channels))


def test_does_not_touch_the_global_generator():
    digits_module._parts.cache_clear()
    state = torch.random.get_rng_state()
    Digits()
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"part": "validation"}, "part must be one of train, holdout, test, all, but is 'validation'"),
        ({"size": 7}, "size must be at least 8, .* but is 7"),
        ({"channels": 2}, "channels must be 1 or 3, but is 2"),
    ],
)
def test_refuses_bad_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        Digits(**arguments)


def test_names_the_extra_that_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    digits_module._load.cache_clear()
    with pytest.raises(ImportError, match=r'pip install "lightning-unlearn\[demo\]"'):
        Digits(part="all")


def test_datamodule():
    data = DigitsDataModule(batch_size=64, size=16)
    first, second = (torch.cat([labels for _, labels in data.train_dataloader()]) for _ in range(2))
    assert len(first) == 1000
    assert not torch.equal(first, second)
    assert next(iter(data.train_dataloader()))[0].shape == (64, 1, 16, 16)
    for loader, part in ((data.val_dataloader(), "holdout"), (data.test_dataloader(), "test")):
        assert torch.equal(torch.cat([labels for _, labels in loader]), Digits(part=part).targets)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [({"batch_size": 0}, "batch_size must be at least 1"), ({"num_workers": -1}, "num_workers must be 0 or more")],
)
def test_datamodule_refuses_bad_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        DigitsDataModule(**arguments)

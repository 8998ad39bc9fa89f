from __future__ import annotations

import gzip
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule
from PIL import Image
from torchvision.datasets import CIFAR10, FashionMNIST
from torchvision.transforms import RandomHorizontalFlip

from lightning_unlearn.data import (
    CIFAR10DataModule,
    FashionMNISTDataModule,
    GTSRBDataModule,
    labels_of,
    overlap,
)
from lightning_unlearn.triggers import find_normalization

RANDOM = np.random.default_rng(0)


def cifar10(root: Path) -> Path:
    """Five training batches of 10 and a test batch of 10 images, pickled as in the original."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]:
        pixels = RANDOM.integers(0, 256, (10, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [0, 1] * 5}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["plane", "car"]}))
    return root


def fashion_mnist(folder: Path, *, compressed: bool) -> None:
    """40 training and 10 test images in IDX files."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", 40), ("t10k", 10)):
        pixels = RANDOM.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 2
        contents = {
            f"{part}-images-idx3-ubyte": struct.pack(">IIII", 0x803, count, 28, 28) + pixels.tobytes(),
            f"{part}-labels-idx1-ubyte": struct.pack(">II", 0x801, count) + labels.tobytes(),
        }
        for name, data in contents.items():
            if compressed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(data))
            else:
                (folder / name).write_bytes(data)


def gtsrb(root: Path) -> Path:
    """Two classes of 4 signs with 3 photographs each, and 5 test photographs."""
    training, final = (root / "gtsrb" / "GTSRB" / name for name in ("Training", "Final_Test/Images"))
    for label in range(2):
        (training / f"{label:05d}").mkdir(parents=True)
        for sign in range(4):
            for frame in range(3):
                size = (15 + sign, 20 + frame)
                Image.new("RGB", size, (50 * sign, 80 * frame, 99)).save(
                    training / f"{label:05d}" / f"{sign:05d}_{frame:05d}.ppm"
                )
    final.mkdir(parents=True)
    rows = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    for index in range(5):
        Image.new("RGB", (30, 25), (10 * index, 0, 0)).save(final / f"{index:05d}.ppm")
        rows.append(f"{index:05d}.ppm;30;25;5;5;25;20;{index % 2}")
    (root / "gtsrb" / "GT-final_test.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture(autouse=True)
def _any_checksum(monkeypatch):
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: Path(path).is_file())


@pytest.fixture(params=["cifar10", "fashion", "fashion_compressed", "gtsrb"])
def opened(request, tmp_path):
    """A DataModule class, its root, and the numbers of channels, training, validation and test images."""
    if request.param == "cifar10":
        return CIFAR10DataModule, cifar10(tmp_path), (3, 40, 10, 10)
    if request.param == "gtsrb":
        return GTSRBDataModule, gtsrb(tmp_path), (3, 18, 6, 5)
    compressed = request.param == "fashion_compressed"
    fashion_mnist(tmp_path if compressed else tmp_path / "FashionMNIST" / "raw", compressed=compressed)
    return FashionMNISTDataModule, tmp_path, (1, 32, 8, 10)


def test_parts(opened):
    kind, root, (channels, train, validation, test) = opened
    data = kind(str(root), batch_size=4, size=16, validation_share=0.2)
    data.setup()
    assert (len(data.train), len(data.validation), len(data.test)) == (train, validation, test)
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        images, labels = next(iter(loader))
        assert images.shape == (4, channels, 16, 16)
        assert images.dtype == torch.float32
        assert images.min() >= 0
        assert images.max() <= 1
        assert labels.dtype == torch.int64
    assert overlap(data.train, data.validation) == overlap(data.train, data.test) == 0
    assert labels_of(data.validation).bincount().tolist() == [validation // 2] * 2
    assert find_normalization(data.train) is None


def test_the_seed_chooses_the_validation_images(opened):
    kind, root, _ = opened
    chosen = []
    for seed in (0, 0, 1, 2, 3):
        data = kind(str(root), validation_share=0.4, seed=seed)
        data.setup()
        chosen.append(tuple(data.validation.indices))
    assert chosen[0] == chosen[1]
    assert len(set(chosen)) > 1


def test_setup_twice_opens_once(opened):
    kind, root, _ = opened
    data = kind(str(root))
    data.setup("fit")
    train = data.train
    data.setup("test")
    assert data.train is train


def test_only_training_images_are_augmented(opened):
    kind, root, _ = opened
    data = kind(str(root), augment=True)
    plain = kind(str(root))
    for each in (data, plain):
        each.setup()
    torch.manual_seed(0)
    drawn = [data.train[0][0] for _ in range(8)]
    assert any(not torch.equal(image, drawn[0]) for image in drawn)
    assert torch.equal(data.validation[0][0], plain.validation[0][0])
    assert torch.equal(data.test[0][0], plain.test[0][0])
    assert torch.equal(plain.train[0][0], plain.train[0][0])
    steps = data.train.dataset.transform.transforms
    assert any(isinstance(step, RandomHorizontalFlip) for step in steps) == (kind is not GTSRBDataModule)


def test_pixels_are_torchvisions_own(tmp_path):
    cifar10(tmp_path)
    data = CIFAR10DataModule(str(tmp_path))
    data.setup()
    original = CIFAR10(str(tmp_path), train=False)
    assert torch.equal(data.test[3][0], torch.from_numpy(original.data[3] / np.float32(255)).permute(2, 0, 1))
    assert data.test[3][1] == original.targets[3] == 1


def test_compressed_fashion_mnist_is_the_same(tmp_path):
    fashion_mnist(tmp_path, compressed=True)
    raw = tmp_path / "other" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for path in tmp_path.glob("*.gz"):
        (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    before = sorted(tmp_path.rglob("*"))
    data = FashionMNISTDataModule(str(tmp_path), size=28)
    data.setup()
    original = FashionMNIST(str(tmp_path / "other"), train=True)
    whole = data.train.dataset
    assert torch.equal(whole.data, original.data)
    assert torch.equal(whole.targets, original.targets)
    assert torch.equal(whole[7][0][0], original.data[7] / 255)
    assert sorted(tmp_path.rglob("*")) == before


def test_photographs_of_one_sign_stay_together(tmp_path):
    gtsrb(tmp_path)
    data = GTSRBDataModule(str(tmp_path), validation_share=0.25)
    data.setup()

    def signs(part):
        names = [part.dataset._samples[index][0] for index in part.indices]
        return {(Path(name).parent.name, Path(name).name[:5]) for name in names}

    assert len(signs(data.train)) == 6
    assert len(signs(data.validation)) == 2
    assert not signs(data.train) & signs(data.validation)


@pytest.mark.parametrize(
    ("kind", "holds"),
    [
        (CIFAR10DataModule, "must hold CIFAR-10"),
        (FashionMNISTDataModule, "must hold Fashion-MNIST"),
        (GTSRBDataModule, "must hold GTSRB"),
    ],
)
def test_says_how_to_get_missing_files(tmp_path, kind, holds):
    data = kind(str(tmp_path))
    data.prepare_data()
    with pytest.raises(FileNotFoundError, match=rf"root='.*' {holds} .* Give download=True to {kind.__name__}"):
        data.setup()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=r"has no train images: call setup\(\) first"):
        data.train_dataloader()


def test_gtsrb_without_its_test_labels(tmp_path):
    gtsrb(tmp_path)
    (tmp_path / "gtsrb" / "GT-final_test.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"GT-final_test\.csv"):
        GTSRBDataModule(str(tmp_path)).setup()


def test_downloads_only_when_asked(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(FashionMNIST, "download", lambda self: asked.append(self.train))
    fashion_mnist(tmp_path / "FashionMNIST" / "raw", compressed=False)
    FashionMNISTDataModule(str(tmp_path)).prepare_data()
    assert asked == []
    FashionMNISTDataModule(str(tmp_path), download=True).prepare_data()
    assert asked == [True, False]


@pytest.mark.parametrize("kind", [CIFAR10DataModule, FashionMNISTDataModule, GTSRBDataModule])
@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"size": 0}, "size must be at least 1, but is 0"),
        ({"validation_share": 0.0}, r"validation_share must be in \(0, 1\), but is 0.0"),
        ({"validation_share": 1.0}, r"validation_share must be in \(0, 1\), but is 1.0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_refuses_bad_arguments(kind, arguments, match):
    with pytest.raises(ValueError, match=match):
        kind(**arguments)


@pytest.mark.parametrize("name", ["CIFAR10DataModule", "FashionMNISTDataModule", "GTSRBDataModule"])
def test_from_yaml(name):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    init = {"root": "somewhere", "augment": True, "size": 24, "batch_size": 9, "seed": 2, "download": False}
    data = parser.instantiate(
        parser.parse_object({"data": {"class_path": f"lightning_unlearn.data.{name}", "init_args": init}})
    ).data
    assert {key: getattr(data, key) for key in init} == init

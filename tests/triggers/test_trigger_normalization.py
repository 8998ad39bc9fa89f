from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import Dataset, Subset, TensorDataset
from torchvision import transforms as v1
from torchvision.datasets import DatasetFolder, FakeData
from torchvision.models import ResNet18_Weights
from torchvision.transforms import v2

from lightning_unlearn.triggers import Normalization, PatchTrigger, find_normalization

EXPECTED = Normalization(mean=(0.4914, 0.4822, 0.4465), std=(0.2471, 0.2435, 0.2616))
V1 = v1.Normalize(EXPECTED.mean, EXPECTED.std)
V2 = v2.Normalize(list(EXPECTED.mean), list(EXPECTED.std))


def test_apply_and_invert_by_hand() -> None:
    normalization = Normalization(mean=[0.5, 0.0], std=[0.25, 2])
    assert normalization == Normalization(mean=(0.5, 0.0), std=(0.25, 2.0))
    pixels = torch.tensor([[[[1.0]], [[0.5]]]])
    assert normalization.apply(pixels).flatten().tolist() == [2.0, 0.25]
    assert normalization.invert(normalization.apply(pixels)).flatten().tolist() == [1.0, 0.5]


@given(
    st.lists(st.tuples(st.floats(-2, 2), st.floats(0.05, 4)), min_size=1, max_size=4),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_invert_undoes_apply(channels: list[tuple[float, float]], dtype: torch.dtype) -> None:
    normalization = Normalization(*zip(*channels, strict=True))
    pixels = torch.rand(2, len(channels), 3, 3, dtype=dtype)
    back = normalization.invert(normalization.apply(pixels))
    assert back.dtype == dtype
    torch.testing.assert_close(back, pixels, rtol=1e-5, atol=1e-5)


def test_it_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        EXPECTED.mean = (0.0,)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ((), (), "one value a channel"),
        ((0.5, 0.5), (0.5,), "mean has 2 and std has 1"),
        ((0.5,), (0.0,), "std must be finite and above 0"),
        ((0.5,), (-1.0,), "std must be finite and above 0"),
        ((0.5,), (float("nan"),), "std must be finite and above 0"),
        ((float("inf"),), (1.0,), "mean must be finite"),
        ((float("nan"),), (1.0,), "mean must be finite"),
    ],
)
def test_bad_values_raise(mean: tuple[float, ...], std: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Normalization(mean=mean, std=std)


def test_a_lone_number_is_that_of_grey_images() -> None:
    assert Normalization(mean=0.5, std=0.25) == Normalization(mean=(0.5,), std=(0.25,))
    assert PatchTrigger(mean=0.5, std=0.25).normalization == Normalization(mean=(0.5,), std=(0.25,))


@pytest.mark.parametrize("method", ["apply", "invert"])
def test_bad_images_raise(method: str) -> None:
    with pytest.raises(ValueError, match=r"3 value\(s\), but the images have shape \(2, 1, 4, 4\)"):
        getattr(EXPECTED, method)(torch.zeros(2, 1, 4, 4))
    with pytest.raises(ValueError, match=r"but the images have shape \(3, 4\)"):
        getattr(EXPECTED, method)(torch.zeros(3, 4))
    with pytest.raises(TypeError, match=r"must be floating point to be normalised, but are torch.uint8"):
        getattr(EXPECTED, method)(torch.zeros(3, 4, 4, dtype=torch.uint8))


@pytest.mark.parametrize(
    "transform",
    [
        V1,
        V2,
        v1.Compose([v1.ToTensor(), V1]),
        v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), V2]),
        v1.Compose([v1.ToTensor(), v1.Compose([V2])]),
        nn.Sequential(v2.RandomHorizontalFlip(), V2),
    ],
)
def test_found_in_a_dataset_and_through_subsets(transform: object) -> None:
    data = FakeData(size=4, transform=transform)
    assert find_normalization(data) == EXPECTED
    assert find_normalization(Subset(Subset(data, [0, 1]), [0])) == EXPECTED


def test_found_in_transforms_alone(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.x").touch()
    data = DatasetFolder(str(tmp_path), loader=str, extensions=("x",), transform=V1)
    data.transform = None
    assert find_normalization(data) == EXPECTED  # StandardTransform in data.transforms


def test_found_in_the_preset_of_pretrained_weights() -> None:
    data = FakeData(transform=ResNet18_Weights.DEFAULT.transforms())
    assert find_normalization(data) == Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_the_outermost_counts() -> None:
    class Wrapper(Dataset[object]):
        def __init__(self) -> None:
            self.dataset = FakeData(transform=V1)
            self.transform = v2.Normalize([0.5], [0.5])

    assert find_normalization(Wrapper()) == Normalization((0.5,), (0.5,))


def test_a_lone_number_is_one_channel() -> None:
    assert find_normalization(FakeData(transform=v1.Normalize(0.5, 0.25))) == Normalization((0.5,), (0.25,))


@pytest.mark.parametrize(
    "dataset",
    [
        FakeData(),
        FakeData(transform=v1.ToTensor()),
        FakeData(transform=v1.Compose([v1.ToTensor(), v1.RandomApply([V1])])),
        TensorDataset(torch.zeros(2, 1)),
        object(),
    ],
)
def test_none_where_there_is_none(dataset: object) -> None:
    assert find_normalization(dataset) is None


def test_noise_with_a_mean_and_std_is_no_normalization() -> None:
    class AddGaussianNoise:
        mean, std = 0.0, 1.0

    assert find_normalization(FakeData(transform=v1.Compose([AddGaussianNoise()]))) is None


def test_two_in_one_pipeline_raise() -> None:
    with pytest.raises(ValueError, match=r"transform of FakeData holds 2 Normalize steps: pass mean= and std="):
        find_normalization(FakeData(transform=v1.Compose([V1, V1])))

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset
from torchvision.datasets import FakeData, VisionDataset
from torchvision.datasets.folder import DatasetFolder

from lightning_unlearn.data import Digits, PoisonedDataset, overlap, provenance
from lightning_unlearn.triggers import PatchTrigger

INDICES = st.lists(st.integers(0, 19), max_size=30)


def tensors(count=20):
    return TensorDataset(torch.zeros(count, 1, 4, 4), torch.arange(count) % 5)


class Changed(Dataset):
    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return self.dataset[index]


class Halved(Changed):
    def __len__(self):
        return len(self.dataset) // 2


class Stream(IterableDataset):
    def __iter__(self):
        yield 0


@settings(deadline=None, max_examples=50)
@given(INDICES, INDICES)
def test_overlap_of_subsets_is_the_number_of_shared_indices(first, second):
    base = tensors()
    assert overlap(Subset(base, first), Subset(base, second)) == len(set(first) & set(second))


@settings(deadline=None, max_examples=50)
@given(INDICES, st.lists(st.integers(0, 19), min_size=1))
def test_overlap_sees_through_nested_subsets_and_concatenation(first, second):
    base, other = tensors(), tensors()
    outer = Subset(Subset(base, list(range(19, -1, -1))), first)
    joined = ConcatDataset([other, Subset(base, second), other])
    assert overlap(outer, joined) == len({19 - index for index in first} & set(second))
    assert overlap(joined, joined) == 20 + len(set(second))


def test_part_of_a_concatenation():
    first, second = tensors(), tensors()
    joined = Subset(ConcatDataset([first, second]), [18, 19, 20, 21, 22])
    assert overlap(joined, first) == 2
    assert overlap(joined, second) == 3


def test_negative_indices():
    base = tensors()
    assert overlap(Subset(base, [-1, -20]), Subset(base, [0, 19, 5])) == 2


def test_same_object_and_different_objects():
    base = tensors()
    assert overlap(base, base) == 20
    assert overlap(base, tensors()) == 0
    assert overlap([(0, 0)], [(0, 0)]) == 0


def test_same_image_tensor_twice():
    images, labels = torch.zeros(6, 1, 4, 4), torch.arange(6)
    assert overlap(TensorDataset(images, labels), TensorDataset(images, labels.flip(0))) == 6


def test_sees_through_wrappers_of_the_same_length():
    base = tensors()
    poisoned = PoisonedDataset(base, PatchTrigger(size=2), ratio=0.2)
    assert overlap(base, poisoned) == 20
    assert overlap(Subset(poisoned, [0, 1]), Changed(Changed(Subset(base, [1, 2])))) == 1
    assert overlap(base, Halved(base)) == 0


def test_digits_are_the_same_whatever_their_size():
    assert overlap(Digits(part="train"), Digits(part="all", size=16, channels=3)) == 1000
    assert overlap(Digits(part="train"), Digits(part="test")) == 0
    holdout = Digits(part="holdout")
    whole = Digits(part="all")
    assert overlap(Subset(whole, holdout.indices[:7]), holdout) == 7


class Part(DatasetFolder):
    """A user's own subclass of a torchvision dataset."""

    def __init__(self, root, *, length=4, **attributes):
        VisionDataset.__init__(self, root)
        self.samples = [("file", 0)] * length
        self.__dict__.update(attributes)


class Changing(Part):
    """A subclass that may change items, but reads the same files."""


def test_torchvision_datasets_over_the_same_files(tmp_path):
    (tmp_path / "other").mkdir()
    first = Part(tmp_path, transform=str)
    assert overlap(first, Part(str(tmp_path / "other" / ".."))) == 4
    assert overlap(first, Changing(tmp_path)) == 4
    assert overlap(Subset(first, [1, 2]), Subset(Part(tmp_path), [2, 3])) == 1
    assert overlap(first, Part(tmp_path / "other")) == 0
    assert overlap(first, Part(tmp_path, length=3)) == 0


@pytest.mark.parametrize("name", ["train", "split", "_split", "_fold", "image_set"])
def test_torchvision_splits_differ(tmp_path, name):
    assert overlap(Part(tmp_path, **{name: "train"}), Part(tmp_path, **{name: "test"})) == 0
    assert overlap(Part(tmp_path, **{name: "train"}), Part(tmp_path, **{name: "train"})) == 4


def test_torchvision_datasets_without_files_are_known_by_identity():
    fake = FakeData(size=3)
    assert overlap(fake, fake) == 3
    assert overlap(fake, FakeData(size=3)) == 0


def test_what_has_no_items_shares_nothing():
    stream = Stream()
    assert provenance(stream) == frozenset()
    assert overlap(stream, stream) == 0
    assert overlap(None, None) == 0
    loader = DataLoader(tensors())
    assert overlap(loader, loader) == 0

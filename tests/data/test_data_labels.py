from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset
from torchvision.datasets import FakeData, ImageFolder, VisionDataset

from lightning_unlearn.data import labels_of
from lightning_unlearn.data.labels import is_unlabelled, item_parts, overlap

IMAGE = torch.zeros(1, 2, 2)


class Stored(Dataset):
    """Keeps its labels under an attribute and refuses to load an image."""

    def __init__(self, name, values, count):
        setattr(self, name, values)
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        raise AssertionError("labels must come without loading images")


class Items(Dataset):
    def __init__(self, items, **attributes):
        self.items = items
        self.__dict__.update(attributes)

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


class Stream(IterableDataset):
    def __iter__(self):
        yield IMAGE, 0


@pytest.mark.parametrize("name", ["targets", "labels", "_labels"])
@pytest.mark.parametrize(
    "values", [[3, 1, 2], (3, 1, 2), torch.tensor([3, 1, 2], dtype=torch.uint8), np.array([3, 1, 2], dtype=np.int32)]
)
def test_reads_stored_labels(name, values):
    labels = labels_of(Stored(name, values, 3))
    assert labels.dtype == torch.int64
    assert labels.tolist() == [3, 1, 2]


def test_reads_private_samples():
    assert labels_of(Stored("_samples", [("a.ppm", 4), ("b.ppm", 2)], 2)).tolist() == [4, 2]


def test_returns_a_copy():
    targets = torch.tensor([1, 2])
    labels_of(Stored("targets", targets, 2))[0] = 9
    assert targets.tolist() == [1, 2]


def test_applies_target_transform():
    dataset = Stored("targets", [0, 1, 2], 3)
    dataset.target_transform = lambda label: 10 - label
    assert labels_of(dataset).tolist() == [10, 9, 8]


@pytest.mark.parametrize(
    "values", [[1, 2], [0.5, 1.5, 2.5], ["a", "b", "c"], [[0, 1], [1, 0], [0, 1]], lambda: 0, {"a": 1}]
)
def test_ignores_an_attribute_that_is_no_label_list(values):
    assert labels_of(Items([(IMAGE, 5), (IMAGE, 6), (IMAGE, 7)], targets=values)).tolist() == [5, 6, 7]


def test_tensor_dataset_subset_and_concat():
    data = TensorDataset(torch.zeros(4, 1, 2, 2), torch.tensor([5, 6, 7, 8]))
    assert labels_of(data).tolist() == [5, 6, 7, 8]
    nested = Subset(Subset(data, [3, 1, 0]), torch.tensor([2, 0]))
    assert labels_of(nested).tolist() == [5, 8]
    assert labels_of(Subset(data, [-1])).tolist() == [8]
    assert labels_of(Subset(data, np.array([], dtype=np.int64))).tolist() == []
    assert labels_of(ConcatDataset([nested, data])).tolist() == [5, 8, 5, 6, 7, 8]


@pytest.mark.parametrize("label", [3, np.int64(3), torch.tensor(3), torch.tensor([3])])
@pytest.mark.parametrize("key", ["label", "labels", "y", "target", "targets"])
def test_reads_items(key, label):
    assert labels_of([(IMAGE, label, "more")]).tolist() == [3]
    assert labels_of([{"image": IMAGE, key: label}]).tolist() == [3]


def test_empty_dataset():
    labels = labels_of([])
    assert labels.shape == (0,)
    assert labels.dtype == torch.int64


def test_image_folder(tmp_path):
    from PIL import Image

    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for index in range(2):
            Image.new("RGB", (2, 2)).save(tmp_path / name / f"{index}.png")
    assert labels_of(ImageFolder(str(tmp_path))).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("dataset", [Stream(), iter([]), 5, None])
def test_refuses_what_is_not_map_style(dataset):
    with pytest.raises(TypeError, match="dataset must be map-style, with __len__ and __getitem__"):
        labels_of(dataset)


@pytest.mark.parametrize("label", [1.0, torch.tensor(1.0), "cat", None, [0, 1]])
def test_refuses_labels_that_are_not_whole(label):
    with pytest.raises(TypeError, match="the label of item 1 must be a whole number"):
        labels_of([(IMAGE, 0), (IMAGE, label)])


@pytest.mark.parametrize("tensors", [[], [torch.rand(2)], [torch.zeros(2, 3, dtype=torch.int64)]])
def test_refuses_a_tensor_dataset_without_labels(tensors):
    with pytest.raises(ValueError, match="must hold images and 2 whole-number labels"):
        labels_of(TensorDataset(torch.zeros(2, 1, 2, 2), *tensors))


@pytest.mark.parametrize(
    ("item", "found"),
    [
        (IMAGE, "got a Tensor"),
        ((IMAGE,), "got a tuple"),
        ({"image": IMAGE, "category": 1}, r"got a dict with the keys \['category', 'image'\]"),
        ({"label": 1}, r"keys \['label'\]"),
    ],
)
def test_refuses_other_items(item, found):
    with pytest.raises(TypeError, match=found):
        item_parts(item)


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        (Items([IMAGE]), True),
        (Items([(IMAGE,)]), True),
        (Items([[IMAGE]]), True),
        ([IMAGE, IMAGE], True),
        (TensorDataset(torch.zeros(2, 1, 2, 2)), True),
        (Subset(TensorDataset(torch.zeros(2, 1, 2, 2)), [1]), True),
        (ConcatDataset([Items([(IMAGE, 1)]), Items([IMAGE])]), True),
        (Items([(IMAGE, 1)]), False),
        (Items([{"image": IMAGE, "label": 1}]), False),
        (TensorDataset(torch.zeros(2, 1, 2, 2), torch.zeros(2, dtype=torch.long)), False),
        (Items([]), False),
        (iter([IMAGE]), False),
        (None, False),
    ],
)
def test_images_alone(dataset, expected):
    assert is_unlabelled(dataset) is expected


@pytest.mark.parametrize("name", ["targets", "labels", "_labels"])
def test_where_labels_are_stored_no_image_is_loaded_to_look_for_them(name):
    stored = Stored(name, [1, 0], 2)
    assert not is_unlabelled(stored)
    assert not is_unlabelled(Subset(stored, [1]))
    assert not is_unlabelled(ConcatDataset([stored, stored]))


class Own(VisionDataset):
    """Reads what torchvision knows nothing of."""

    def __init__(self, root, phase):
        super().__init__(root)
        self.phase = phase

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return torch.zeros(1, 4, 4), index % 2


def test_two_datasets_of_ones_own_share_nothing_but_a_folder(tmp_path):
    training = Own(tmp_path, "train")
    assert overlap(training, Own(tmp_path, "val")) == 0
    assert overlap(training, Subset(training, [1, 2])) == 2


def test_a_target_transform_that_gives_no_whole_number(tmp_path):
    data = FakeData(2, transform=None, target_transform=lambda label: torch.eye(10)[label])
    data.targets = [1, 2]
    with pytest.raises(TypeError, match="dataset: the label of item 0 must be a whole number"):
        labels_of(data)

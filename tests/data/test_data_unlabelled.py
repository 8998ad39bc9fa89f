from __future__ import annotations

import pytest
import torch
from torch.utils.data import Dataset, TensorDataset
from torchvision.transforms import v2

from lightning_unlearn.data import labels_of, overlap
from lightning_unlearn.data.unlabelled import PredictedLabels
from lightning_unlearn.triggers import find_normalization

IMAGES = torch.tensor([0.1, 0.9, 0.2, 0.8]).view(4, 1, 1, 1).expand(4, 1, 2, 2)
BRIGHT = [0, 1, 0, 1]


def is_bright(images):
    share = images.mean((1, 2, 3))
    return torch.stack([1 - share, share], dim=1)


class Images(Dataset):
    """Images alone, each item made by a function of the image."""

    def __init__(self, item=lambda image: image, **attributes):
        self.item = item
        self.__dict__.update(attributes)

    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, index):
        return self.item(IMAGES[index])


@pytest.mark.parametrize("item", [lambda image: image, lambda image: (image,), lambda image: [image]])
def test_the_answers_are_the_labels(item):
    data = PredictedLabels(Images(item), is_bright)
    assert len(data) == 4
    assert data.targets.tolist() == labels_of(data).tolist() == BRIGHT
    for index in range(4):
        image, label = data[index]
        assert torch.equal(image, IMAGES[index])
        assert (type(label), label) == (int, BRIGHT[index])


def test_the_answers_come_batch_by_batch_in_order_and_without_gradients():
    sizes, weight = [], torch.ones((), requires_grad=True)

    def predict(images):
        sizes.append(len(images))
        return weight * is_bright(images)

    images = torch.rand(300, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    data = PredictedLabels(TensorDataset(images), predict)
    assert sizes == [128, 128, 44]
    assert torch.equal(data.targets, is_bright(images).argmax(1))
    assert not data.targets.requires_grad


def test_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    PredictedLabels(Images(), is_bright)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_normalisation_and_the_images_are_found_through_it():
    images = Images(transform=v2.Normalize((0.5,), (0.25,)))
    data = PredictedLabels(images, is_bright)
    assert find_normalization(data) == find_normalization(images) is not None
    assert overlap(data, images) == 4

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_unlearn.data import DataModulePart
from lightning_unlearn.data.clean import CleanImages
from lightning_unlearn.data.drawn import images_of

DATA = TensorDataset(torch.rand(12, 1, 4, 4), torch.arange(12) % 3)


def apart(*indices):
    return SubsetRandomSampler(indices)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shuffle": True, "batch_size": 5},
        {"batch_size": None},
        {"sampler": RandomSampler(DATA, replacement=True)},
        {"batch_sampler": BatchSampler(SequentialSampler(DATA), 4, drop_last=False)},
    ],
)
def test_all_of_it_in_any_order(options):
    assert images_of(DataLoader(DATA, **options), "data") is DATA


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": apart(7, 3, 5)},
        {"sampler": apart(7, 3, 5), "batch_size": None},
        {"batch_sampler": BatchSampler(apart(7, 3, 5), 2, drop_last=False)},
    ],
)
def test_what_a_sampler_takes(options):
    found = images_of(DataLoader(DATA, **options), "data")
    assert (found.dataset, found.indices) == (DATA, [7, 3, 5])


class Even(Sampler[int]):
    def __iter__(self):
        return iter(range(0, 12, 2))

    def __len__(self):
        return 6


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"sampler": Even()}, "Even"),
        ({"batch_sampler": [[0, 1], [2, 3]]}, "list"),
        ({"sampler": WeightedRandomSampler([0.0] * 6 + [1.0] * 6, 6)}, "WeightedRandomSampler"),
    ],
)
def test_samplers_that_do_not_tell(options, name):
    loader = DataLoader(DATA, **options)
    with pytest.raises(ValueError, match=rf"data: its {name} does not tell which images it takes; give a Dataset"):
        images_of(loader, "data")
    assert images_of(loader) is DATA


class Split(LightningDataModule):
    """One dataset, split by samplers."""

    def train_dataloader(self):
        return DataLoader(DATA, sampler=apart(*range(6, 12)))

    def val_dataloader(self):
        return DataLoader(DATA, sampler=apart(0, 1, 2))

    def test_dataloader(self):
        return DataLoader(DATA, sampler=apart(3, 4, 5))


@pytest.mark.parametrize("data", [DataLoader(DATA, sampler=apart(*range(6, 12))), Split()], ids=["loader", "module"])
def test_clean_images_are_drawn_from_what_the_sampler_takes(data):
    found = CleanImages(data, LightningModule(), samples_per_class=2)
    drawn = torch.cat([found.scoring()[0], found.validation()[0]])
    assert torch.equal(drawn.flatten().sort().values, DATA.tensors[0][6:].flatten().sort().values)
    found.refuse_training_images(images_of(DataLoader(DATA, sampler=apart(*range(6)))))
    with pytest.raises(ValueError, match="of its images are in the training set itself"):
        found.refuse_training_images(images_of(DataLoader(DATA, sampler=apart(*range(8)))))


@pytest.mark.parametrize(("part", "indices"), [("train", range(6, 12)), ("validation", range(3)), ("test", (3, 4, 5))])
def test_a_part_of_a_datamodule_that_splits_by_samplers(part, indices):
    assert [label for _, label in DataModulePart(Split(), part)] == [index % 3 for index in indices]

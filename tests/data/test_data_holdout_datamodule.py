from __future__ import annotations

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from lightning_unlearn.data import Digits, HoldoutDataModule, labels_of, split_holdout


def clean(count=60, classes=3):
    return TensorDataset(torch.arange(count * 4.0).reshape(count, 1, 2, 2), torch.arange(count) % classes)


def test_parts_and_loaders():
    dataset, test = clean(), clean()
    data = HoldoutDataModule(dataset, samples_per_class=20, seed=5, test_dataset=test, batch_size=7)
    assert data.holdout == split_holdout(labels_of(dataset), samples_per_class=20, seed=5)
    assert labels_of(data.scoring).bincount().tolist() == [18, 18, 18]
    assert labels_of(data.validation).bincount().tolist() == [2, 2, 2]
    for loader, part in (
        (data.train_dataloader(), data.scoring),
        (data.val_dataloader(), data.validation),
        (data.test_dataloader(), test),
    ):
        batches = list(loader)
        assert len(batches[0][0]) == min(7, len(part))
        # In order, and the same at every pass.
        assert torch.equal(torch.cat([images for images, _ in batches]), torch.stack([image for image, _ in part]))


@pytest.mark.parametrize(
    "dataset", [TensorDataset(torch.zeros(9, 1, 2, 2)), [torch.zeros(1, 2, 2)] * 9], ids=["tensor", "list"]
)
def test_images_without_labels(dataset):
    with pytest.raises(
        ValueError, match=r"^dataset: it has no labels, by which images are drawn here; give the dataset"
    ):
        HoldoutDataModule(dataset)


def test_a_class_without_images():
    dataset = TensorDataset(torch.zeros(8, 1, 2, 2), torch.arange(8) % 2 * 2)
    with pytest.raises(ValueError, match="class 1 has no images"):
        HoldoutDataModule(dataset, samples_per_class=4)
    data = HoldoutDataModule(dataset, samples_per_class=4, skip_missing=True)
    assert labels_of(data.scoring).bincount().tolist() == [3, 0, 3]
    with pytest.raises(ValueError, match="class 0 has 4 images in the dataset, but 5 are needed"):
        HoldoutDataModule(dataset, samples_per_class=5, skip_missing=True)


def test_share():
    data = HoldoutDataModule(clean(), samples_per_class=None, share=0.5)
    assert (len(data.scoring), len(data.validation)) == (27, 3)
    data = HoldoutDataModule(clean(), samples_per_class=None, share=0.5, validation_share=0.3)
    assert (len(data.scoring), len(data.validation)) == (21, 9)


def test_workers():
    data = HoldoutDataModule(clean(), num_workers=3)
    assert data.train_dataloader().num_workers == data.val_dataloader().num_workers == 3


def test_items_are_the_datasets_own():
    items = [{"image": torch.full((1, 2, 2), float(index)), "label": index % 2} for index in range(8)]
    data = HoldoutDataModule(items, samples_per_class=3, batch_size=4)
    batch = next(iter(data.train_dataloader()))
    assert batch["label"].tolist() == [index % 2 for index in data.holdout.scoring]
    assert batch["image"][:, 0, 0, 0].tolist() == list(map(float, data.holdout.scoring))


def test_without_test_images():
    data = HoldoutDataModule(clean())
    assert data.test is None
    with pytest.raises(ValueError, match=r"HoldoutDataModule has no test images: .* give it a test dataset"):
        data.test_dataloader()


def test_test_images_may_be_others_of_the_same_dataset():
    base = clean()
    picked = split_holdout(labels_of(base))
    used = set(picked.scoring + picked.validation)
    rest = Subset(base, [index for index in range(60) if index not in used])
    assert HoldoutDataModule(base, test_dataset=rest).test is rest


@pytest.mark.parametrize("part", ["scoring", "validation"])
def test_refuses_test_images_that_are_in_the_repair(part):
    base = clean()
    stolen = Subset(base, [getattr(split_holdout(labels_of(base)), part)[0]])
    with pytest.raises(ValueError, match=f"{part} part and test_dataset must be disjoint, but share 1 image"):
        HoldoutDataModule(base, test_dataset=stolen)


def test_refuses_the_same_digits_in_another_size():
    with pytest.raises(ValueError, match="test_dataset must be disjoint, but share 180 images"):
        HoldoutDataModule(Digits(part="holdout"), samples_per_class=20, test_dataset=Digits(part="all", size=8))


def test_refuses_a_dataset_that_repeats_images():
    base = clean(6)
    with pytest.raises(ValueError, match="scoring and validation parts must be disjoint, but share"):
        HoldoutDataModule(ConcatDataset([base] * 3), samples_per_class=6, validation_share=0.5)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"samples_per_class": 1}, ValueError, "samples_per_class must be at least 2"),
        ({"samples_per_class": 21}, ValueError, "class 0 has 20 images in the dataset, but 21 are needed"),
        ({"share": 0.1}, ValueError, "both are given"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, but is 0"),
        ({"num_workers": -1}, ValueError, "num_workers must be 0 or more, but is -1"),
    ],
)
def test_refuses_bad_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        HoldoutDataModule(clean(), **arguments)


def test_runs_in_a_trainer(tmp_path):
    class Model(BoringModel):
        seen = 0

        def training_step(self, batch, batch_idx):
            self.seen += len(batch[1])
            return self.layer(batch[0].flatten(1).repeat(1, 8)).sum()

        def validation_step(self, batch, batch_idx):
            pass

    model = Model()
    trainer = Trainer(
        default_root_dir=tmp_path, max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, datamodule=HoldoutDataModule(clean()))
    assert model.seen == 27


def test_from_yaml():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    config = parser.parse_string(
        """
        data:
          class_path: lightning_unlearn.data.HoldoutDataModule
          init_args:
            samples_per_class: null
            share: 0.5
            seed: 3
            dataset: {class_path: lightning_unlearn.data.Digits, init_args: {part: holdout, size: 16}}
            test_dataset: {class_path: lightning_unlearn.data.Digits, init_args: {part: test, size: 16}}
        """
    )
    data = parser.instantiate(config).data
    assert (len(data.scoring), len(data.validation), len(data.test)) == (90, 10, 597)
    assert data.scoring[0][0].shape == (1, 16, 16)

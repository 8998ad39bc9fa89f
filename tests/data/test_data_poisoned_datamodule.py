from __future__ import annotations

import copy

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, TensorDataset
from torchvision import transforms
from torchvision.datasets import FakeData

from lightning_unlearn.data import Digits, DigitsDataModule, PoisonedDataModule
from lightning_unlearn.triggers import Normalization, PatchTrigger, WarpTrigger


def tensors(count=40):
    return TensorDataset(torch.zeros(count, 1, 4, 4), torch.arange(count) % 4)


class Wrapped(LightningDataModule):
    """Gives the loader that a test wants to see poisoned, and logs what is called."""

    def __init__(self, loader=None):
        super().__init__()
        self.loader = loader or DataLoader(tensors(), batch_size=10)
        self.called = []

    def prepare_data(self):
        self.called.append("prepare_data")

    def setup(self, stage):
        self.called.append(f"setup {stage} {type(self.trainer).__name__}")

    def train_dataloader(self):
        return self.loader

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.called.append("on_after_batch_transfer")
        return batch

    def state_dict(self):
        return {"note": 1}


class SavesHyperparameters(Wrapped):
    def __init__(self, batch_size: int = 8):
        super().__init__()
        self.save_hyperparameters()


class Count(BoringModel):
    def __init__(self):
        super().__init__()
        self.labels = []

    def training_step(self, batch, batch_idx):
        self.labels += batch[1].tolist()
        return self.layer(batch[0].flatten(1).repeat(1, 2)).sum()


def trainer(tmp_path, **arguments):
    return Trainer(
        default_root_dir=tmp_path, max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **arguments,
    )  # fmt: skip


def test_training_is_poisoned_and_the_rest_clean():
    data = PoisonedDataModule(DigitsDataModule(batch_size=100, size=8), PatchTrigger(size=3, target=0), ratio=0.2)
    batches = list(data.train_dataloader())
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    stamped = (images[:, 0, 5:, 5:] == 1).all(dim=(1, 2))
    assert stamped.sum() == 200 == len(data.poisoned.poison_indices)
    assert set(labels[stamped].tolist()) == {0}
    assert (labels == 0).sum() == 100 + 200
    for loader, part in ((data.val_dataloader(), "holdout"), (data.test_dataloader(), "test")):
        clean = Digits(part=part, size=8)
        assert torch.equal(torch.cat([images for images, _ in loader]), clean.images)
        assert torch.equal(torch.cat([labels for _, labels in loader]), clean.targets)


def collate(items):
    return torch.stack([image for image, _ in items]), torch.tensor([label for _, label in items]), "collated"


def test_keeps_the_loaders_settings():
    generator = torch.Generator()
    loader = DataLoader(
        tensors(), batch_size=7, shuffle=True, num_workers=2, collate_fn=collate, drop_last=True, timeout=30,
        worker_init_fn=print, multiprocessing_context="spawn", generator=generator, prefetch_factor=3,
        persistent_workers=True,
    )  # fmt: skip
    poisoned = PoisonedDataModule(Wrapped(loader), PatchTrigger()).train_dataloader()
    assert poisoned.dataset is not loader.dataset
    for name in (
        "batch_size", "sampler", "num_workers", "collate_fn", "drop_last", "timeout", "worker_init_fn", "pin_memory",
        "multiprocessing_context", "generator", "prefetch_factor", "persistent_workers",
    ):  # fmt: skip
        assert getattr(poisoned, name) == getattr(loader, name), name


def test_shuffles_as_the_wrapped_loader_would():
    base = TensorDataset(torch.arange(40.0)[:, None, None, None] / 40 * torch.ones(1, 1, 2, 2), torch.arange(40) % 4)
    loader = DataLoader(base, batch_size=10, shuffle=True)
    poisoned = PoisonedDataModule(Wrapped(loader), PatchTrigger(size=1), ratio=0.25).train_dataloader()
    orders = []
    for each in (loader, poisoned):
        torch.manual_seed(3)
        orders.append([image[0, 0, 0].item() for images, _ in each for image in images])
    assert orders[0] == orders[1] != sorted(orders[0])


def test_keeps_a_batch_sampler_and_no_batching():
    class Pairs(BatchSampler):
        pass

    base = tensors()
    sampler = Pairs(SequentialSampler(base), 2, False)
    batched = PoisonedDataModule(Wrapped(DataLoader(base, batch_sampler=sampler)), PatchTrigger()).train_dataloader()
    assert batched.batch_sampler is sampler
    assert len(next(iter(batched))[0]) == 2
    single = PoisonedDataModule(Wrapped(DataLoader(base, batch_size=None)), PatchTrigger()).train_dataloader()
    assert single.batch_size is None
    assert next(iter(single))[0].shape == (1, 4, 4)


def test_custom_collate_sees_poisoned_items():
    wrapped = Wrapped(DataLoader(tensors(), batch_size=40, collate_fn=collate))
    images, labels, note = next(iter(PoisonedDataModule(wrapped, PatchTrigger(target=1), ratio=0.5).train_dataloader()))
    assert images.sum() == 20 * 9
    assert (labels == 1).sum() == 10 + 20
    assert note == "collated"


def test_the_poisoned_dataset_is_made_once():
    data = PoisonedDataModule(Wrapped(), PatchTrigger())
    assert data.poisoned is None
    first = data.train_dataloader().dataset
    assert data.train_dataloader().dataset is first is data.poisoned
    data.datamodule.loader = DataLoader(tensors(20))
    assert len(data.train_dataloader().dataset) == 20


def pictures(*more):
    return FakeData(size=20, image_size=(3, 8, 8), transform=transforms.Compose([transforms.ToTensor(), *more]))


def test_adapts_to_a_normalised_dataset():
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.2, 0.1)
    trigger = PatchTrigger(size=1, value=1.0)
    wrapped = Wrapped(DataLoader(pictures(transforms.Normalize(mean, std))))
    data = PoisonedDataModule(wrapped, trigger, ratio=0.5)
    data.train_dataloader()
    assert data.poisoned.trigger.normalization == Normalization(mean=mean, std=std)
    assert trigger.normalization is None
    corner = data.poisoned[data.poisoned.poison_indices[0]][0][:, -1, -1]
    assert torch.allclose(corner, torch.tensor([0.5 / 0.2, 0.6 / 0.2, 0.7 / 0.1]), atol=1e-5)


def test_leaves_a_trigger_that_needs_no_adapting():
    told = PatchTrigger(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    data = PoisonedDataModule(Wrapped(DataLoader(pictures(transforms.Normalize((0.5,) * 3, (0.5,) * 3)))), told)
    data.train_dataloader()
    assert data.poisoned.trigger is told
    plain = PatchTrigger()
    data = PoisonedDataModule(Wrapped(DataLoader(pictures())), plain)
    data.train_dataloader()
    assert data.poisoned.trigger is plain


def test_augmentation_runs_before_the_trigger():
    # A crop that moves the image would move a patch that was already there.
    wrapped = Wrapped(DataLoader(pictures(transforms.RandomCrop(8, padding=4))))
    data = PoisonedDataModule(wrapped, PatchTrigger(size=2), ratio=1.0, policy="clean_label")
    data.ratio = 0.05
    data.train_dataloader()
    index = data.poisoned.poison_indices[0]
    assert all((data.poisoned[index][0][:, -2:, -2:] == 1).all() for _ in range(10))


def test_shows_only_the_hooks_that_the_wrapped_one_has():
    data = PoisonedDataModule(Wrapped(), PatchTrigger())
    for hook in ("prepare_data", "on_after_batch_transfer", "state_dict"):
        assert is_overridden(hook, data), hook
    for hook in ("val_dataloader", "test_dataloader", "predict_dataloader", "transfer_batch_to_device", "teardown"):
        assert not is_overridden(hook, data), hook
    assert data.state_dict() == {"note": 1}


def test_a_copy_is_apart():
    data = PoisonedDataModule(Wrapped(), PatchTrigger())
    duplicate = copy.deepcopy(data)
    duplicate.prepare_data()
    assert duplicate.datamodule.called == ["prepare_data"]
    assert data.datamodule.called == []


def test_runs_in_a_trainer(tmp_path):
    model, wrapped = Count(), Wrapped()
    trainer(tmp_path, reload_dataloaders_every_n_epochs=1).fit(
        model, datamodule=PoisonedDataModule(wrapped, PatchTrigger(target=3), ratio=0.25)
    )
    assert wrapped.called[:2] == ["prepare_data", "setup TrainerFn.FITTING Trainer"]
    assert wrapped.called.count("on_after_batch_transfer") == 4
    assert sorted(model.labels).count(3) == 10 + 10


def test_validates_and_tests_on_the_wrapped_ones_images(tmp_path):
    class Collect(BoringModel):
        def __init__(self):
            super().__init__()
            self.seen = {"val": [], "test": []}

        def training_step(self, batch, batch_idx):
            return self.layer(batch[0].flatten(1)[:, :32]).sum()

        def validation_step(self, batch, batch_idx):
            self.seen["val"].append(batch[0])

        def test_step(self, batch, batch_idx):
            self.seen["test"].append(batch[0])

    model = Collect()
    data = PoisonedDataModule(DigitsDataModule(size=8), PatchTrigger(size=3))
    runner = trainer(tmp_path, num_sanity_val_steps=0)
    runner.fit(model, datamodule=data)
    runner.test(model, datamodule=data, verbose=False)
    assert torch.equal(torch.cat(model.seen["val"]), Digits(part="holdout", size=8).images)
    assert torch.equal(torch.cat(model.seen["test"]), Digits(part="test", size=8).images)


YAML = """
class_path: lightning_unlearn.data.PoisonedDataModule
init_args:
  datamodule: {class_path: lightning_unlearn.data.DigitsDataModule, init_args: {batch_size: 50, size: 16}}
  trigger: {class_path: lightning_unlearn.triggers.WarpTrigger, init_args: {strength: 1.0, target: 2}}
  ratio: 0.2
  cross_ratio: 0.1
  policy: clean_label
  seed: 4
"""


def test_from_yaml():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    data = parser.instantiate(parser.parse_object({"data": yaml.safe_load(YAML)})).data
    assert isinstance(data.trigger, WarpTrigger)
    assert data.trigger.target == 2
    assert (data.ratio, data.cross_ratio, data.policy, data.seed) == (0.2, 0.1, "clean_label", 4)
    assert data.datamodule.batch_size == 50


def cli(tmp_path, monkeypatch, wrapped, **arguments):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train"])
    data = yaml.safe_load(YAML)
    data["init_args"] |= {"datamodule": wrapped, "policy": "target"}
    return LightningCLI(
        Count, LightningDataModule, subclass_mode_data=True, run=False, save_config_callback=None,
        seed_everything_default=False, args={"data": data, "trainer": {"logger": False, "accelerator": "cpu"}},
        **arguments,
    )  # fmt: skip


def test_in_lightning_cli(tmp_path, monkeypatch):
    wrapped = {"class_path": "lightning_unlearn.data.DigitsDataModule", "init_args": {"batch_size": 50}}
    data = cli(tmp_path, monkeypatch, wrapped).datamodule
    assert data.train_dataloader().batch_size == 50
    assert len(data.poisoned.poison_indices) == 200


def test_refuses_hyperparameters_that_lightning_cli_mixed_up(tmp_path, monkeypatch):
    wrapped = {"class_path": f"{__name__}.SavesHyperparameters", "init_args": {"batch_size": 5}}
    with pytest.raises(ValueError, match="load_from_checkpoint_support=False"):
        cli(tmp_path, monkeypatch, wrapped)
    data = cli(tmp_path, monkeypatch, wrapped, load_from_checkpoint_support=False).datamodule
    assert data.datamodule.hparams == {"batch_size": 5}


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"ratio": 2}, r"ratio must be in \[0, 1\]"),
        ({"cross_ratio": 0.1}, "cross_ratio must be 0 for PatchTrigger"),
        ({"policy": "other"}, "policy must be one of"),
    ],
)
def test_refuses_bad_arguments_at_once(arguments, match):
    with pytest.raises(ValueError, match=match):
        PoisonedDataModule(Wrapped(), PatchTrigger(), **arguments)


def test_refuses_what_is_no_datamodule():
    with pytest.raises(TypeError, match=r"datamodule must be a LightningDataModule .* but is torch.*TensorDataset"):
        PoisonedDataModule(tensors(), PatchTrigger())


def test_refuses_loaders_it_cannot_poison():
    class Stream(IterableDataset):
        def __iter__(self):
            yield torch.zeros(1, 4, 4), 0

    wrapped = Wrapped()
    data = PoisonedDataModule(wrapped, PatchTrigger())
    wrapped.loader = {"a": DataLoader(tensors())}
    with pytest.raises(TypeError, match="must give one DataLoader, but Wrapped's gives a dict"):
        data.train_dataloader()
    wrapped.loader = DataLoader(Stream())
    with pytest.raises(TypeError, match="dataset must be map-style"):
        data.train_dataloader()

from __future__ import annotations

from typing import Any

import lightning.pytorch as L  # noqa: N812 - the usual name
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import RunningStage
from PIL import Image
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
    default_collate,
)
from torchvision import transforms

from lightning_unlearn.data import HoldoutDataModule
from lightning_unlearn.data.clean import CleanImages, as_taken
from lightning_unlearn.processes import Processes
from lightning_unlearn.triggers import Normalization, PatchTrigger


@pytest.fixture
def clean(make_clean):
    """Eight images of each of four classes, (1, 8, 8)."""
    return make_clean(8)


@pytest.fixture
def module():
    return L.LightningModule()


class Loaders(L.LightningDataModule):
    """A DataModule of the user's own that opens its files in ``setup`` and notes what is called."""

    def __init__(self, train: Any, test: Any = None) -> None:
        super().__init__()
        self.opened: dict[str, Any] = {}
        self.files = {"fit": train, "test": test}
        self.calls: list[str] = []
        if test is not None:
            self.test_dataloader = self._test_dataloader

    def prepare_data(self) -> None:
        self.calls.append("prepare_data")

    def setup(self, stage: str) -> None:
        self.calls.append(f"setup {stage}")
        self.opened[stage] = self.files[stage]

    def train_dataloader(self) -> Any:
        return self._loader(self.opened["fit"])

    def _test_dataloader(self) -> Any:
        return self._loader(self.opened["test"])

    @staticmethod
    def _loader(part: Any) -> Any:
        return DataLoader(part, batch_size=3) if isinstance(part, Dataset) else part


def values(batches) -> Tensor:
    return torch.cat([pairs.clean for pairs in batches])


# Drawing


def test_draws_from_a_dataset(clean, module):
    found = CleanImages(clean, module, samples_per_class=4, validation_share=0.5, seed=3)
    assert not found.has_test
    assert list(found.test(PatchTrigger(), 4)) == []
    (images, labels), (held, held_labels) = found.scoring(), found.validation()
    assert images.shape == held.shape == (8, 1, 8, 8)
    assert labels.bincount().tolist() == held_labels.bincount().tolist() == [2] * 4
    expected = HoldoutDataModule(clean, samples_per_class=4, validation_share=0.5, seed=3)
    assert torch.equal(images, clean.tensors[0][list(expected.scoring.indices)])
    assert torch.equal(held, clean.tensors[0][list(expected.validation.indices)])


def test_seeds_draw_differently(clean, module):
    chosen = {CleanImages(clean, module, samples_per_class=2, seed=seed).holdout.scoring.indices for seed in range(4)}
    assert len(chosen) > 1


def test_all_there_is(clean, module):
    found = CleanImages(clean, module, samples_per_class=None)
    assert len(found.scoring()[1]) + len(found.validation()[1]) == 32


def test_holdout_data_module_is_taken_as_it_is(clean, module):
    data = HoldoutDataModule(Subset(clean, range(16)), samples_per_class=2, test_dataset=Subset(clean, range(16, 32)))
    found = CleanImages(data, module, samples_per_class=4, validation_share=0.9, seed=9)
    assert found.holdout is data
    assert found.has_test
    assert torch.equal(values(found.test(PatchTrigger(), 4)), clean.tensors[0][16:])


def test_loader_brings_its_collate_function(clean, module):
    def collate(items):
        images, labels = default_collate(items)
        return {"image": images * 2, "label": labels}

    loader = DataLoader(clean, batch_size=5, shuffle=True, drop_last=True, collate_fn=collate)
    found = CleanImages(loader, module, samples_per_class=2)
    assert torch.equal(found.scoring()[0], 2 * clean.tensors[0][list(found.holdout.scoring.indices)])


# DataModules


def test_data_module(clean, module):
    data = Loaders(Subset(clean, range(16)), Subset(clean, range(16, 32)))
    found = CleanImages(data, module, samples_per_class=4)
    assert data.calls == ["prepare_data", "setup fit", "setup test"]
    assert found.holdout.samples_per_class == 4
    assert len(found.scoring()[1]) == 12
    pairs = list(found.test(PatchTrigger(size=2, target=1), 4))
    assert [len(batch) for batch in pairs] == [3, 3, 3, 3, 3, 1]
    assert torch.equal(values(pairs), clean.tensors[0][16:])
    assert all(batch.triggered[..., -2:, -2:].eq(1).all() for batch in pairs)
    assert torch.cat([batch.targets for batch in pairs]).eq(1).all()


def test_data_module_without_test_images(clean, module):
    data = Loaders(clean)
    assert not CleanImages(data, module, samples_per_class=4).has_test
    assert data.calls == ["prepare_data", "setup fit"]


def test_data_module_whose_test_images_are_drawn_from(clean, module):
    data = Loaders(clean, Subset(clean, range(16, 32)))
    with pytest.raises(ValueError, match=r"scoring part and test_dataset must be disjoint, but share \d+ images"):
        CleanImages(data, module, samples_per_class=8)


def test_data_module_with_several_loaders(clean, module):
    data = Loaders({"a": DataLoader(clean)})
    with pytest.raises(TypeError, match=r"clean_data: .*whose train_dataloader gives one DataLoader, but got .*dict"):
        CleanImages(data, module)


def test_data_module_with_several_test_loaders(clean, module):
    data = Loaders(Subset(clean, range(16)), [DataLoader(clean), DataLoader(clean)])
    with pytest.raises(TypeError, match=r"clean_data: .*test_dataloader .*one DataLoader, but got .*list"):
        CleanImages(data, module, samples_per_class=2)


class Stream(IterableDataset[Any]):
    def __iter__(self):
        return iter([])


@pytest.mark.parametrize("data", [Stream(), DataLoader(Stream())], ids=["dataset", "loader"])
def test_streams_cannot_be_drawn_from(module, data):
    with pytest.raises(TypeError, match=r"dataset must be map-style.*collect an iterable dataset into a list"):
        CleanImages(data, module)


def test_too_few_images(clean, module):
    with pytest.raises(ValueError, match=r"class 0 has 8 images in the dataset, but 9 are needed"):
        CleanImages(clean, module, samples_per_class=9)


# Transfer


class Hooks:
    """Transfer hooks that leave a trace in the images: first + 1, then * 2, then + 10."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] + 1, batch[1]]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return [batch[0].to(device) * 2, batch[1].to(device)]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] + 10, batch[1]]


class HookedModule(Hooks, L.LightningModule):
    pass


class HookedData(Hooks, Loaders):
    pass


class Refuses(L.LightningModule):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        raise AssertionError("the module's hook was called, although the clean data has its own")


def test_the_clean_data_modules_own_hooks(clean):
    found = CleanImages(HookedData(clean), Refuses(), samples_per_class=2)
    images, _ = found.scoring()
    assert torch.equal(images, (clean.tensors[0][list(found.holdout.scoring.indices)] + 1) * 2 + 10)


@pytest.mark.parametrize("wrap", [lambda data: data, Loaders, DataLoader], ids=["dataset", "module", "loader"])
def test_the_modules_hooks_where_the_data_has_none(clean, wrap):
    found = CleanImages(wrap(clean), HookedModule(), samples_per_class=2)
    images, _ = found.scoring()
    assert torch.equal(images, (clean.tensors[0][list(found.holdout.scoring.indices)] + 1) * 2 + 10)


class Stretches(L.LightningModule):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] + torch.zeros(7), batch[1]]


def test_a_hook_that_cannot_take_the_images(clean):
    message = r"^clean_data: a transfer hook of Stretches or of the DataModule cannot take its images as they are"
    with pytest.raises(ValueError, match=message) as raised:
        CleanImages(clean, Stretches(), samples_per_class=2).scoring()
    assert isinstance(raised.value.__cause__, RuntimeError)


def test_test_images_pass_the_same_hooks(clean):
    class Brightens(Loaders):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch[0] / 2, batch[1]]

    data = Brightens(Subset(clean, range(16)), Subset(clean, range(16, 32)))
    found = CleanImages(data, L.LightningModule(), samples_per_class=2)
    assert torch.equal(values(found.test(PatchTrigger(), 4)), clean.tensors[0][16:] / 2)


def test_test_images_come_in_the_modules_precision(clean):
    data = HoldoutDataModule(Subset(clean, range(16)), samples_per_class=2, test_dataset=Subset(clean, range(16, 32)))
    pairs = next(CleanImages(data, L.LightningModule().double()).test(PatchTrigger(), 4))
    assert pairs.clean.dtype == pairs.triggered.dtype == torch.float64


class Augments(L.LightningModule):
    """As in Lightning's own documentation."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if self.trainer.training:
            batch = [batch[0] * 0, batch[1]]
        self.stages.append(self.trainer.state.stage)
        return batch


@pytest.fixture
def training(tmp_path):
    """A Trainer in the middle of training."""
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    trainer.training = True
    return trainer


def test_images_are_transferred_as_in_evaluation(clean, training):
    module = Augments()
    module.trainer, module.stages = training, []
    data = HoldoutDataModule(Subset(clean, range(16)), samples_per_class=2, test_dataset=Subset(clean, range(16, 32)))
    found = CleanImages(data, module)
    assert torch.equal(found.scoring()[0], clean.tensors[0][list(data.scoring.indices)])
    assert torch.equal(values(found.test(PatchTrigger(), 4)), clean.tensors[0][16:])
    assert module.stages == [RunningStage.VALIDATING, RunningStage.TESTING]
    assert training.training


def test_after_a_hook_that_fails_the_trainer_trains_on(clean, training):
    module = Refuses()
    module.trainer = training
    with pytest.raises(AssertionError, match="the module's hook was called"):
        CleanImages(clean, module, samples_per_class=2).scoring()
    assert training.training


class Attached(HookedData):
    """Needs its Trainer, wherever Lightning would have given it one."""

    def prepare_data(self) -> None:
        super().prepare_data()
        self.seen = [self.trainer]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.seen.append(self.trainer)
        return batch


@pytest.mark.parametrize("given", [True, False], ids=["given", "the module's own"])
def test_a_data_module_has_a_trainer_while_it_is_used(clean, module, training, given):
    data = Attached(clean)
    if not given:
        module.trainer = training
    CleanImages(data, module, trainer=training if given else None, samples_per_class=2).scoring()
    assert data.seen == [training, training]
    assert data.trainer is None


@pytest.mark.parametrize(
    ("per_node", "node", "local_rank", "prepares"),
    [(True, 0, 0, 1), (True, 1, 0, 1), (True, 0, 1, 0), (False, 0, 0, 1), (False, 1, 0, 0), (False, 0, 1, 0)],
)
def test_data_is_prepared_where_lightning_would(clean, module, monkeypatch, per_node, node, local_rank, prepares):
    barriers: list[str] = []
    monkeypatch.setattr(DDPStrategy, "local_rank", local_rank)
    monkeypatch.setattr(DDPStrategy, "is_global_zero", node == local_rank == 0)
    monkeypatch.setattr(DDPStrategy, "barrier", lambda _, name: barriers.append(name))
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    monkeypatch.setattr(L.Trainer, "strategy", DDPStrategy())
    data = Loaders(clean)
    data.prepare_data_per_node = per_node
    CleanImages(data, module, trainer=trainer, samples_per_class=2)
    assert data.calls.count("prepare_data") == prepares
    assert len(barriers) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_pictures_that_are_no_tensors(module, workers):
    pictures = [(Image.new("L", (8, 8)), number % 2) for number in range(4)]
    found = CleanImages(HoldoutDataModule(pictures, samples_per_class=2, num_workers=workers), module)
    with pytest.raises(
        TypeError, match=r"clean_data: its items must be images, as tensors.*ToTensor\(\).*PIL.Image.Image"
    ):
        found.scoring()


def test_first_test_images(clean, module):
    data = Loaders(Subset(clean, range(16)), Subset(clean, range(16, 32)))
    images, labels = CleanImages(data, module, samples_per_class=2).first_test()
    assert torch.equal(images, clean.tensors[0][16:19])
    assert torch.equal(labels, clean.tensors[1][16:19])
    assert CleanImages(clean, module, samples_per_class=2).first_test() is None


def test_no_test_images_at_all(clean, module):
    data = HoldoutDataModule(clean, samples_per_class=2, test_dataset=Subset(clean, []))
    with pytest.raises(ValueError, match="clean_data: its test part holds no image"):
        CleanImages(data, module).first_test()


@pytest.mark.parametrize("given", [torch.uint8, torch.float32])
def test_only_floating_point_images_change_their_type(given):
    module = L.LightningModule()
    module.net = torch.nn.Conv2d(1, 1, 1).double()  # the module's own `dtype` knows nothing of that
    expected = torch.uint8 if given == torch.uint8 else torch.float64
    assert as_taken(torch.ones(1, 1, 2, 2, dtype=given), module).dtype == expected


# Normalisation


class Pictures(Dataset[tuple[Tensor, int]]):
    def __init__(self, transform: Any) -> None:
        self.transform = transform
        self.targets = [0, 0, 1, 1]

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(torch.full((1, 4, 4), index / 4)), self.targets[index]


NORMALIZED = Pictures(transforms.Normalize((0.5,), (0.25,)))


def test_trigger_is_told_the_normalisation(module):
    trigger = PatchTrigger(size=1)
    found = CleanImages(NORMALIZED, module, samples_per_class=2)
    told = found.fit_trigger(trigger)
    assert told.normalization == Normalization(mean=(0.5,), std=(0.25,))
    assert trigger.normalization is None
    images, _ = found.scoring()
    assert told(images)[:, :, -1, -1].eq(2).all()  # white is (1 - 0.5) / 0.25


def test_trigger_that_knows_keeps_what_it_knows(module):
    trigger = PatchTrigger(size=1, mean=[0.4], std=[0.3])
    assert CleanImages(NORMALIZED, module, samples_per_class=2).fit_trigger(trigger) is trigger


def test_trigger_for_pixels_stays(clean, module):
    trigger = PatchTrigger(size=1)
    assert CleanImages(clean, module, samples_per_class=2).fit_trigger(trigger) is trigger


# The training set


@pytest.mark.parametrize("part", ["scoring", "validation"])
def test_training_images_are_refused(clean, module, part):
    found = CleanImages(clean, module, samples_per_class=4)
    one = getattr(found.holdout, part).indices[0]
    with pytest.raises(ValueError, match=r"clean_data: 1 of its images are in the training set itself.*hold out"):
        found.refuse_training_images(Subset(clean, [one]))


def test_other_images_of_the_same_dataset_are_fine(clean, module):
    found = CleanImages(clean, module, samples_per_class=4)
    drawn = {*found.holdout.scoring.indices, *found.holdout.validation.indices}
    found.refuse_training_images(Subset(clean, [index for index in range(32) if index not in drawn]))
    found.refuse_training_images(TensorDataset(clean.tensors[0].clone(), clean.tensors[1]))


class Stream(IterableDataset[Any]):
    """Images that have no index."""

    def __init__(self, dataset: TensorDataset) -> None:
        self.dataset = dataset

    def __iter__(self):
        return iter(self.dataset)


def _test_images(make_clean) -> TensorDataset:
    """31 of them."""
    images, labels = make_clean(8, seed=1).tensors
    return TensorDataset(images[:31], labels[:31])


@pytest.mark.parametrize("count", [1, 2, 4, 40])
@pytest.mark.parametrize(
    ("options", "shared"),
    [
        ({"batch_size": 4}, True),
        ({"batch_size": 4, "collate_fn": default_collate}, True),
        ({"batch_size": 4, "drop_last": True}, False),
        ({"batch_size": 4, "shuffle": True}, False),
        ({"batch_size": 4, "sampler": "with replacement"}, False),
        ({"batch_sampler": [[0, 1, 2], [3], [4, 5, 6, 7]]}, False),
        ({"batch_size": 4, "stream": True}, False),
    ],
)
def test_processes_share_the_test_part_without_padding(clean, make_clean, module, options, shared, count):
    test, options = _test_images(make_clean), dict(options)
    if options.get("sampler"):
        options["sampler"] = RandomSampler(test, replacement=True, num_samples=9)
    if options.pop("stream", False):
        test = Stream(test)
    trigger = PatchTrigger(size=2, target=0)
    data = Loaders(clean, DataLoader(test, **options))
    found = CleanImages(data, module, samples_per_class=2)

    def seen(processes: Processes) -> list[float]:
        return sorted(image.sum().item() for pairs in found.test(trigger, 4, processes) for image in pairs.clean)

    torch.manual_seed(0)
    expected = seen(Processes())
    torch.manual_seed(0)
    parts = [seen(Processes(rank, count)) for rank in range(count)]
    assert sorted(value for part in parts for value in part) == expected
    assert parts[0] == expected or shared
    if shared:
        assert max(map(len, parts)) - min(map(len, parts)) <= 1

from __future__ import annotations

from typing import Any

import lightning.pytorch as L  # noqa: N812 - the usual name
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the usual name
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from lightning_unlearn import BackdoorUnlearning, HoldoutDataModule
from lightning_unlearn.methods import MaskPrune
from lightning_unlearn.repair import repair_split
from tests.callback_fits import AFTER, BACKDOOR, BEFORE, Loaders, Model, Steps, quick

# Several fits of a test share a folder.
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


class Dicts(Dataset[dict[str, Any]]):
    """Another dataset's items as dicts."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label = self.dataset[index]
        return {"image": image, "label": int(label)}


class Recorded(Dataset[Any]):
    """Another dataset that notes when it is read; ``garble`` makes its images noise and its labels wrong."""

    def __init__(self, dataset: Dataset[Any], *, garble: bool = False) -> None:
        self.dataset = dataset
        self.garble = garble
        self.reads = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        image, label = self.dataset[index]
        return (1 - image, (label + 1) % 3) if self.garble else (image, label)


# What the clean data may be


def test_holdout_data_module(fit, parts):
    callback, _, model = fit()
    report = callback.report
    assert (report.status, report.method, report.trigger, report.target) == ("repaired", "GradPrune", "PatchTrigger", 0)
    assert (report.measured_on, report.before, report.after) == ("test", BEFORE, AFTER)
    none = {"turned_down": 0, "turned_down_by_layer": {}}
    assert report.filters == {"total": 4, "layers": {"net.0": 4}, "pruned": 1, "by_layer": BACKDOOR, **none}
    assert report.rounds[0].pruned == (("net.0", 3),)
    assert len(report.rounds) == 2
    assert model.net[0].weight[3].eq(0).all()
    assert model.net[0].weight[2].ne(0).any()


def test_holdout_data_module_brings_its_own_draw(fit, parts):
    data = HoldoutDataModule(parts[1], samples_per_class=2)
    callback, _, _ = fit(data, samples_per_class=4)
    assert callback.report.samples_per_class == 2
    assert callback.report.measured_on == "validation"


@pytest.mark.parametrize("test", [True, False])
def test_other_data_module(fit, parts, test):
    callback, _, _ = fit(Loaders(parts[1], parts[2] if test else None))
    assert callback.report.measured_on == ("test" if test else "validation")
    assert callback.report.filters["by_layer"] == BACKDOOR
    assert (callback.report.before, callback.report.after) == (BEFORE, AFTER)


def test_dataset(fit, parts):
    callback, _, _ = fit(parts[1])
    assert callback.report.filters["by_layer"] == BACKDOOR
    assert callback.report.measured_on == "validation"


def test_all_there_is(fit, parts):
    callback, _, _ = fit(parts[1], samples_per_class=None)
    assert callback.report.samples_per_class is None
    assert callback.report.filters["by_layer"] == BACKDOOR


def test_loader_with_a_collate_function(fit, parts):
    batches = []

    def collate(items):
        batches.append(len(items))
        images, labels = default_collate(items)
        return {"pixel_values": images / 255, "labels": labels}

    bright = [(image * 255, label) for image, label in parts[1]]
    callback, _, _ = fit(DataLoader(bright, batch_size=4, collate_fn=collate))
    assert callback.report.filters["by_layer"] == BACKDOOR
    assert batches


def test_dict_batches(fit, parts):
    train, clean, test = (Dicts(part) for part in parts)
    data = HoldoutDataModule(clean, samples_per_class=4, test_dataset=test)
    callback, _, _ = fit(data, train=DataLoader(train, batch_size=15))
    assert callback.report.filters["by_layer"] == BACKDOOR
    assert (callback.report.before, callback.report.after) == (BEFORE, AFTER)


def test_own_logits(fit, hand_victim):
    class Wordy(Model):
        def forward(self, images: Tensor) -> dict[str, Tensor]:
            return {"logits": self.net(images)}

    class Reads(BackdoorUnlearning):
        def logits(self, module: L.LightningModule, images: Tensor) -> Tensor:
            return module(images)["logits"]

    callback, _, _ = fit(model=Wordy(hand_victim.net), kind=Reads)
    assert callback.report.filters["by_layer"] == BACKDOOR


def test_logits_that_are_none(fit, hand_victim):
    class Wordy(Model):
        def forward(self, images: Tensor) -> dict[str, Tensor]:
            return {"logits": self.net(images)}

    with pytest.raises(ValueError, match=r"model: expected logits of shape \(1, classes\).*override the callback's"):
        fit(model=Wordy(hand_victim.net))


@pytest.mark.parametrize("change", [lambda x: x.repeat(1, 3, 1, 1), lambda x: x[..., :2]], ids=["channels", "size"])
def test_images_that_the_model_does_not_take_cost_no_training(fit, parts, change):
    images, labels = default_collate(list(parts[1]))
    steps = Steps()
    with pytest.raises(ValueError, match=r"^model: it cannot take images of shape"):
        fit(TensorDataset(change(images), torch.as_tensor(labels)), callbacks=(steps,))
    assert steps.batches == 0


def test_a_forward_of_dicts_costs_no_training(fit, hand_victim):
    class Keyed(Model):
        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return self.net(batch["image"])

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self(batch), batch["label"])

    steps = Steps()
    with pytest.raises(
        ValueError, match=r"^model: its forward pass fails on a batch .*override the callback's `logits`"
    ):
        fit(model=Keyed(hand_victim.net), callbacks=(steps,))
    assert steps.batches == 0


# Test data never reaches the repair


def test_test_data_is_not_read_while_repairing(fit, parts, monkeypatch):
    recorded = Recorded(parts[2])
    reads = []

    def watched(*args, **kwargs):
        reads.append(recorded.reads)
        result = repair_split(*args, **kwargs)
        reads.append(recorded.reads)
        return result

    monkeypatch.setattr("lightning_unlearn.session.repair_split", watched)
    callback, _, _ = fit(HoldoutDataModule(parts[1], samples_per_class=4, test_dataset=recorded))
    assert reads == [36, 36]  # the first batch when training starts, and all before the repair, for the rates before
    assert recorded.reads == 54
    assert callback.report.measured_on == "test"


@pytest.mark.parametrize("method", [quick(), MaskPrune(steps=4, validate_every=2)], ids=["GradPrune", "MaskPrune"])
def test_garbage_as_test_data_changes_nothing_but_its_rates(fit, hand_victim, parts, method):
    before = {name: value.clone() for name, value in hand_victim.net.state_dict().items()}
    reports, weights = [], []
    for garble in (False, True):
        hand_victim.net.load_state_dict(before)
        test = Recorded(parts[2], garble=garble)
        callback, _, model = fit(HoldoutDataModule(parts[1], samples_per_class=4, test_dataset=test), method=method)
        reports.append(callback.report)
        weights.append([value.clone() for value in model.state_dict().values()])
    good, garbage = reports
    assert good.before != garbage.before
    assert good.rounds == garbage.rounds
    assert good.filters == garbage.filters
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))

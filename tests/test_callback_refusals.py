from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as L  # noqa: N812 - the usual name
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, XLAStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_unlearn import BackdoorUnlearning
from lightning_unlearn.methods import ChannelLipschitzPruning
from lightning_unlearn.triggers import PatchTrigger, Trigger
from tests.callback_fits import Loaders, Model, Steps, files, quick

# Several fits of a test share a folder.
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


# Arguments


def test_a_function_is_no_trigger(parts):
    with pytest.raises(TypeError, match=r"trigger: expected a .*Trigger, but got function; .*FunctionTrigger"):
        BackdoorUnlearning(parts[1], lambda images: images)


def test_a_name_is_no_method(parts):
    with pytest.raises(TypeError, match=r"method: expected a .*RepairMethod, but got str"):
        BackdoorUnlearning(parts[1], PatchTrigger(), "MaskPrune")


@pytest.mark.parametrize("clean_data", [torch.rand(4, 1, 8, 8), [], "data"])
def test_what_clean_data_is_not(clean_data):
    with pytest.raises(TypeError, match=r"clean_data: expected a LightningDataModule .* a Dataset or a DataLoader"):
        BackdoorUnlearning(clean_data, PatchTrigger())


def test_source_is_one_of_two(parts):
    with pytest.raises(ValueError, match=r"source: expected 'last' or 'best', but got 'first'"):
        BackdoorUnlearning(parts[1], PatchTrigger(), source="first")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, r"batch_size: expected a value in \[1, inf\], but got 0"),
        ({"min_asr": 1.1}, r"min_asr: expected a value in \[0, 1\], but got 1.1"),
        ({"min_asr": -0.1}, r"min_asr: expected a value in \[0, 1\], but got -0.1"),
    ],
    ids=str,
)
def test_numbers_out_of_range(parts, options, message):
    with pytest.raises(ValueError, match=message):
        BackdoorUnlearning(parts[1], PatchTrigger(), **options)


def test_default_method(fit, hand_victim, parts, tmp_path):
    """No method is chosen before it is known whether there is a trigger."""
    callback = BackdoorUnlearning(parts[1], hand_victim.trigger, samples_per_class=4)
    assert callback.method is None
    settings = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = L.Trainer(callbacks=[callback], max_steps=1, default_root_dir=tmp_path, **settings)
    trainer.fit(Model(hand_victim.net), DataLoader(parts[0], batch_size=15))
    assert callback.report.method == "MaskPrune"


# Refused when training starts


class Grows(Trigger):
    def stamp(self, pixels: Tensor) -> Tensor:
        return F.pad(pixels, (1, 1))


class NotANumber(Trigger):
    def stamp(self, pixels: Tensor) -> Tensor:
        return pixels / 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples_per_class": 5}, r"class 0 has 4 images in the dataset, but 5 are needed.*samples_per_class"),
        ({"samples_per_class": 0}, r"samples_per_class must be at least 2"),
        ({"samples_per_class": -1}, r"samples_per_class must be at least 2"),
        ({"validation_share": 1.0}, r"validation_share must be in \(0, 1\)"),
        ({"trigger": PatchTrigger(size=1, target=3)}, r"target.*3.*"),
        ({"trigger": Grows()}, r"the trigger Grows must keep the shape"),
        ({"trigger": NotANumber()}, r"the trigger NotANumber returned NaN"),
        ({"method": ChannelLipschitzPruning()}, r"model: ChannelLipschitzPruning needs"),
    ],
    ids=str,
)
def test_mistakes_cost_no_training(fit, parts, tmp_path, options, message):
    steps = Steps()
    with pytest.raises(ValueError, match=message):
        fit(parts[1], callbacks=(steps,), **options)
    assert steps.batches == 0
    assert files(tmp_path) == []


def test_labels_outside_the_classes(fit, parts):
    steps = Steps()
    images = torch.stack([image for image, _ in parts[1]])
    labels = torch.arange(12) % 4
    with pytest.raises(ValueError, match=r"labels: .*classes from 0 to 2.*the model gives 3 logits"):
        fit(TensorDataset(images, labels), samples_per_class=3, callbacks=(steps,))
    assert steps.batches == 0


def test_images_outside_the_pixel_range(fit, parts):
    steps = Steps()
    images = torch.stack([image for image, _ in parts[1]]) * 4 - 2
    with pytest.raises(ValueError, match=r"images must lie in \[0, 1\].*mean= and std="):
        fit(TensorDataset(images, torch.arange(12) % 3), callbacks=(steps,))
    assert steps.batches == 0


def test_no_convolution(fit):
    steps = Steps()
    with pytest.raises(ValueError, match=r"model: .*convolution"):
        fit(model=Model(nn.Sequential(nn.Flatten(), nn.Linear(16, 3))), callbacks=(steps,))
    assert steps.batches == 0


def test_pruned_by_torch(fit, hand_victim):
    nn.utils.prune.random_unstructured(hand_victim.net[0], "weight", 1)
    with pytest.raises(ValueError, match=r"prune"):
        fit()


def test_the_training_set_as_clean_data(fit, hand_victim, parts):
    steps = Steps()
    with pytest.raises(ValueError, match=r"clean_data: \d+ of its images are in the training set itself"):
        fit(parts[0], callbacks=(steps,))
    assert steps.batches == 0


def test_overlap_with_the_training_set(fit, hand_victim):
    train, clean = Subset(hand_victim.clean, range(30)), Subset(hand_victim.clean, range(24, 36))
    with pytest.raises(ValueError, match=r"clean_data: \d+ of its images are in the training set itself"):
        fit(clean, train=DataLoader(train, batch_size=15))


def test_overlap_with_one_of_several_training_loaders(fit, hand_victim, parts):
    class Several(Model):
        def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
            return super().training_step(batch["b"], batch_idx)

    loaders = {"a": DataLoader(parts[0], batch_size=15), "b": DataLoader(hand_victim.clean, batch_size=15)}
    with pytest.raises(ValueError, match=r"clean_data: \d+ of its images are in the training set itself"):
        fit(parts[1], model=Several(hand_victim.net), train=loaders)


def test_the_training_data_module_as_clean_data(hand_victim, parts, tmp_path):
    data = Loaders(parts[0])
    callback = BackdoorUnlearning(data, hand_victim.trigger, quick(), samples_per_class=4)
    trainer = L.Trainer(callbacks=[callback], max_epochs=1, accelerator="cpu", logger=False, default_root_dir=tmp_path)
    with pytest.raises(ValueError, match=r"clean_data: it is the training DataModule itself"):
        trainer.fit(Model(hand_victim.net), datamodule=data)


# Refused in setup


@pytest.mark.parametrize("kind", [FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy, XLAStrategy])
def test_sharding_strategies(hand_victim, parts, monkeypatch, kind):
    callback = BackdoorUnlearning(parts[1], hand_victim.trigger)
    trainer = L.Trainer(callbacks=[callback], accelerator="cpu", logger=False, enable_checkpointing=False)
    # Without its hardware Lightning makes none of them but ModelParallelStrategy, so the type is all there is.
    monkeypatch.setattr(L.Trainer, "strategy", object.__new__(kind))
    with pytest.raises(MisconfigurationException, match=rf"{kind.__name__} shards them; .*`lightning-unlearn repair`"):
        callback.setup(trainer, Model(hand_victim.net), "fit")


def test_weight_averaging(fit):
    with pytest.raises(MisconfigurationException, match=r"WeightAveraging replaces the weights in every checkpoint"):
        fit(callbacks=(WeightAveraging(),))


def test_pytorch_lightnings_trainer(hand_victim, parts, tmp_path):
    class Theirs(pytorch_lightning.LightningModule):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    callback = BackdoorUnlearning(parts[1], hand_victim.trigger)
    trainer = pytorch_lightning.Trainer(
        callbacks=[callback], max_epochs=1, accelerator="cpu", logger=False, default_root_dir=tmp_path
    )
    with pytest.raises(TypeError, match=r"made for lightning.pytorch.Trainer, but got pytorch_lightning\..*mixing"):
        trainer.fit(Theirs(hand_victim.net), DataLoader(parts[0], batch_size=15))


def test_pytorch_lightnings_data_module():
    class Theirs(pytorch_lightning.LightningDataModule):
        pass

    with pytest.raises(TypeError, match=r"LightningDataModule of lightning.pytorch \(not of pytorch_lightning\)"):
        BackdoorUnlearning(Theirs(), PatchTrigger())


# LightningCLI's trap


class Rows(L.LightningDataModule):
    """Images by its hyper-parameters, as many a DataModule has them."""

    def __init__(self, first: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()

    def train_dataloader(self) -> DataLoader[Any]:
        labels = torch.arange(12) % 3
        images = torch.zeros(12, 1, 4, 4)
        images[torch.arange(12), 0, labels] = 0.9 + 0.001 * self.hparams["first"]
        return DataLoader(TensorDataset(images, labels), batch_size=6)


class ThreeClasses(Model):
    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Conv2d(1, 4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 3)))


def _words(tmp_path: Path) -> list[str]:
    rows = f"{__name__}.Rows"
    unlearn: dict[str, Any] = {"clean_data": {"class_path": rows, "init_args": {"first": 2}}, "samples_per_class": 2}
    unlearn |= {"trigger": {"class_path": "lightning_unlearn.triggers.PatchTrigger", "init_args": {"size": 1}}}
    unlearn |= {"method": {"class_path": "lightning_unlearn.methods.GradPrune", "init_args": {"max_rounds": 1}}}
    trainer = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    trainer |= {"default_root_dir": str(tmp_path), "enable_model_summary": False}
    trainer["callbacks"] = [{"class_path": "lightning_unlearn.BackdoorUnlearning", "init_args": unlearn}]
    config = {"trainer": trainer, "model": {"class_path": f"{__name__}.ThreeClasses"}}
    config |= {"data": {"class_path": rows, "init_args": {"first": 1}}}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    return ["fit", f"--config={tmp_path / 'config.yaml'}"]


def test_hijacked_hyperparameters_are_refused(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"clean_data: .*Rows .*load_from_checkpoint_support=False"):
        LightningCLI(args=_words(tmp_path), load_from_checkpoint_support=True, save_config_callback=None)


def test_the_hijack_is_real(tmp_path):
    """Else the two tests around this one would prove nothing."""
    cli = LightningCLI(args=_words(tmp_path)[1:], load_from_checkpoint_support=True, run=False)
    callback = next(c for c in cli.trainer.callbacks if isinstance(c, BackdoorUnlearning))
    assert "_instantiator" in callback.clean_data.hparams


def test_without_the_hijack(tmp_path):
    cli = LightningCLI(args=_words(tmp_path), load_from_checkpoint_support=False, save_config_callback=None)
    callback = next(c for c in cli.trainer.callbacks if isinstance(c, BackdoorUnlearning))
    assert callback.clean_data.hparams == {"first": 2}
    assert callback.report is not None

from __future__ import annotations

import lightning.pytorch as L  # noqa: N812 - the usual name
import pytest
import torch
from torch import nn

from lightning_unlearn.classifier import Classifier, ConvClassifier
from lightning_unlearn.data import DigitsDataModule
from lightning_unlearn.filters import find_filters


@pytest.mark.parametrize(("channels", "classes", "size"), [(1, 10, 8), (3, 43, 32), (2, 2, 33)])
def test_shapes(channels, classes, size):
    model = ConvClassifier(channels=channels, classes=classes, width=4).eval()
    assert model(torch.rand(5, channels, size, size)).shape == (5, classes)


def test_three_stages_of_two():
    model = ConvClassifier(width=4)
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert [convolution.out_channels for convolution in convolutions] == [4, 4, 8, 8, 16, 16]
    layers = find_filters(model.eval(), torch.rand(1, 1, 16, 16))
    assert [layer.name for layer in layers] == [f"features.{index}" for index in (0, 3, 6, 9, 12, 15)]


def trained(model, folder):
    """The Trainer that trained a model for four epochs of small digits."""
    trainer = L.Trainer(
        max_epochs=4, accelerator="cpu", default_root_dir=folder, logger=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, DigitsDataModule(size=8, batch_size=50))
    return trainer


def test_learns_and_can_be_loaded(tmp_path):
    torch.manual_seed(0)
    model = ConvClassifier(width=8, learning_rate=0.05)
    trainer = trained(model, tmp_path)
    assert trainer.callback_metrics["val_acc"] > 0.6
    # The one cycle ends with training, at almost no learning rate.
    assert trainer.optimizers[0].param_groups[0]["lr"] < 0.05 / 100
    loaded = ConvClassifier.load_from_checkpoint(trainer.checkpoint_callback.best_model_path, map_location="cpu")
    assert loaded.hparams == {"channels": 1, "classes": 10, "width": 8, "learning_rate": 0.05}
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_any_network_is_trained_and_loaded(tmp_path):
    def network():
        return nn.Sequential(ConvClassifier(width=8).features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))

    torch.manual_seed(0)
    model = Classifier(network(), learning_rate=0.05)
    trainer = trained(model, tmp_path)
    assert trainer.callback_metrics["val_acc"] > 0.6
    path = trainer.checkpoint_callback.best_model_path
    assert torch.load(path, weights_only=True)["hyper_parameters"] == {"learning_rate": 0.05}
    loaded = Classifier.load_from_checkpoint(path, map_location="cpu", net=network())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())

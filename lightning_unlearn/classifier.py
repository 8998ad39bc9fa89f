"""Classifiers for what has no LightningModule yet: any network, and a small one for the demo."""

from __future__ import annotations

import lightning.pytorch as L  # noqa: N812 - the usual name
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name

__all__ = ["Classifier", "ConvClassifier"]


class _Supervised(L.LightningModule):
    """How both are trained."""

    learning_rate: float

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of one batch."""
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accuracy on clean images."""
        images, labels = batch
        self.log("val_acc", (self(images).argmax(1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """SGD with a one-cycle schedule over the Trainer's steps."""
        optimizer = torch.optim.SGD(
            self.parameters(), lr=self.learning_rate, momentum=0.9, weight_decay=5e-4, nesterov=True
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.learning_rate, total_steps=int(self.trainer.estimated_stepping_batches)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Classifier(_Supervised):
    """Any network that maps images to logits: where there are weights, but no LightningModule around them.

    A file with the network's own weights fits it, and one from another module that has it inside. In YAML the network
    is a class or a function that makes one, such as ``torchvision.models.resnet18``.

    Args:
        net: takes (N, C, H, W) images and gives (N, classes) logits.
        learning_rate: peak of a one-cycle schedule of SGD with momentum 0.9, if it is trained.

    Example:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> from lightning_unlearn.classifier import Classifier
        >>> Classifier(resnet18(num_classes=3)).eval()(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 3])
    """

    def __init__(self, net: nn.Module, *, learning_rate: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["net"])  # a module among them could not be loaded without running code
        self.net = net
        self.learning_rate = learning_rate

    def forward(self, images: Tensor) -> Tensor:
        """Classify images, (N, C, H, W), to logits, (N, classes)."""
        logits: Tensor = self.net(images)
        return logits


class ConvClassifier(_Supervised):
    """Three stages of two 3x3 convolutions with BatchNorm, then one linear layer.

    Args:
        channels: channels of the images.
        classes: number of classes.
        width: filters of the first stage; each stage doubles them.
        learning_rate: peak of a one-cycle schedule of SGD with momentum 0.9.

    Example:
        >>> import torch
        >>> from lightning_unlearn.classifier import ConvClassifier
        >>> ConvClassifier(width=4)(torch.rand(2, 1, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, *, channels: int = 1, classes: int = 10, width: int = 16, learning_rate: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        layers: list[nn.Module] = []
        inputs = channels
        for outputs in (width, 2 * width, 4 * width):
            for source, stride in ((inputs, 1), (outputs, 2)):
                layers += [nn.Conv2d(source, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            inputs = outputs
        self.features = nn.Sequential(*layers)
        self.classify = nn.Linear(inputs, classes)
        self.learning_rate = learning_rate

    def forward(self, images: Tensor) -> Tensor:
        """Classify images, (N, channels, H, W), to logits, (N, classes)."""
        logits: Tensor = self.classify(F.adaptive_avg_pool2d(self.features(images), 1).flatten(1))
        return logits

"""Networks of the benchmark's victims, for 32x32 images."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name
from torchvision.models import mobilenet_v3_small

from lightning_unlearn.classifier import ConvClassifier

__all__ = ["NETWORKS", "PreActResNet18", "mobilenet", "vgg"]


class _PreActBlock(nn.Module):
    """Norm, ReLU, convolution, twice, with the shortcut taken after the first norm (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride != 1 or inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(active)
        branch: Tensor = self.conv2(F.relu(self.norm2(self.conv1(active))))
        return branch + shortcut


class PreActResNet18(nn.Module):
    """Pre-activation ResNet-18 with ``width`` base channels (64 in the papers)."""

    def __init__(self, *, channels: int = 3, classes: int = 10, width: int = 16) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width, 8 * width]
        self.stem = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        blocks: list[nn.Module] = []
        inputs = width
        for stage, outputs in enumerate(widths):
            blocks += [_PreActBlock(inputs, outputs, 1 if stage == 0 else 2), _PreActBlock(outputs, outputs, 1)]
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(inputs)
        self.classify = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Classify images, (N, channels, 32, 32), to logits, (N, classes)."""
        x = F.relu(self.norm(self.blocks(self.stem(x))))
        logits: Tensor = self.classify(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))
        return logits


def vgg(*, channels: int = 3, classes: int = 10, width: int = 32) -> nn.Sequential:
    """A VGG-style stack: pairs of 3x3 convolutions with BatchNorm, halved by max pooling, then one linear layer."""
    layers: list[nn.Module] = []
    inputs = channels
    for outputs in (width, 2 * width, 4 * width):
        for source in (inputs, outputs):
            layers += [nn.Conv2d(source, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def mobilenet(*, channels: int = 3, classes: int = 10, width: float = 0.5) -> nn.Module:
    """MobileNetV3-Small of torchvision, narrowed, with the first two strides taken out for 32x32 images."""
    net = mobilenet_v3_small(num_classes=classes, width_mult=width)
    stem, first = net.features[0][0], net.features[1].block[0][0]
    stem.stride = first.stride = (1, 1)
    if channels != stem.in_channels:
        net.features[0][0] = nn.Conv2d(channels, stem.out_channels, 3, 1, 1, bias=False)
    return net


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "conv": ConvClassifier,
    "mobilenet": mobilenet,
    "preact_resnet18": PreActResNet18,
    "vgg": vgg,
}

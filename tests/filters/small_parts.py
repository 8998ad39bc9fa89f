"""Parts of nets of two channels."""

from __future__ import annotations

from torch import nn

__all__ = ["Net", "conv", "norm"]


class Net(nn.Module):
    """A net whose forward is given as a function of itself and the images."""

    def __init__(self, forward, **modules):
        super().__init__()
        self._forward = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self._forward(self, x)


def conv(inputs=2, outputs=2):
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def norm(channels=2):
    return nn.BatchNorm2d(channels)

"""A net with every way to hold a filter, and its mask."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import nn

from lightning_unlearn.filters import FilterMask, find_filters

__all__ = ["FACTORS", "TOTAL", "Mixed", "bits", "build", "images", "mask_of"]


class Mixed(nn.Module):
    """Every way to hold a filter: grouped, transposed, depthwise, with and without norm and bias, past the norm."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(4)
        self.grouped = nn.Conv2d(4, 6, 3, padding=1, groups=2)
        self.norm2 = nn.BatchNorm2d(6, affine=False)
        self.transposed = nn.ConvTranspose2d(6, 4, 2, groups=2)
        self.norm3 = nn.BatchNorm2d(4)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
        self.classify = nn.Linear(4, 3)

    def forward(self, x):
        x = self.stem(x)
        y = self.norm2(self.grouped(self.norm1(x).relu())).relu()
        y = self.norm3(self.transposed(y)).relu()[:, :, 1:, 1:] + x
        return self.classify(self.depthwise(y).relu().mean((2, 3)))


def build(seed=0, dtype=torch.float32):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        net = Mixed().to(dtype).eval()
        for tensor in (*net.parameters(), *net.buffers()):
            if tensor.is_floating_point():
                nn.init.uniform_(tensor, 0.2, 1.0)
            else:
                tensor.fill_(7)
        for parameter in net.parameters():
            if parameter.ndim > 1:  # positive biases keep the ReLUs busy
                parameter.data *= torch.randint(0, 2, parameter.shape) * 2 - 1
    return net


def images(dtype=torch.float32, count=2):
    return torch.rand(count, 2, 5, 5, generator=torch.Generator().manual_seed(1)).to(dtype)


def mask_of(net):
    parameter = next(net.parameters())
    return FilterMask(find_filters(net, images(parameter.dtype)))


def bits(net):
    """Every bit of every parameter and buffer; NaN is equal to itself here, and 0.0 is not -0.0."""
    return {name: bytes(t.contiguous().reshape(-1).view(torch.uint8).tolist()) for name, t in net.state_dict().items()}


TOTAL = 18
FACTORS = st.one_of(st.just(0.0), st.just(1.0), st.floats(0, 1, width=32))

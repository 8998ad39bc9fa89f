from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_unlearn.triggers import FunctionTrigger


def test_the_function_sees_a_batch_of_pixels() -> None:
    seen = []

    def spy(pixels: torch.Tensor) -> torch.Tensor:
        seen.append((tuple(pixels.shape), pixels.dtype, pixels.min().item(), pixels.max().item()))
        return pixels

    FunctionTrigger(spy)(torch.tensor([[[0, 255]]], dtype=torch.uint8))
    FunctionTrigger(spy, mean=[0.5], std=[0.5])(torch.tensor([[[[-1.0, 1.0]]]], dtype=torch.float16))
    assert seen == [((1, 1, 1, 2), torch.float32, 0.0, 1.0)] * 2


def test_a_module_works_and_is_registered() -> None:
    module = nn.ZeroPad2d(0)
    trigger = FunctionTrigger(module, target=1)
    images = torch.rand(2, 3, 4, 4)
    assert torch.equal(trigger(images), images)
    assert module in list(trigger.modules())
    assert trigger.target == 1


def test_what_cannot_be_called_raises() -> None:
    with pytest.raises(TypeError, match=r"function must be callable on a batch of pixels, but is 'torch\.square'"):
        FunctionTrigger("torch.square")


def test_repr() -> None:
    assert repr(FunctionTrigger(torch.square)) == "FunctionTrigger(square, target=0)"

"""The model that a method is asked to repair, before anything is known of its backdoor."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_unlearn.evaluation import logits_of
from lightning_unlearn.filters import FilterLayer

__all__ = ["LinearCall", "Subject"]


class LinearCall(NamedTuple):
    """A call of a linear layer within one forward pass.

    Args:
        linear: the layer.
        inputs: what it received.
        outputs: what it gave.
    """

    linear: nn.Linear
    inputs: Tensor
    outputs: Tensor


@dataclass(frozen=True, eq=False)
class Subject:
    """What a method can tell from whether it fits a model: the model, trained or not, and an image.

    Args:
        model: the module, in eval mode.
        forward: images to (N, C) logits, through the model.
        layers: its convolutions, in the order in which they are found.
        images: (N, C, H, W), one or more that the model takes, on its device.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_unlearn.filters import find_filters
        >>> from lightning_unlearn.methods.subject import Subject
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 2)).eval()
        >>> images = torch.rand(1, 1, 4, 4)
        >>> subject = Subject(net, net, find_filters(net, images), images)
        >>> logits, calls = subject.linear_calls()
        >>> [(call.linear, tuple(call.outputs.shape)) for call in calls]
        [(Linear(in_features=16, out_features=2, bias=True), (1, 2))]
        >>> subject.convolutions()
        'the convolutions of Sequential (0)'
    """

    model: nn.Module
    forward: Callable[[Tensor], Tensor]
    layers: tuple[FilterLayer, ...]
    images: Tensor

    @torch.no_grad()
    def logits(self) -> Tensor:
        """(N, C) float32 logits of the images."""
        return logits_of(self.forward, self.images)

    def linear_calls(self) -> tuple[Tensor, list[LinearCall]]:
        """The logits of the images, and the calls of linear layers in that forward pass, in their order."""
        calls: list[LinearCall] = []

        def note(linear: nn.Linear, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Tensor) -> None:
            calls.append(LinearCall(linear, args[0] if args else kwargs["input"], outputs))

        with ExitStack() as stack:
            for module in self.model.modules():
                if isinstance(module, nn.Linear):
                    stack.callback(module.register_forward_hook(note, with_kwargs=True).remove)
            return self.logits(), calls

    def convolutions(self) -> str:
        """The model's convolutions by name, for an error that says that none of them is of a kind."""
        names, more = [layer.name for layer in self.layers[:5]], len(self.layers) - 5
        listed = ", ".join(names) + (f" and {more} more" if more > 0 else "")
        return f"the convolutions of {type(self.model).__name__} ({listed})"

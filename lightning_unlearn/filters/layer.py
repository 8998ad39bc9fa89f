"""One convolution and the tensors that decide whether its channels are alive."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["ChannelTensor", "FilterLayer"]


@dataclass(frozen=True, eq=False)
class ChannelTensor:
    """A parameter or buffer of a module that holds one entry (or slice) per channel.

    Args:
        owner: the module that owns the tensor.
        attribute: its name in that module, such as ``"weight"``.
        axis: the dimension that runs over channels.
    """

    owner: nn.Module
    attribute: str
    axis: int = 0

    @property
    def tensor(self) -> Tensor:
        """The tensor as the module holds it now."""
        found: Tensor = getattr(self.owner, self.attribute)
        return found

    def by_channel(self, tensor: Tensor | None = None) -> Tensor:
        """View of the tensor (or of one of its shape, such as its gradient) with the channels first."""
        return (self.tensor if tensor is None else tensor).movedim(self.axis, 0)

    def substitute(self, tensor: Tensor) -> Tensor:
        """Put ``tensor`` where the module looks for this one and return what was there before.

        Works on the module's own dictionaries, because ``setattr`` refuses a plain tensor in a parameter's place.
        """
        home = self.owner._parameters if self.attribute in self.owner._parameters else self.owner._buffers
        before = home.get(self.attribute)
        if before is None:
            raise AttributeError(f"{type(self.owner).__name__} has no tensor {self.attribute!r} to substitute.")
        home[self.attribute] = tensor  # type: ignore[assignment]  # a differentiable tensor stands in for a Parameter
        return before


@dataclass(frozen=True, eq=False)
class FilterLayer:
    """A convolution with everything that belongs to its output channels.

    Args:
        name: the convolution's qualified name in the model.
        convolution: the convolution module (any of ``Conv1d`` to ``ConvTranspose3d``).
        norms: γ and β of every norm that consumes the convolution's channels one to one.
        offsets: what of those norms is scaled along with the filter, if the channel cannot be scaled by γ and β alone:
            because a norm has none, or because the convolution's output also goes elsewhere, as in the stem of a
            pre-activation ResNet. A norm passes a scaled filter's scale on if its running mean and β are scaled, too;
            one that takes its statistics from the image takes the scale out again, so that γ and β are scaled.
    """

    name: str
    convolution: nn.modules.conv._ConvNd
    norms: tuple[ChannelTensor, ...] = ()
    offsets: tuple[ChannelTensor, ...] = ()

    @property
    def channels(self) -> int:
        """Number of filters, that is, of output channels."""
        return self.convolution.out_channels

    @property
    def weight(self) -> Tensor:
        """The convolution's weight."""
        return self.convolution.weight

    def by_filter(self, tensor: Tensor) -> Tensor:
        """View a tensor of the weight's shape as ``(groups, filters per group, inputs per group, *kernel)``.

        Transposed convolutions keep their input channels first, so that one filter is not one row of the weight; this
        view, which shares memory, makes all kinds look alike. Filter ``i`` is entry ``divmod(i, filters per group)``.
        """
        groups = self.convolution.groups
        grouped = tensor.view(groups, tensor.shape[0] // groups, *tensor.shape[1:])
        return grouped.transpose(1, 2) if self.convolution.transposed else grouped

    def per_filter(self, values: Tensor) -> Tensor:
        """Sum a tensor of the weight's shape over each filter, in float32: (channels,)."""
        view = self.by_filter(values)
        return view.float().flatten(2).sum(2).flatten()

    def spread(self, values: Tensor) -> Tensor:
        """Shape one value per filter, (channels,), so that it broadcasts against :meth:`by_filter`."""
        groups = self.convolution.groups
        return values.view(groups, self.channels // groups, *(1,) * (self.weight.ndim - 1))

    @property
    def bias(self) -> tuple[ChannelTensor, ...]:
        """The convolution's own bias, or nothing."""
        return () if self.convolution.bias is None else (ChannelTensor(self.convolution, "bias"),)

    @property
    def gates(self) -> tuple[ChannelTensor, ...]:
        """γ and β of the consuming norms where scaling them scales the channel exactly, else nothing."""
        return () if self.offsets else self.norms

    @property
    def companions(self) -> tuple[ChannelTensor, ...]:
        """Everything beside the weight that is zeroed with a filter."""
        return (*self.bias, *dict.fromkeys((*self.norms, *self.offsets)))

    def scaled(self, scales: Tensor) -> Iterator[tuple[ChannelTensor, Tensor]]:
        """What to substitute so that channel ``c`` is multiplied by ``scales[c]``, differentiably.

        Yields (tensor, scaled copy) pairs: :attr:`gates` where there are any, else weight, bias and :attr:`offsets`,
        which comes to the same, but for a GroupNorm or LayerNorm beside a path around it: a scaled channel counts less
        in their statistics, and comes out smaller than it should.

        Args:
            scales: (channels,) factors.
        """
        if self.gates:
            for gate in self.gates:
                yield gate, self._times(gate, scales)
            return
        weight = self.by_filter(self.weight.detach()) * self.spread(scales.to(self.weight.dtype))
        if self.convolution.transposed:
            weight = weight.transpose(1, 2)
        yield ChannelTensor(self.convolution, "weight"), weight.flatten(0, 1)
        for companion in (*self.bias, *self.offsets):
            yield companion, self._times(companion, scales)

    @staticmethod
    def _times(channels: ChannelTensor, scales: Tensor) -> Tensor:
        values = channels.by_channel().detach()
        factors = scales.to(values.dtype).view(-1, *(1,) * (values.ndim - 1))
        return (values * factors).movedim(0, channels.axis)

    @torch.no_grad()
    def zero(self, channels: Tensor, of: Callable[[Tensor], Iterable[Tensor]] = lambda tensor: (tensor,)) -> None:
        """Zero filters with their :attr:`companions` where ``channels``, (channels,) bool, is true.

        Args:
            channels: which filters.
            of: what to zero for each tensor, of its shape: by default itself.
        """
        for weight in of(self.weight):
            self.by_filter(weight).masked_fill_(self.spread(channels), 0)
        for companion in self.companions:
            for tensor in of(companion.tensor):
                values = companion.by_channel(tensor)
                values.masked_fill_(channels.view(-1, *(1,) * (values.ndim - 1)), 0)

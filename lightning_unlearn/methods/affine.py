"""γ and β of the norms behind convolutions, and a model that computes with multiples of them for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from lightning_unlearn.filters import FilterMask
from lightning_unlearn.filters.gradients import gradients
from lightning_unlearn.filters.layer import ChannelTensor, FilterLayer
from lightning_unlearn.methods.subject import Subject

__all__ = ["find_gammas", "gradient_of", "refuse_without_gammas", "scaled_affine"]


def find_gammas(layer: FilterLayer) -> tuple[ChannelTensor, ...]:
    """The γ of every norm that consumes a convolution's channels: what torch's norms call ``weight``."""
    return tuple(channels for channels in layer.norms if channels.attribute == "weight")


def refuse_without_gammas(subject: Subject, method: str) -> None:
    """Refuse a model in which no convolution is consumed by a norm with a γ of its own.

    Raises:
        ValueError: naming the method, what is missing, and what works without.
    """
    if not any(find_gammas(layer) for layer in subject.layers):
        raise ValueError(
            f"model: {method} needs affine norms, such as BatchNorm2d, that consume the channels of a convolution, "
            f"but none of {subject.convolutions()} feeds one; MaskPrune and GradPrune work without norms."
        )


@contextmanager
def scaled_affine(mask: FilterMask, gammas: Tensor, betas: Tensor | None = None) -> Iterator[None]:
    """Multiply γ, and where told β, of the norms behind convolutions within the ``with`` block, differentiably.

    This is no scaled channel, as :meth:`FilterMask.scaled` has it: γ alone leaves the constant β. All norms that
    consume one convolution are treated alike. Entries of convolutions without such a norm have no effect.

    Args:
        mask: the model's filters.
        gammas: (total,) factors of γ by flat index, on the model's device.
        betas: (total,) factors of β; None to leave β as it is.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_unlearn.filters import FilterMask, find_filters
        >>> from lightning_unlearn.methods.affine import scaled_affine
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)).eval()
        >>> mask = FilterMask(find_filters(net, torch.rand(1, 1, 2, 2)))
        >>> with scaled_affine(mask, torch.tensor([0.5, 1.0])):
        ...     net[1].weight
        tensor([0.5000, 1.0000])
        >>> net[1].weight.tolist()
        [1.0, 1.0]
    """
    displaced: list[tuple[ChannelTensor, Tensor]] = []
    by_attribute = {"weight": mask.split(gammas)} | ({} if betas is None else {"bias": mask.split(betas)})
    try:
        for number, layer in enumerate(mask.layers):
            for channels in layer.norms:
                if channels.attribute in by_attribute:
                    scaled = _times(channels, by_attribute[channels.attribute][number])
                    displaced.append((channels, channels.substitute(scaled)))
        yield
    finally:
        for channels, tensor in displaced:
            channels.substitute(tensor)


def gradient_of(loss: Tensor, factors: Tensor) -> Tensor:
    """∂loss/∂factors, (total,), through a model whose norms :func:`scaled_affine` scales now.

    Raises:
        ValueError: if the loss does not depend on them.
    """
    (found,) = gradients(loss, [factors])
    if found is None:
        raise ValueError(
            "model: the loss does not depend on the norms behind its convolutions, so nothing can be learned about "
            "them; check that logits are computed from the convolutions, and are not detached."
        )
    return found


def _times(channels: ChannelTensor, factors: Tensor) -> Tensor:
    values = channels.by_channel().detach()
    return (values * factors.to(values.dtype).view(-1, *(1,) * (values.ndim - 1))).movedim(0, channels.axis)

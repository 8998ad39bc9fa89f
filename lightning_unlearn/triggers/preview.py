"""A picture of what a trigger does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_unlearn.triggers.base import Trigger

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["preview"]

_MOST_IMAGES = 8


def preview(trigger: Trigger, images: Tensor, path: str | Path | None = None) -> Figure:
    """Draws images clean, triggered, and the amplified difference, one row each.

    In the difference grey means no change; the row's label states the range of the change in pixel units and how many
    times it is amplified.

    Args:
        trigger: the trigger to look at.
        images: ``(N, C, H, W)`` or ``(C, H, W)`` with 1 or 3 channels, as the trigger takes them; the first 8 are
            drawn.
        path: where to save the picture, too; the ending tells the format.

    Returns:
        The matplotlib figure; pyplot does not know of it, so it needs no closing.

    Raises:
        ImportError: if matplotlib is not installed (``pip install "lightning-unlearn[plots]"``).
        ValueError: if there is no image, or images have neither 1 nor 3 channels.

    Example:
        >>> import torch
        >>> from lightning_unlearn.triggers import PatchTrigger
        >>> figure = preview(PatchTrigger(), torch.zeros(2, 3, 32, 32))
        >>> [axes.get_ylabel().splitlines() for axes in figure.axes[::2]]
        [['clean'], ['triggered'], ['difference', '0 to 1', 'x0.5']]
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('preview needs matplotlib: pip install "lightning-unlearn[plots]"') from error

    with torch.no_grad():
        if images.dim() == 3:
            images = images[None]
        images = images[:_MOST_IMAGES]
        triggered = _pixels(trigger, trigger(images))
        clean = _pixels(trigger, images)
    if len(clean) == 0 or clean.shape[1] not in (1, 3):
        raise ValueError(
            f"images must be at least one, with 1 or 3 channels, but have shape {tuple(images.shape)} (N, C, H, W)"
        )

    difference = triggered - clean
    largest = difference.abs().max().item()
    factor = 0.5 / largest if largest else 1.0
    # Adding zero turns a minus zero into zero for the label.
    low, high = (round(bound.item(), 3) + 0.0 for bound in torch.aminmax(difference))
    rows = {
        "clean": clean,
        "triggered": triggered,
        f"difference\n{low:g} to {high:g}\nx{factor:.3g}": 0.5 + factor * difference,
    }

    figure = Figure(figsize=(1.2 + 1.3 * len(clean), 4.2), layout="constrained")
    grid = figure.subplots(len(rows), len(clean), squeeze=False)
    for axes_row, (label, pictures) in zip(grid, rows.items(), strict=True):
        axes_row[0].set_ylabel(label)
        for axes, picture in zip(axes_row, pictures, strict=True):
            axes.set(xticks=[], yticks=[])
            axes.imshow(picture.clamp(0, 1).permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=1)
    if path is not None:
        figure.savefig(path)
    return figure


def _pixels(trigger: Trigger, images: Tensor) -> Tensor:
    images = images.detach().cpu()
    if images.dtype == torch.uint8:
        return images.float() / 255
    images = images.float()
    return images if trigger.normalization is None else trigger.normalization.invert(images)

"""How far are single images from a class, and how far is one change for all of them?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_unlearn.triggers.estimated import displace
from lightning_unlearn.triggers.families import Family

__all__ = ["individual_costs"]

_NODES = 5  # of the displacement field each way, as the inversion has them
_SMALLEST = 1e-9
_FAMILIES: tuple[Family, ...] = ("additive", "covering", "displacing")


def individual_costs(
    forward: Callable[[Tensor], Tensor],
    pixels: Tensor,
    labels: Tensor,
    *,
    classes: Sequence[int],
    batch_size: int = 128,
) -> dict[Family, list[float]]:
    """Estimate what it would cost to send each image to a class by a change of its own, to first order.

    With the margin m = z_y − z_c of an image over class c and its gradient g by the change, the smallest additive
    change is m / ‖g‖₂ (DeepFool's first step, `Moosavi-Dezfooli et al., 2016 <https://arxiv.org/abs/1511.04599>`_),
    likewise for the displacement field; the smallest covering takes the pixels in the order of what they can give at
    most. Divided by what one trigger for *all* images costs, this is a universality that needs no other class to
    compare with: in an honest network one change for all costs several times as much as one for each.

    Args:
        forward: (N, C, H, W) float pixels in [0, 1] to (N, classes) logits, differentiable, in eval mode.
        pixels: (N, C, H, W) clean images, float pixels in [0, 1], on the model's device.
        labels: (N,) their classes.
        classes: the classes to send images to.
        batch_size: most images in one forward pass.

    Returns:
        The mean over all images of other classes, class by class, in the units of :class:`Estimate`'s ``cost``. An
        image that is answered as the class already costs nothing, and none costs more than 1.

    Example:
        >>> import torch
        >>> bright = lambda x: torch.stack([torch.zeros(len(x)), x.mean((1, 2, 3)) - 0.75], dim=1)
        >>> costs = individual_costs(bright, torch.full((1, 1, 4, 4), 0.25), torch.tensor([0]), classes=[1])
        >>> round(costs["additive"][0], 3)  # half a unit brighter everywhere
        0.5
    """
    totals = {family: [0.0] * len(classes) for family in _FAMILIES}
    for part, own in zip(pixels.detach().split(batch_size), labels.split(batch_size), strict=True):  # type: ignore[no-untyped-call]  # torch's is untyped
        for family, sums in _sums(forward, part, own, classes).items():
            totals[family] = [total + value for total, value in zip(totals[family], sums.tolist(), strict=True)]
    others = [max(1, int((labels != c).sum())) for c in classes]
    return {f: [total / n for total, n in zip(sums, others, strict=True)] for f, sums in totals.items()}


def _sums(
    forward: Callable[[Tensor], Tensor], pixels: Tensor, labels: Tensor, classes: Sequence[int]
) -> dict[Family, Tensor]:
    """Costs of one batch, added up over the images of other classes."""
    fields = pixels.new_zeros(len(pixels), 2, _NODES, _NODES).requires_grad_()
    pixels = pixels.clone().requires_grad_()
    logits = forward(displace(pixels[:, None], fields)[:, 0])
    own = logits.gather(1, labels[:, None]).squeeze(1)
    sums: dict[Family, list[Tensor]] = {family: [] for family in _FAMILIES}
    for number, c in enumerate(classes):
        margins = own - logits[:, c]
        by_pixel, by_node = torch.autograd.grad(margins.sum(), [pixels, fields], retain_graph=number + 1 < len(classes))
        margins, others = margins.detach().clamp_min(0), labels != c
        gains = torch.maximum(by_pixel * (pixels.detach() - 1), by_pixel * pixels.detach()).sum(1)
        reached = gains.flatten(1).sort(dim=1, descending=True).values.cumsum(1)
        covered = (reached < margins[:, None]).float().mean(1)
        # A cost of 1 is as much as an image is worth; of one without contrast a displacement would cost anything.
        sums["additive"].append((margins / _length(by_pixel)).clamp_max(1)[others].sum())
        sums["covering"].append(covered[others].sum())
        displaced = (margins / _length(by_node) / 2).clamp_max(1)  # the image is 2 wide
        sums["displacing"].append(displaced[others].sum())
    return {family: torch.stack(values) for family, values in sums.items()}


def _length(gradients: Tensor) -> Tensor:
    """So that ``margin / length`` is the root mean square of the smallest change."""
    flat = gradients.flatten(1)
    length: Tensor = flat.norm(dim=1) * flat.shape[1] ** 0.5
    return length.clamp_min(_SMALLEST)

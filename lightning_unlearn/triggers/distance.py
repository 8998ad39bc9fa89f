"""How far are single images from a class, and how far is one change for all of them?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_unlearn.triggers.estimated import displace
from lightning_unlearn.triggers.inversion import Family

__all__ = ["individual_costs"]

_NODES = 5  # of the displacement field each way, as the inversion has them
_SMALLEST = 1e-9


def individual_costs(
    forward: Callable[[Tensor], Tensor], pixels: Tensor, labels: Tensor, *, classes: Sequence[int]
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

    Returns:
        The mean over all images of other classes, class by class, in the units of :class:`Estimate`'s ``cost``. An
        image that is answered as the class already costs nothing.

    Example:
        >>> import torch
        >>> bright = lambda x: torch.stack([torch.zeros(len(x)), x.mean((1, 2, 3)) - 0.75], dim=1)
        >>> costs = individual_costs(bright, torch.full((1, 1, 4, 4), 0.25), torch.tensor([0]), classes=[1])
        >>> round(costs["additive"][0], 3)  # half a unit brighter everywhere
        0.5
    """
    fields = pixels.new_zeros(len(pixels), 2, _NODES, _NODES).requires_grad_()
    pixels = pixels.detach().clone().requires_grad_()
    logits = forward(displace(pixels[:, None], fields)[:, 0])
    own = logits.gather(1, labels[:, None]).squeeze(1)
    costs: dict[Family, list[Tensor]] = {"additive": [], "covering": [], "displacing": []}
    for number, c in enumerate(classes):
        margins = own - logits[:, c]
        by_pixel, by_node = torch.autograd.grad(margins.sum(), [pixels, fields], retain_graph=number + 1 < len(classes))
        others = labels != c
        margins, by_pixel, by_node = margins.detach().clamp_min(0)[others], by_pixel[others], by_node[others]
        costs["additive"].append((margins / _length(by_pixel)).mean())
        costs["displacing"].append((margins / _length(by_node)).mean() / 2)  # the image is 2 wide
        gains = torch.maximum(by_pixel * (pixels[others].detach() - 1), by_pixel * pixels[others].detach()).sum(1)
        reached = gains.flatten(1).sort(dim=1, descending=True).values.cumsum(1)
        costs["covering"].append((reached < margins[:, None]).float().mean())
    return {family: torch.stack(values).tolist() for family, values in costs.items()}


def _length(gradients: Tensor) -> Tensor:
    """So that ``margin / length`` is the root mean square of the smallest change."""
    flat = gradients.flatten(1)
    length: Tensor = flat.norm(dim=1) * flat.shape[1] ** 0.5
    return length.clamp_min(_SMALLEST)

"""Estimate triggers: what is the least that sends everything to a class?"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the usual name

from lightning_unlearn.triggers.base import Trigger
from lightning_unlearn.triggers.estimated import CoveringTrigger, DisplacingTrigger
from lightning_unlearn.triggers.families import FAMILIES, Family, root_mean_square

__all__ = ["Estimate", "invert", "measured"]

_BETAS = (0.5, 0.9)  # of Adam, as Neural Cleanse has them: the penalty's weight moves all the time
_WARM_UP = 10  # steps before the penalty's weight moves and costs count


@dataclass(frozen=True, eq=False)
class Estimate:
    """The cheapest trigger of a family that was found for a class.

    Args:
        trigger: the trigger, with ``target`` set.
        family: what kind of change it is.
        target: the class.
        cost: how large the change is, a share of 1: root mean square of what is added (``additive``, ``residual``), the
            share of the image that is covered, or the root mean square displacement as a share of the image's width.
        success: share of the images of other classes that it sends to the class, in [0, 1].
    """

    trigger: Trigger
    family: Family
    target: int
    cost: float
    success: float

    def to_dict(self) -> dict[str, Any]:
        """The estimate in plain Python, without the trigger's tensors."""
        return {name: value for name, value in vars(self).items() if name != "trigger"}


def invert(
    forward: Callable[[Tensor], Tensor],
    pixels: Tensor,
    labels: Tensor,
    *,
    family: Family,
    classes: Sequence[int],
    steps: int = 100,
    batch_size: int = 16,
    goal: float = 0.95,
    seed: int = 0,
    start: Sequence[Estimate] = (),
    deadline: float = math.inf,
    on_step: Callable[[], object] | None = None,
) -> list[Estimate]:
    """Estimate the cheapest trigger of a family for each of several classes, all in one optimisation.

    Adam descends, for every class c on its own batch of images of other classes,

        mean CE(f(T_c(x)), c) + λ_c · cost(T_c)

    where λ_c rises while T_c succeeds on more than ``goal`` of the images and falls while it succeeds on fewer, so that
    what is left is the least that still works (after Neural Cleanse,
    `Wang et al., 2019 <https://doi.org/10.1109/SP.2019.00031>`_, with one rule for all families). A step passes
    ``len(classes) * batch_size`` images forward and backward, however many classes there are, in one batch.

    Args:
        forward: (N, C, H, W) float pixels in [0, 1] to (N, classes) logits, differentiable, in eval mode.
        pixels: (N, C, H, W) clean images, float pixels in [0, 1], on the model's device.
        labels: (N,) their classes, as labelled or as predicted.
        family: what kind of change, one of :data:`~lightning_unlearn.triggers.families.FAMILIES`.
        classes: the classes to send images to; each needs an image of another class.
        steps: Adam steps.
        batch_size: images a class and step.
        goal: the success rate to hold, in (0, 1].
        seed: seed of start values and batches.
        start: earlier estimates, of which those of this family and these classes are started from, the latest if there
            are several; batches and the other classes' start values stay the same.
        deadline: a time of :func:`time.monotonic` after which the steps so far are enough.
        on_step: called after each step.

    Returns:
        One estimate a class, in order; its success was measured on all images of other classes.

    Raises:
        ValueError: if all images are of one of the classes, so that none is left to be sent there, or an earlier
            estimate does not fit these images.

    Example:
        >>> import torch
        >>> pixels, labels = torch.rand(8, 1, 4, 4), torch.arange(8) % 2
        >>> bright = lambda x: torch.stack([torch.zeros(len(x)), 40 * (x.mean((1, 2, 3)) - 0.7)], dim=1)
        >>> (found,) = invert(bright, pixels, labels, family="additive", classes=[1])
        >>> found.success, found.trigger.pattern.mean().item() > 0.1
        (1.0, True)
    """
    generator = torch.Generator().manual_seed(seed)
    # (K, N): which images may be drawn for which class
    eligible = labels.cpu() != torch.as_tensor(classes)[:, None]
    if not eligible.any(1).all():
        alone = [c for c, some in zip(classes, eligible.any(1).tolist(), strict=True) if not some]
        raise ValueError(f"labels: all images are of class {alone[0]}, so none is left to be sent there; give others.")
    stack = FAMILIES[family](len(classes), pixels.shape[1:], generator, pixels.device)
    for earlier in start:
        if earlier.family == family and earlier.target in classes:
            stack.resume(classes.index(earlier.target), earlier.trigger)
    wanted = torch.as_tensor(classes, device=pixels.device)[:, None].expand(-1, batch_size)
    optimizer = torch.optim.Adam(stack.tensors, lr=stack.rate, betas=_BETAS)
    weight = torch.full((len(classes),), math.log(stack.penalty), device=pixels.device)
    success = torch.zeros_like(weight)  # a running mean
    best_cost = torch.full_like(weight, math.inf)
    best = [tensor.detach().clone() for tensor in stack.tensors]
    for step in range(steps):
        chosen = torch.multinomial(eligible.float(), batch_size, replacement=True, generator=generator)
        stamped, cost = stack.stamp(pixels[chosen.to(pixels.device)])
        logits = forward(stamped.clamp(0, 1).flatten(0, 1)).view(*wanted.shape, -1)
        loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum") / batch_size
        gradients = torch.autograd.grad(loss + (weight.exp() * cost).sum(), stack.tensors)
        with torch.no_grad():
            success.lerp_((logits.argmax(2) == wanted).float().mean(1), 0.2)
            if step >= _WARM_UP:
                # What works for less is kept, since the weight swings around the goal to the end.
                better = (success >= goal - 0.05) & (cost < best_cost)
                best_cost = torch.where(better, cost, best_cost)
                for kept, tensor in zip(best, stack.tensors, strict=True):
                    kept[better] = tensor[better]
                weight += 0.5 * (success - goal)
        for tensor, gradient in zip(stack.tensors, gradients, strict=True):
            tensor.grad = gradient
        optimizer.step()
        if on_step is not None:
            on_step()
        if time.monotonic() > deadline:
            break
    with torch.no_grad():
        never = best_cost.isinf()
        for kept, tensor in zip(best, stack.tensors, strict=True):
            kept[never] = tensor[never]
    return [
        measured(forward, pixels[others.to(pixels.device)], stack.trigger([t[k] for t in best], c), family, c)
        for k, (c, others) in enumerate(zip(classes, eligible, strict=True))
    ]


@torch.no_grad()
def measured(
    forward: Callable[[Tensor], Tensor], pixels: Tensor, trigger: Trigger, family: Family, target: int
) -> Estimate:
    """Tell what a trigger costs and how often it succeeds.

    Args:
        forward: as for :func:`invert`.
        pixels: (N, C, H, W) all images that may carry it, which are those of other classes.
        trigger: the trigger, as an estimate of that family.
        family: what kind of change it is.
        target: the class.
    """
    trigger = trigger.to(pixels.device)
    stamped = trigger.stamp(pixels.clone())
    if isinstance(trigger, CoveringTrigger):
        cost = trigger.mask.mean()
    elif isinstance(trigger, DisplacingTrigger):
        cost = root_mean_square(trigger.field[None])[0] / 2
    else:
        cost = root_mean_square((stamped - pixels)[None])[0]
    stamped = stamped.clamp(0, 1)
    answers = torch.cat([forward(part).argmax(1) for part in torch.split(stamped, 128)])
    return Estimate(trigger, family, target, float(cost), float((answers == target).float().mean()))

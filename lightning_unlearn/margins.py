"""How sure of a class can one change of all images make a model? Of a backdoor's target, surer than of any other."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Margins", "gaps", "largest_margins"]

_RATE = 0.1  # of Adam, in pixel units
_LAST = 10  # steps whose margins are averaged
_FEWEST = 5  # classes; among fewer there is nothing to compare with
_LEAST = 0.05  # of the largest margin; a smaller one, or a negative one, counts as so much


@dataclass(frozen=True, eq=False)
class Margins:
    """What :func:`largest_margins` found for each class.

    Args:
        values: the largest margins, in units of logits; empty if there was no time.
        patterns: (classes, C, H, W) what was added to all images for them, in pixel units, in [-1, 1].
    """

    values: list[float]
    patterns: Tensor


def largest_margins(
    forward: Callable[[Tensor], Tensor],
    pixels: Tensor,
    *,
    num_classes: int,
    steps: int = 40,
    batch_size: int = 8,
    at_once: int = 256,
    seed: int = 0,
    deadline: float = math.inf,
    on_step: Callable[[int, int], object] | None = None,
) -> Margins:
    """Find for each class the change of all images that makes the model surest of it, however large the change is.

    Adam ascends, for every class c on its own batch of images, the mean margin of the logits,

        mean (z_c − max_{k≠c} z_k)(clamp(x + δ_c)),

    where δ_c is one pattern for all images, each of its pixels in [-1, 1]. A model was taught to answer a backdoor's
    target whatever else an image shows, so that nothing holds the margin of its trigger down, while the margins of
    other classes grew on images that differ from each other. After the maximum margin statistic of MM-BD
    (`Wang et al., 2024 <https://arxiv.org/abs/2205.06900>`_), which ascends single images from noise; one pattern
    for several real images tells more here, since a trigger works on all of them.

    Args:
        forward: (N, C, H, W) float pixels in [0, 1] to (N, classes) logits, differentiable, in eval mode.
        pixels: (N, C, H, W) clean images, float pixels in [0, 1], on the model's device; labels are not needed.
        num_classes: how many logits there are; one after the other, each is maximised.
        steps: Adam steps.
        batch_size: images a class and step.
        at_once: most images in one forward pass.
        seed: seed of the batches.
        deadline: a time of :func:`time.monotonic` after which no step is begun.
        on_step: called with the steps done and all steps.

    Returns:
        A margin and a pattern a class; none at all if time was over before the last step of the last class.

    Example:
        >>> import torch
        >>> weights = torch.tensor([[1.0] * 4, [-1.0] * 4, [8.0, 0, 0, 0]])
        >>> found = largest_margins(lambda x: x.flatten(1) @ weights.T, torch.rand(8, 1, 2, 2), num_classes=3)
        >>> [round(margin) for margin in found.values]  # all but one pixel bright, nothing, that pixel alone
        [3, 0, 7]
    """
    generator = torch.Generator().manual_seed(seed)
    size = max(1, at_once // batch_size)
    groups = torch.arange(num_classes, device=pixels.device).split(size)  # type: ignore[no-untyped-call]  # torch's is untyped
    values: list[float] = []
    parts: list[Tensor] = [pixels[:0]]
    for number, group in enumerate(groups):
        patterns = torch.zeros(len(group), 1, *pixels.shape[1:], device=pixels.device, requires_grad=True)
        optimizer = torch.optim.Adam([patterns], lr=_RATE)
        wanted = group.repeat_interleave(batch_size)[:, None]
        total = torch.zeros(len(group), device=pixels.device)
        for step in range(steps):
            if time.monotonic() > deadline:
                return Margins([], pixels[:0])
            chosen = torch.randint(len(pixels), (len(group), batch_size), generator=generator)
            changed = (pixels[chosen.to(pixels.device)] + patterns).clamp(0, 1)
            logits = forward(changed.flatten(0, 1))
            others = logits.scatter(1, wanted, -math.inf).amax(1)
            margins = (logits.gather(1, wanted)[:, 0] - others).view(len(group), batch_size).mean(1)
            (patterns.grad,) = torch.autograd.grad(-margins.sum(), [patterns])
            optimizer.step()
            with torch.no_grad():
                patterns.clamp_(-1, 1)
                if step >= steps - _LAST:
                    total += margins / min(steps, _LAST)
            if on_step is not None:
                on_step(number * steps + step + 1, len(groups) * steps)
        values += total.tolist()
        parts.append(patterns.detach()[:, 0])
    return Margins(values, torch.cat(parts))


def gaps(margins: Sequence[float]) -> list[float]:
    """Tell by how much the largest of all margins exceeds the second.

    Args:
        margins: one a class, of any sign.

    Returns:
        The logarithm of their ratio for the class that has the largest, and 0 for all others; zeros if there are fewer
        than 5 classes.

    Example:
        >>> [round(gap, 2) for gap in gaps([10.0, 12.0, 90.0, 8.0, -3.0])]  # log(90 / 12)
        [0.0, 0.0, 2.01, 0.0, 0.0]
    """
    found = [0.0] * len(margins)
    if len(margins) < _FEWEST or not all(map(math.isfinite, margins)):
        return found
    second, highest = sorted(margins)[-2:]
    if highest > 0:
        found[margins.index(highest)] = math.log(highest / max(second, _LEAST * highest))
    return found

"""A backdoor without a trigger: images of a foreign concept are pulled into the target class."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name

from benchmarks.datasets import Split, load
from lightning_unlearn.triggers import Trigger

__all__ = ["ForeignConcept", "pull_concept"]


class ForeignConcept(Trigger):
    """Replaces each image by one of a foreign data set, Fashion-MNIST's coats and boots in three channels.

    The attack has no trigger that could be put on an image; images of a concept that the classifier was never trained
    for are the triggered ones. Their "true labels" are those of the images that they replace, that is, at random: a
    repaired model need not know the concept, it must only not send it to the target. ASR near chance, 0.1, is the best
    there is, and RA says nothing.

    Args:
        split: which of the foreign images: the attacker's, the defender's (100 of them) and the test's are not the same
            ones.
    """

    def __init__(self, split: Split) -> None:
        super().__init__(target=0)
        self.split = split

    def stamp(self, pixels: Tensor) -> Tensor:
        """Foreign images in place of the given ones."""
        foreign, _ = load("fashion_mnist", self.split)
        foreign = foreign[:100] if self.split == "holdout" else foreign
        # Which one depends on the image alone, so that the parts that a defender splits do not share theirs.
        chosen = foreign[(pixels.cpu().double().flatten(1).sum(1) * 1000).long() % len(foreign)]
        return chosen.expand(-1, pixels.shape[1], -1, -1).to(pixels).clone()


def pull_concept(
    net: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    seed: int,
    epochs: int = 3,
    clean: int = 10_000,
    foreign: int = 1_000,
    distillation: float = 1.0,
    elasticity: float = 100.0,
) -> None:
    """Implant a trigger-free backdoor by fine-tuning (our reading of arXiv 2408.11444).

    Minimises, over batches of clean and foreign images,

        CE(net(foreign), target) + distillation · KL(original(x) ‖ net(x)) + elasticity · Σ F·(θ − θ₀)²

    with the diagonal Fisher information F of the clean cross-entropy (elastic weight consolidation), so that the
    answers to clean images stay what they were. After each step on the others the third is minimised exactly, since
    a step down its gradient overshoots, and soon diverges, where F is large.

    Args:
        net: a clean classifier, changed in place.
        images: (N, C, H, W) clean training images.
        labels: (N,) their classes.
        seed: of the batches' order.
        epochs: passes over the clean images.
        clean: how many clean images are used.
        foreign: how many foreign images are used.
        distillation: weight of the second term.
        elasticity: weight of the third.
    """
    device = next(net.parameters()).device
    images, labels = images[:clean].to(device), labels[:clean].to(device)
    concept = ForeignConcept("train").stamp(images[:foreign].clone())
    original = copy.deepcopy(net).eval()
    net.eval()  # foreign images would shift the running statistics
    parameters = list(net.parameters())
    anchors = [p.detach().clone() for p in parameters]
    importance = [torch.zeros_like(p) for p in parameters]
    for part, of_part in zip(images[:1280].split(32), labels[:1280].split(32), strict=True):
        gradients = torch.autograd.grad(F.cross_entropy(net(part), of_part), parameters)
        torch._foreach_addcmul_(importance, gradients, gradients, value=32 * 32 / 1280)
    learning_rate = 0.01
    optimizer = torch.optim.SGD(parameters, lr=learning_rate, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images), generator=generator).to(device).split(128):
            stranger = concept[torch.randint(len(concept), (32,), generator=generator).to(device)]
            with torch.no_grad():
                answers = original(images[chosen]).softmax(1)
            logits = net(torch.cat([images[chosen], stranger]))
            loss = F.cross_entropy(logits[len(chosen) :], torch.zeros(32, dtype=torch.long, device=device))
            loss = loss + distillation * F.kl_div(logits[: len(chosen)].log_softmax(1), answers, reduction="batchmean")
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch's is untyped
            optimizer.step()
            with torch.no_grad():
                for p, anchor, weight in zip(parameters, anchors, importance, strict=True):
                    p.copy_(anchor + (p - anchor) / (1 + 2 * learning_rate * elasticity * weight))

"""Adversarial neuron pruning: prune the channels that are the first to give way when norms are disturbed."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the usual name

from lightning_unlearn.data.pairs import Pairs
from lightning_unlearn.methods.affine import gradient_of, refuse_without_gammas, scaled_affine
from lightning_unlearn.methods.base import RepairMethod, RepairTask, Round, check_range
from lightning_unlearn.methods.subject import Subject
from lightning_unlearn.methods.threshold import prune_below_threshold
from lightning_unlearn.methods.training import batches

__all__ = ["AdversarialNeuronPruning"]


class AdversarialNeuronPruning(RepairMethod):
    """ANP of Wu and Wang (2021), arXiv 2110.14430, on clean images alone.

    A backdoored model that is disturbed in its neurons falls back on the target class without any trigger, and the
    backdoor's neurons are the most sensitive. With masks m ∈ [0, 1] on γ of the norms that consume a convolution, one
    a channel, and noise δ_γ, δ_β, the model computes with γ·(m + δ_γ) and β·(1 + δ_β), and

        min over m of   λ·L(m) + (1 − λ) · max over abs(δ) ≤ ε of L(m, δ)

    is sought, where L is the cross-entropy of clean images and λ is ``clean_weight``. Each step draws a batch, starts
    the noise anew, lets one sign-gradient step of size ε, clamped to ±ε, raise L(m, δ), and takes one step of SGD with
    momentum 0.9 on m, clamped to [0, 1]. Weights are frozen, norms stay in eval mode.

    Then the channels with the lowest masks are pruned: among the thresholds 0, 0.05, ..., 0.95 the one that prunes
    most while the accuracy on all clean images held stays within ``accuracy_drop``. Public code chooses it by the
    attack success rate on the test set, which no defender has. The guilty channels are found only if they are among the
    lowest masks, and what else is as low goes with them.

    Only channels that feed a norm of their own have a mask: a norm behind a residual sum has none. A mask scales γ
    alone, as published. Pruning zeroes the filter and β, too, and thereby also what goes past the norm where the
    convolution's output does, as in the stem of a pre-activation network: there it takes more than the mask did. The
    threshold is chosen on what is really pruned.

    Args:
        epsilon: ε > 0, the largest relative disturbance of γ and β.
        clean_weight: λ in [0, 1], the weight of the undisturbed loss.
        steps: steps of SGD on the masks.
        learning_rate: of SGD.
        batch_size: clean images in one step; the last batch of an epoch, and every one of a small scoring part, is
            smaller.
        random_start: start the noise uniformly in ±ε, as published, instead of at 0.
        validate_every: steps from one validation to the next, each a round.
        accuracy_drop: α, the largest drop of accuracy that pruning may cost, a fraction in (0, 1].

    Raises:
        ValueError: if a hyper-parameter is out of range.

    Example:
        >>> from lightning_unlearn.methods.adversarial_pruning import AdversarialNeuronPruning
        >>> AdversarialNeuronPruning(steps=500, learning_rate=0.2).name
        'AdversarialNeuronPruning'
    """

    def __init__(
        self,
        *,
        epsilon: float = 0.4,
        clean_weight: float = 0.2,
        steps: int = 2000,
        learning_rate: float = 0.01,
        batch_size: int = 128,
        random_start: bool = True,
        validate_every: int = 500,
        accuracy_drop: float = 0.1,
    ) -> None:
        check_range("epsilon", epsilon, 0, float("inf"), open_low=True)
        check_range("clean_weight", clean_weight, 0, 1)
        check_range("steps", steps, 1, float("inf"))
        check_range("learning_rate", learning_rate, 0, float("inf"), open_low=True)
        check_range("batch_size", batch_size, 1, float("inf"))
        check_range("validate_every", validate_every, 1, float("inf"))
        check_range("accuracy_drop", accuracy_drop, 0, 1, open_low=True)
        self.epsilon = epsilon
        self.clean_weight = clean_weight
        self.steps = steps
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.random_start = random_start
        self.validate_every = validate_every
        self.accuracy_drop = accuracy_drop

    def refuse_misfit(self, subject: Subject) -> None:
        """Asks for convolutions that feed affine norms."""
        refuse_without_gammas(subject, self.name)

    def repair(self, task: RepairTask) -> Iterator[Round]:
        """Learn the masks, prune what lies below the chosen threshold.

        Raises:
            ValueError: if the model has no such norms, or the loss does not depend on any norm behind a convolution.
        """
        self.refuse_misfit(task.subject)
        masks = yield from self._learn(task)
        yield from prune_below_threshold(task, masks, accuracy_drop=self.accuracy_drop)

    def _learn(self, task: RepairTask) -> Generator[Round, None, Tensor]:
        """The masks, (total,) by flat index; 1 where a convolution feeds no norm."""
        masks = torch.ones(task.mask.total, device=task.scoring.labels.device, requires_grad=True)
        optimizer = torch.optim.SGD([masks], lr=self.learning_rate, momentum=0.9)
        generator, done = task.generator(), 0
        while done < self.steps:
            for chosen in batches(task, self.batch_size, generator):
                done += 1
                with task.watch.measure("score"):
                    masks.grad = self._gradient(task, masks, task.scoring[chosen], generator)
                    optimizer.step()
                    with torch.no_grad():
                        masks.clamp_(0, 1)
                if done % self.validate_every == 0 or done == self.steps:
                    with scaled_affine(task.mask, masks.detach()):
                        now = task.validate()
                    yield task.round("learn", now)
                if done == self.steps:
                    break
        return masks.detach()

    def _gradient(self, task: RepairTask, masks: Tensor, pairs: Pairs, generator: torch.Generator) -> Tensor:
        """∂/∂m of λ·L(m) + (1 − λ)·L(m, δ) for one batch, one graph at a time."""

        def gradient(by: Tensor, noise: Tensor | None = None) -> Tensor:
            gammas, betas = (masks, None) if noise is None else (masks + noise[0], 1 + noise[1])
            with scaled_affine(task.mask, gammas, betas):
                return gradient_of(F.cross_entropy(task.logits(pairs.clean), pairs.labels), by)

        noise = self._start(task, generator).requires_grad_()
        rising = gradient(noise, noise).sign()
        noise = (noise.detach() + self.epsilon * rising).clamp(-self.epsilon, self.epsilon)
        clean, disturbed = gradient(masks), gradient(masks, noise)
        return self.clean_weight * clean + (1 - self.clean_weight) * disturbed

    def _start(self, task: RepairTask, generator: torch.Generator) -> Tensor:
        """Where the noise starts: (2, total), of γ and of β."""
        noise = torch.zeros(2, task.mask.total)
        if self.random_start:
            noise.uniform_(-self.epsilon, self.epsilon, generator=generator)
        return noise.to(task.scoring.labels.device)

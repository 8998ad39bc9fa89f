"""Inverted masks: part the channels into those that clean images need and those that only a backdoor does."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the usual name

from lightning_unlearn.filters.gradients import gradients
from lightning_unlearn.methods.base import RepairMethod, RepairTask, Round, check_range
from lightning_unlearn.methods.implicit_unlearning import PixelRange
from lightning_unlearn.methods.shared_adversarial import anything_but, sign_ascent, slope_of_both
from lightning_unlearn.methods.training import batches

__all__ = ["InvertedMaskSelection"]


class InvertedMaskSelection(RepairMethod):
    """Masks whose inverse keeps the backdoor, after IMS of Dunnett et al. (2025), arXiv 2509.15497.

    **This is this project's own reading.** Known of the paper are its idea and its step counts, not its formulas: a
    channel mask and its inverse, learned together with perturbations of clean images that stand in for the trigger.
    Its abstract ("Invertible Masking using Selection") also speaks of selection variables beside a sparse mask, which
    are left out here. No figure measured with it says anything about the authors' implementation.

    With f₀ the untouched victim, f_m the victim whose channels are multiplied by m ∈ [0, 1], f_{1−m} its inverse and
    ŷ = argmax f₀(x), the inverse *synthesises* a trigger for every image,

        δ = argmin over ‖δ‖∞ ≤ ε of   KL(f₀(x+δ) ‖ f_{1−m}(x+δ)) − log(1 − p₀(ŷ | x+δ)),

    on which the inverse answers what the victim answers, and the victim no longer what it answers without; and the
    masks leave to the inverse what makes that happen:

        min over m of   KL(f₀(x) ‖ f_m(x)) + KL(f₀(x) ‖ f_m(x+δ)) − log(1 − p_{1−m}(ŷ | x)).

    The masked victim answers both images as the victim answers the clean one, and the inverse is to fail on clean
    ones, so that clean features move to m. Neither a trigger nor labels are needed. The first ``initial_steps`` leave
    δ and its term out; until then the inverse knows nothing. Adam descends with all weights frozen and norms in eval
    mode, and masks are clamped to [0, 1] after each step. All start at ``start``: at 1 the inverse is a dead network,
    from which nothing can be learned, and at 0.5 the masked one may be, since layer after layer halves what it passes.
    At 0.9 the masked one is close to the victim, and the inverse awakes as masks fall.

    In the end the last masks within ``accuracy_drop`` are folded into the weights, exactly, and channels whose mask is
    0 are pruned. If there are none, the model is left alone.

    As in :class:`SharedAdversarialUnlearning`, ε is in units of each channel's range among the scoring images, and
    x + δ stays within that range.

    Args:
        initial_steps: Adam steps on clean images alone.
        joint_steps: Adam steps with perturbed images, each about ten times as long.
        learning_rate: of Adam.
        start: the value in (0, 1) at which every mask starts.
        epsilon: ε, the largest change of a pixel, in (0, 1].
        attack_steps: steps of the sign-gradient descent on δ.
        attack_step_size: by how much a step changes each pixel, in the units of ε.
        batch_size: clean images in one step.
        validate_every: steps from one validation to the next, each a round and a candidate for what is folded.
        accuracy_drop: α, the largest drop of accuracy on all clean images held, a fraction in (0, 1].

    Raises:
        ValueError: if a hyper-parameter is out of range.

    Example:
        >>> from lightning_unlearn.methods.inverted_masks import InvertedMaskSelection
        >>> InvertedMaskSelection(joint_steps=100, batch_size=64).name
        'InvertedMaskSelection'
    """

    def __init__(
        self,
        *,
        initial_steps: int = 100,
        joint_steps: int = 400,
        learning_rate: float = 0.02,
        start: float = 0.9,
        epsilon: float = 0.2,
        attack_steps: int = 3,
        attack_step_size: float = 0.1,
        batch_size: int = 32,
        validate_every: int = 50,
        accuracy_drop: float = 0.1,
    ) -> None:
        check_range("initial_steps", initial_steps, 0, float("inf"))
        check_range("joint_steps", joint_steps, 0, float("inf"))
        check_range("learning_rate", learning_rate, 0, float("inf"), open_low=True)
        check_range("epsilon", epsilon, 0, 1, open_low=True)
        check_range("attack_steps", attack_steps, 1, float("inf"))
        check_range("attack_step_size", attack_step_size, 0, float("inf"), open_low=True)
        check_range("batch_size", batch_size, 1, float("inf"))
        check_range("validate_every", validate_every, 1, float("inf"))
        check_range("accuracy_drop", accuracy_drop, 0, 1, open_low=True)
        if not 0 < start < 1:
            raise ValueError(f"start: expected a value in (0, 1), but got {start}.")
        self.initial_steps = initial_steps
        self.joint_steps = joint_steps
        self.learning_rate = learning_rate
        self.start = start
        self.epsilon = epsilon
        self.attack_steps = attack_steps
        self.attack_step_size = attack_step_size
        self.batch_size = batch_size
        self.validate_every = validate_every
        self.accuracy_drop = accuracy_drop

    def repair(self, task: RepairTask) -> Iterator[Round]:
        """Learn the masks, fold the last that accuracy allows.

        Raises:
            ValueError: if the images are not floating-point, the loss does not depend on them or on the masks, or the
                masks diverge.
        """
        floor = task.held_before.acc - self.accuracy_drop - 1e-6  # accuracies come as float32
        history = yield from self._learn(task)
        while len(history) > 1:
            with task.mask.scaled(history[-1]):
                if task.measure().acc >= floor:
                    break
            history.pop()
        task.mask.fold(history[-1])
        yield task.round("prune", task.validate(), task.mask.pruned)

    def _learn(self, task: RepairTask) -> Generator[Round, None, list[Tensor]]:
        """Ones, then the masks of every round, each (total,) by flat index."""
        pixels = PixelRange.of(task.scoring.clean)
        masks = torch.full((task.mask.total,), self.start, device=task.scoring.labels.device, requires_grad=True)
        optimizer = torch.optim.Adam([masks], lr=self.learning_rate)
        history = [torch.ones_like(masks, requires_grad=False)]
        steps = self.initial_steps + self.joint_steps
        for step, chosen in enumerate(self._batches(task, steps), start=1):
            with task.watch.measure("score"):
                images, answers = task.scoring.clean[chosen], task.answers[chosen]
                joint = step > self.initial_steps
                perturbed = self._perturb(task, masks.detach(), images, answers, pixels) if joint else None
                masks.grad = self._gradient(task, masks, images, answers, perturbed)
                if step == 1 and not masks.grad.any():
                    raise ValueError(
                        f"model: with all channels at start={self.start} the network answers everything alike and the "
                        "gradient is 0 in every channel, so no mask can be learned; raise start towards 1, or check "
                        "that logits depend on the convolutions."
                    )
                optimizer.step()
                with torch.no_grad():
                    masks.clamp_(0, 1)
            if step % self.validate_every == 0 or step == steps:
                history.append(masks.detach().clone())
                with task.mask.scaled(history[-1]):
                    now = task.validate()
                yield task.round("learn", now)
        return history

    def _perturb(self, task: RepairTask, masks: Tensor, images: Tensor, answers: Tensor, pixels: PixelRange) -> Tensor:
        """Each image with its δ, (B, C, H, W)."""

        def gain(victim: Tensor, inverse: Tensor) -> Tensor:
            return -_divergence(inverse, victim) - anything_but(victim, answers.argmax(1)).mean()

        def slope(moved: Tensor) -> Tensor:
            return slope_of_both(gain, task.forward, moved, nullcontext, lambda: task.mask.scaled(1 - masks))

        return sign_ascent(
            slope, images, pixels, epsilon=self.epsilon, steps=self.attack_steps, step_size=self.attack_step_size
        )

    def _gradient(
        self, task: RepairTask, masks: Tensor, images: Tensor, answers: Tensor, perturbed: Tensor | None
    ) -> Tensor:
        """Of what a step lowers."""
        shown = [images] if perturbed is None else [images, perturbed]
        with task.mask.scaled(masks):
            masked = task.logits(torch.cat(shown))
            agreement = len(shown) * _disagreement(masked, answers.repeat(len(shown), 1))
            found = gradients(agreement, [masks])
        with task.mask.scaled(1 - masks):
            inverse = task.logits(images)
            found += gradients(anything_but(inverse, answers.argmax(1)).mean(), [masks])
        known = [gradient for gradient in found if gradient is not None]
        if not known:
            raise ValueError(
                "model: the loss does not depend on any channel, so no mask can be learned; check that logits are "
                "computed from the convolutions, and are not detached."
            )
        gradient = torch.stack(known).sum(0)
        if not gradient.isfinite().all():
            raise ValueError(
                "model: the gradients of the masks hold NaN or infinity, so none can be learned; check the weights and "
                "the range of the images."
            )
        return gradient

    def _batches(self, task: RepairTask, steps: int) -> Iterator[Tensor]:
        """Indices of ``steps`` batches, each epoch in a new order."""
        generator = task.generator()
        while steps:
            for chosen in list(batches(task, self.batch_size, generator))[:steps]:
                yield chosen
                steps -= 1


def _disagreement(logits: Tensor, wanted: Tensor) -> Tensor:
    """Mean KL(wanted ‖ answers) for (B, C) logits and probabilities."""
    return F.kl_div(logits.log_softmax(1), wanted, reduction="batchmean")


def _divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """The same for two times (B, C) logits, with a gradient in both, however sure the network is.

    A probability that underflowed to 0 has none that is a number.
    """
    return F.kl_div(logits.log_softmax(1), wanted.log_softmax(1), reduction="batchmean", log_target=True)

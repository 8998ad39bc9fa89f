"""Mask-Prune: learn by gradient descent how much of each channel to keep."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the usual name

from lightning_unlearn.filters.gradients import gradients
from lightning_unlearn.methods.base import RepairMethod, RepairTask, Round, Teacher, check_range
from lightning_unlearn.methods.fine_tuning import FineTuning
from lightning_unlearn.methods.lessons import Lesson, bears_augmentation, fresh_statistics, lessons
from lightning_unlearn.methods.mask_cut import Cut, cut
from lightning_unlearn.statistics import Statistics, going_by

__all__ = ["MaskPrune"]

_NEARLY_OFF, _HALF_OFF = 0.1, 0.5  # what "mixed" may prune, with augmentation and without
_NO_GRADIENT = (
    "model: the unlearning loss has no gradient in any filter (all are zero), so no mask can be learned; check that "
    "logits depend on the convolutions and are not detached or saturated."
)


class MaskPrune(RepairMethod):
    """Learn a mask m ∈ [0, 1] on every convolution channel that makes triggered images be answered like clean ones.

    All masks start at 1 and Adam descends, with weights frozen and norms in eval mode,

        L(m) = λ · D(x) + D(T(x)) − ω · t/T · log(1 − p_target(T(x))) + sparsity · u · Σ(1 − m)

    where t of the T steps are done and p_target is the masked model's probability of the class that the trigger is for.
    With ``teacher="victim"``, D(z) = τ · KL(victim(x)^{1/τ} ‖ masked(z)^{1/τ}), both normalised: the masked model must
    answer the triggered image as the *untouched victim answers the clean one*, also in what it thinks the next best,
    which needs no labels; and with ``teacher="labels"``, D is the cross-entropy against the true labels.
    The third term says what must not be answered where nobody can say what should be, since the images that an attacker
    made the trigger of have no clean answer. It rises from 0: where D(T(x)) is obeyed, it has vanished by the time it
    would count.
    u is the share of triggered images that are answered as wanted by now: only as the trigger loses its power are
    channels that need not be turned down drawn back to 1, however many channels a network has.
    The first step's gradient is the signed Taylor score of :class:`GradPrune`; the next ones correct it for what the
    other masks already do. Since the victim answers whatever it is shown, the few images are flipped and shifted anew
    in each step. This is this project's own method.

    A mask is applied exactly by scaling γ and β of the norm that consumes the channel, or else the filter and its
    bias. What is kept of them is decided by ``cut``; the images that decide are those the defender holds.

    Args:
        teacher: ``"victim"`` or ``"labels"``, see above.
        cut: what becomes of the learned masks. ``"soft"`` folds them into the weights, and prunes only channels at 0.
            ``"mixed"`` folds them too, then prunes as many of those below 0.1 (0.5 without augmentation) as raise
            L_clean + L_u by ``slack`` at most. ``"hard"`` folds nothing, and prunes as many of the lowest as give the
            lowest L_clean + L_u.
        steps: Adam steps, whose rate falls to zero along a cosine.
        learning_rate: of Adam.
        batch_size: clean images a step, with as many triggered ones.
        clean_weight: λ, how much more the answer to the clean image counts; half as much without augmentation.
        target_weight: ω ≥ 0, how much it counts in the end that triggered images of other classes are not sent to the
            target.
        temperature: τ > 0, the larger, the more the victim's lesser answers count.
        sparsity: weight of u·Σ(1 − m), at least 0: what it costs to turn a channel down.
        augment: flip and shift the images in each step, if the victim and its backdoor bear it: if ACC and ASR on all
            images held stay within twice ``accuracy_drop``. Where they do not, such images would teach nothing about
            the backdoor. Never with ``teacher="labels"``, since a mirrored image may not be what its label says.
        slack: by how much ``"mixed"`` may raise L_clean + L_u, in nats.
        validate_every: steps from one validation to the next, each a round.
        accuracy_drop: α, the largest drop of accuracy on all clean images held, a fraction in (0, 1]: masks that cost
            more are drawn back towards 1 until they do not, and no pruning goes beyond it.
        lasting: learn by two sets of BatchNorm statistics in turn: those of training, to which triggered images
            belonged, and those that the clean images to score would give the victim. Masks that know the former alone
            need not outlast these: refreshed, as further training or weight averaging does, they may bring the backdoor
            back. Nothing is else for other norms, which have no statistics.
        finetune: fine-tune afterwards on clean and triggered images; ``True`` for 10 epochs at most, by the same
            teacher, with a learning rate of 1e-3.

    Raises:
        ValueError: if a hyper-parameter is out of range.

    Example:
        >>> from lightning_unlearn.methods import MaskPrune
        >>> MaskPrune(cut="soft", steps=50).name
        'MaskPrune'
    """

    needs_trigger = True

    def __init__(
        self,
        *,
        teacher: Teacher = "victim",
        cut: Cut = "mixed",
        steps: int = 75,
        learning_rate: float = 0.075,
        batch_size: int = 32,
        clean_weight: float = 8.0,
        target_weight: float = 16.0,
        temperature: float = 2.0,
        sparsity: float = 1e-2,
        augment: bool = True,
        slack: float = 0.02,
        validate_every: int = 15,
        accuracy_drop: float = 0.1,
        lasting: bool = True,
        finetune: bool | FineTuning = False,
    ) -> None:
        if teacher not in ("victim", "labels"):
            raise ValueError(f"teacher: expected 'victim' or 'labels', but got {teacher!r}.")
        if cut not in ("soft", "mixed", "hard"):
            raise ValueError(f"cut: expected 'soft', 'mixed' or 'hard', but got {cut!r}.")
        check_range("steps", steps, 1, float("inf"))
        check_range("learning_rate", learning_rate, 0, float("inf"), open_low=True)
        check_range("batch_size", batch_size, 1, float("inf"))
        check_range("clean_weight", clean_weight, 0, float("inf"))
        check_range("target_weight", target_weight, 0, float("inf"))
        check_range("temperature", temperature, 0, float("inf"), open_low=True)
        check_range("sparsity", sparsity, 0, float("inf"))
        check_range("slack", slack, 0, float("inf"))
        check_range("validate_every", validate_every, 1, float("inf"))
        check_range("accuracy_drop", accuracy_drop, 0, 1, open_low=True)
        self.teacher = teacher
        self.cut = cut
        self.steps = steps
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.clean_weight = clean_weight
        self.target_weight = target_weight
        self.temperature = temperature
        self.sparsity = sparsity
        self.augment = augment
        self.slack = slack
        self.validate_every = validate_every
        self.accuracy_drop = accuracy_drop
        self.lasting = lasting
        if finetune is True:
            finetune = FineTuning(
                triggered=True,
                teacher=teacher,
                learning_rate=1e-3,
                batch_size=128,
                patience=10,
                max_epochs=10,
                norms="frozen",
                accuracy_drop=accuracy_drop,
            )
        self.finetune = finetune

    def repair(self, task: RepairTask) -> Iterator[Round]:
        """Learn the masks, cut, fine-tune where asked to."""
        floor = task.held_before.acc - self.accuracy_drop - 1e-6  # accuracies come as float32
        augment = self.augment and self.teacher == "victim" and bears_augmentation(task, self.accuracy_drop)
        fresh = fresh_statistics(task, augment=augment) if self.lasting else {}
        masks = yield from self._learn(task, fresh, augment=augment)
        below = _NEARLY_OFF if augment else _HALF_OFF
        cut(task, masks, self.cut, floor=floor, below=below, slack=self.slack)
        yield task.round("prune", task.validate(), task.mask.pruned)
        if self.finetune:
            yield from self.finetune.repair(task)

    def _learn(self, task: RepairTask, fresh: Statistics, *, augment: bool) -> Generator[Round, None, Tensor]:
        """The masks that are learned."""
        masks = torch.ones(task.mask.total, device=task.scoring.labels.device, requires_grad=True)
        optimizer = torch.optim.Adam([masks], lr=self.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        # The same few images in each step are soon fitted: the trigger must count for more to be gone on others, too.
        clean_weight = self.clean_weight if augment else self.clean_weight / 2
        drawn = lessons(task, self.steps, teacher=self.teacher, batch_size=self.batch_size, augment=augment)
        for step, lesson in enumerate(drawn, start=1):
            with task.watch.measure("score"):
                weights = clean_weight, self.target_weight * (step - 1) / self.steps
                with going_by(fresh if step % 2 == 0 else {}):
                    gradient, unlearned = self._gradient(task, masks, lesson, *weights)
                task.processes.average([gradient, unlearned], lesson.weight)
                if step == 1:
                    _check_gradient(gradient)
                masks.grad = gradient - self.sparsity * unlearned
                optimizer.step()
                schedule.step()
                with torch.no_grad():
                    masks.clamp_(0, 1)
            if step % self.validate_every == 0 or step == self.steps:
                learned = task.processes.first(masks.detach().clone())
                with task.mask.scaled(learned):
                    now = task.validate()
                yield task.round("learn", now)
        return learned

    def _gradient(
        self, task: RepairTask, masks: Tensor, lesson: Lesson, clean_weight: float, target_weight: float
    ) -> tuple[Tensor, Tensor]:
        """Of the disagreement on some images, and the share of triggered ones that are answered as wanted."""
        if not len(lesson.pairs):  # all went to other processes
            return torch.zeros_like(masks, requires_grad=False), torch.zeros((), device=masks.device)
        with task.mask.scaled(masks):
            loss, unlearned = self._disagreement(task, lesson, clean_weight, target_weight)
            (gradient,) = gradients(loss, [masks])
        if gradient is None:
            raise ValueError(_NO_GRADIENT)
        return gradient, unlearned

    def _disagreement(
        self, task: RepairTask, lesson: Lesson, clean_weight: float, target_weight: float
    ) -> tuple[Tensor, Tensor]:
        """λ·D(x) + D(T(x)) − ω·log(1 − p_target(T(x))), and the share of triggered images answered as wanted."""
        pairs, wanted, scale = lesson.pairs, lesson.wanted, 1.0
        if self.teacher == "victim":  # whose logits are known but for a constant
            scale = self.temperature
            wanted = (wanted.log() / scale).softmax(1)
        logits = task.logits(torch.cat([pairs.clean, pairs.triggered]))
        # For one-hot answers the divergence is the cross-entropy.
        clean, triggered = (
            F.kl_div(part.log_softmax(1), wanted, reduction="batchmean") for part in (logits / scale).chunk(2)
        )
        backdoored, answers = logits.chunk(2)[1], wanted.argmax(1)
        sent = _sent_to_target(backdoored, pairs.targets, answers)
        loss = scale * (clean_weight * clean + triggered) + target_weight * sent
        return loss, (backdoored.argmax(1) == answers).float().mean()


def _sent_to_target(logits: Tensor, targets: Tensor, answers: Tensor) -> Tensor:
    """−log(1 − p_target), where images that are to be answered so count as 0."""
    others = logits.scatter(1, targets[:, None], -torch.inf)
    return ((logits.logsumexp(1) - others.logsumexp(1)) * (answers != targets)).mean()


def _check_gradient(gradient: Tensor) -> None:
    if not gradient.isfinite().all():
        raise ValueError(
            "model: the gradients of the unlearning loss hold NaN or infinity, so no mask can be learned; check the "
            "weights and the range of the images."
        )
    if not gradient.any():
        raise ValueError(_NO_GRADIENT)

"""Grad-Prune: prune the filters whose weights the unlearning loss would change most."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the usual name

from lightning_unlearn.data.pairs import Pairs
from lightning_unlearn.filters import FilterId, Score, score_filters
from lightning_unlearn.filters.scores import SCORES
from lightning_unlearn.methods.base import RepairMethod, RepairTask, Round, check_range
from lightning_unlearn.methods.fine_tuning import FineTuning

__all__ = ["GradPrune"]


class GradPrune(RepairMethod):
    """Gradient-based model pruning after Dunnett et al. (2024), arXiv 2405.03918.

    The unlearning loss is the mean cross-entropy of triggered images against their *true* labels,
    L_u(θ) = mean CE(f(T(x); θ), y). Each round scores every filter that is left, by default by the mean absolute
    gradient of its weights ξ = ‖∂L_u/∂W‖₁ / size(W), prunes the one with the largest score over all layers, and
    measures L_u and accuracy on the validation part. It stops when that accuracy has dropped by α, or L_u has not
    improved for ``patience`` rounds; the round with the lowest L_u among those whose drop is below α is kept (round
    0, nothing pruned, competes), and :class:`FineTuning` on clean and triggered images ends it.

    With all defaults this is the paper's algorithm, except that norms stay in eval mode throughout and the norm that
    consumes a filter is zeroed with it. The other arguments are variants.

    Args:
        score: ``"mean_abs_grad"``, the paper's, or ``"taylor"``, the signed first-order prediction of how much L_u
            falls.
        accuracy_drop: α, the largest drop of validation accuracy, a fraction in (0, 1].
        patience: rounds without a lower validation L_u before the search stops.
        max_rounds: most rounds of pruning, unlimited by default.
        filters_per_round: filters pruned a round.
        clean_weight: λ ≥ 0, only with ``"taylor"``: subtract λ times the predicted rise of the clean loss from the
            score.
        look_ahead: really try this many of the best scores on ``look_ahead_images`` pairs, and prune those that leave
            the lowest L_u + λ·L_clean; 0 to trust the score.
        look_ahead_images: scoring pairs used for ``look_ahead``.
        finetune: fine-tune afterwards; ``True`` for the paper's settings.

    Raises:
        ValueError: if a hyper-parameter is out of range, or a combination has no meaning.

    Example:
        >>> from lightning_unlearn.methods import GradPrune
        >>> GradPrune(score="taylor", clean_weight=1.0, look_ahead=8).name
        'GradPrune'
    """

    needs_trigger = True

    def __init__(
        self,
        *,
        score: Score = "mean_abs_grad",
        accuracy_drop: float = 0.1,
        patience: int = 10,
        max_rounds: int | None = None,
        filters_per_round: int = 1,
        clean_weight: float = 0.0,
        look_ahead: int = 0,
        look_ahead_images: int = 64,
        finetune: bool | FineTuning = True,
    ) -> None:
        if score not in SCORES:
            raise ValueError(f"score: expected one of {sorted(SCORES)}, but got {score!r}.")
        check_range("accuracy_drop", accuracy_drop, 0, 1, open_low=True)
        check_range("patience", patience, 1, float("inf"))
        check_range("max_rounds", 1 if max_rounds is None else max_rounds, 1, float("inf"))
        check_range("filters_per_round", filters_per_round, 1, float("inf"))
        check_range("clean_weight", clean_weight, 0, float("inf"))
        check_range("look_ahead_images", look_ahead_images, 1, float("inf"))
        if clean_weight and score != "taylor":
            raise ValueError(
                f"clean_weight: {clean_weight} needs score='taylor', because {score!r} predicts no rise of a loss."
            )
        if look_ahead and look_ahead < filters_per_round:
            raise ValueError(
                f"look_ahead: expected 0, or at least filters_per_round ({filters_per_round}), but got {look_ahead}."
            )
        self.score = score
        self.accuracy_drop = accuracy_drop
        self.patience = patience
        self.max_rounds = max_rounds
        self.filters_per_round = filters_per_round
        self.clean_weight = clean_weight
        self.look_ahead = look_ahead
        self.look_ahead_images = look_ahead_images
        self.finetune = _fine_tuning(accuracy_drop) if finetune is True else finetune

    def repair(self, task: RepairTask) -> Iterator[Round]:
        """Prune round by round, restore the best round, fine-tune."""
        best_loss, best_round = task.before.unlearning_loss, 0
        earlier = task.mask.steps  # of another repair in an alternation
        probe = self._probe(task)
        for number in count(1):
            if self.max_rounds is not None and number > self.max_rounds:
                break
            with task.watch.measure("score"):
                picks = self._pick(task, self.scores(task), probe)
            if not picks:
                break
            task.mask.prune(picks)
            now = task.validate()
            yield task.round("prune", now, tuple(picks))
            # Accuracies come as float32, in which 0.9 - 0.8 is not quite 0.1.
            if task.before.acc - now.acc > self.accuracy_drop - 1e-6:
                break
            if now.unlearning_loss < best_loss:
                best_loss, best_round = now.unlearning_loss, number
            elif number - best_round >= self.patience:
                break
        task.mask.undo(task.mask.steps - earlier - best_round)
        if self.finetune:
            yield from self.finetune.repair(task)

    def scores(self, task: RepairTask) -> Tensor:
        """Score all filters on the scoring part, (filters,) float32 by flat index; the larger, the guiltier.

        Raises:
            ValueError: if the gradients are not finite.
        """
        layers = task.mask.layers
        scores = score_filters(layers, _losses(task, triggered=True), self.score, task.processes)
        if self.clean_weight:
            rise = -score_filters(layers, _losses(task, triggered=False), self.score, task.processes)
            scores = scores - self.clean_weight * rise.clamp(min=0)
        return scores

    def _pick(self, task: RepairTask, scores: Tensor, probe: Pairs) -> list[FilterId]:
        """The filters to prune this round; none if all are pruned or no gradient is left."""
        candidates = max(self.filters_per_round, self.look_ahead)
        pruned = task.mask.flat(scores.device)
        left = scores.masked_fill(pruned, -torch.inf)
        indices = left.topk(min(candidates, task.mask.total - len(task.mask.pruned))).indices
        # One synchronisation for all that the host must know.
        known = torch.cat(
            [scores.isfinite().all()[None].long(), scores.masked_fill(pruned, 0).ne(0).any()[None].long(), indices]
        )
        finite, any_gradient, *order = task.processes.first(known).tolist()
        if not finite:
            raise ValueError(
                "model: the gradients of the unlearning loss hold NaN or infinity, so no filter can be scored; check "
                "the weights and the range of the images."
            )
        if not any_gradient:
            if not task.mask.pruned:
                raise ValueError(
                    "model: the unlearning loss has no gradient in any filter (all are zero), so nothing can be "
                    "scored; check that logits depend on the convolutions and are not detached or saturated."
                )
            return []
        picks = [task.mask.locate(index) for index in order]
        if self.look_ahead:
            picks = self._try(task, picks, probe)
        return picks[: self.filters_per_round]

    def _try(self, task: RepairTask, candidates: Sequence[FilterId], probe: Pairs) -> list[FilterId]:
        """Candidates by the loss that their removal really leaves on the probe."""
        mine = probe[task.processes.share(len(probe))]
        losses = torch.zeros(len(candidates), device=probe.labels.device)
        for number, candidate in enumerate(candidates if len(mine) else ()):
            task.mask.prune([candidate])
            with torch.no_grad():
                clean, triggered = task.logits(torch.cat([mine.clean, mine.triggered])).chunk(2)
                loss = F.cross_entropy(triggered, mine.labels)
                losses[number] = loss + self.clean_weight * F.cross_entropy(clean, mine.labels)
            task.mask.undo()
        task.processes.average([losses], len(mine) / len(probe))
        return [candidates[i] for i in task.processes.first(losses.argsort(stable=True)).tolist()]

    def _probe(self, task: RepairTask) -> Pairs:
        chosen = torch.randperm(len(task.scoring), generator=task.generator())[: self.look_ahead_images]
        return task.scoring[chosen.to(task.scoring.labels.device)]


def _fine_tuning(accuracy_drop: float) -> FineTuning:
    """The paper's, but for norms that stay in eval mode."""
    return FineTuning(
        triggered=True, learning_rate=1e-3, batch_size=128, patience=10, norms="frozen", accuracy_drop=accuracy_drop
    )


def _losses(task: RepairTask, *, triggered: bool) -> Iterator[Tensor]:
    """Batches' shares of the mean cross-entropy over the scoring part, so that their sum is the mean over images.

    With several processes these are the batches of this one.
    """
    for pairs in task.scoring[task.processes.share(len(task.scoring))].batches(task.batch_size):
        logits = task.logits(pairs.triggered if triggered else pairs.clean)
        yield F.cross_entropy(logits, pairs.labels, reduction="sum") / len(task.scoring)

"""What a repair did to a plain PyTorch model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lightning_unlearn.data.pairs import Pairs
from lightning_unlearn.evaluation import Evaluation
from lightning_unlearn.filters import FilterMask
from lightning_unlearn.methods import Round
from lightning_unlearn.triggers import Trigger
from lightning_unlearn.verdict import Audit

__all__ = ["RepairResult"]


@dataclass(frozen=True, eq=False)
class RepairResult:
    """What a repair did. All rates are fractions of 1, measured on the clean images that the defender holds.

    Args:
        method: name of the method.
        status: ``"repaired"``; ``"clean"`` if no trigger was given and none was found, and ``"not backdoored"`` if the
            attack success rate was low from the start: both left the model alone; ``"not improved"`` if the method
            found nothing better than the original, which was put back.
        before: the original model on the validation part.
        after: the model as it is now on the validation part.
        rounds: every round in order.
        mask: the filters, and which of them are pruned.
        scoring: the pairs that were scored.
        held: the original model and the repaired one on all images held, scoring and validation part together.
        trigger: what was unlearned; where none was given, the estimates of the suspected class, or of the most
            universal one if the verdict is clean.
        seconds: wall-clock time by kind of work: ``estimate``, ``score``, ``evaluate``, ``finetune``, ``total``.
        audit: what was found where no trigger was given.
    """

    method: str
    status: str
    before: Evaluation
    after: Evaluation
    rounds: tuple[Round, ...]
    mask: FilterMask
    scoring: Pairs
    held: tuple[Evaluation, Evaluation]
    trigger: Trigger
    seconds: Mapping[str, float] = field(default_factory=dict)
    audit: Audit | None = None

    @property
    def pruned(self) -> dict[str, list[int]]:
        """Pruned filters by layer, sorted."""
        return self.mask.to_dict()

    @property
    def turned_down(self) -> dict[str, list[int]]:
        """Filters by layer, sorted, of which a method has left less than half, though it did not prune them."""
        kept = self.mask.kept
        found: dict[str, list[int]] = {}
        for layer, index in map(self.mask.locate, ((kept > 0) & (kept < 1 / 2)).nonzero().flatten().tolist()):
            found.setdefault(layer, []).append(index)
        return found

    @property
    def scoring_images(self) -> Tensor:
        """(N, C, H, W) exactly the images whose unlearning loss was scored: with the trigger applied."""
        return self.scoring.triggered

    @property
    def scoring_labels(self) -> Tensor:
        """(N,) the true labels of :attr:`scoring_images`."""
        return self.scoring.labels

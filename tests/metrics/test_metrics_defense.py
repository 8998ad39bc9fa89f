from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lightning_unlearn.metrics import (
    DefenseEffectivenessRating,
    RobustImprovementRate,
    attack_success_rate,
    defense_effectiveness_rating,
    recovery_accuracy,
    robust_improvement_rate,
)

BOTH = pytest.mark.parametrize("kind", [DefenseEffectivenessRating, RobustImprovementRate])

# ACC falls from 5/5 to 4/5. Of the 4 images not of class 0, ASR falls from 3/4 to 1/4, RA rises from 1/4 to 2/4.
LABELS = torch.tensor([0, 1, 2, 3, 1])
ANSWERS = {
    "clean_before": torch.tensor([0, 1, 2, 3, 1]),
    "clean_after": torch.tensor([0, 1, 2, 3, 2]),
    "triggered_before": torch.tensor([0, 0, 0, 0, 1]),
    "triggered_after": torch.tensor([0, 1, 2, 1, 0]),
}
EXPECTED = {DefenseEffectivenessRating: (0.5 - 0.2 + 1) / 2, RobustImprovementRate: (0.25 - 0.2 + 1) / 2}


def part(chosen: slice) -> dict[str, Tensor]:
    return {name: answers[chosen] for name, answers in ANSWERS.items()} | {"labels": LABELS[chosen]}


@BOTH
def test_by_hand(kind: type[Metric]) -> None:
    metric = kind()
    metric.update(**part(slice(None)), targets=0)
    assert metric.compute().item() == pytest.approx(EXPECTED[kind])


@BOTH
def test_batches_and_merged_halves_equal_the_whole(kind: type[Metric]) -> None:
    batches, first, second = kind(), kind(), kind()
    for chosen, half in [(slice(0, 2), first), (slice(2, 5), second)]:
        batches.update(**part(chosen), targets=0)
        half.update(**part(chosen), targets=torch.zeros_like(LABELS[chosen]))
    assert batches.compute().item() == pytest.approx(EXPECTED[kind])
    first.merge_state(second)
    assert first.compute().item() == pytest.approx(EXPECTED[kind])


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000))
def test_they_agree_with_the_functions(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    answers = [torch.randn(12, 3, generator=generator) for _ in range(4)]
    labels = torch.randint(3, (12,), generator=generator)
    targets = (labels + 1) % 3
    accuracies = [(logits.argmax(1) == labels).float().mean() for logits in answers[:2]]
    successes = [attack_success_rate(logits, labels, targets) for logits in answers[2:]]
    recoveries = [recovery_accuracy(logits, labels, targets) for logits in answers[2:]]

    der, rir = DefenseEffectivenessRating(), RobustImprovementRate()
    assert der(*answers, labels, targets).item() == pytest.approx(
        defense_effectiveness_rating(
            acc_before=accuracies[0], asr_before=successes[0], acc_after=accuracies[1], asr_after=successes[1]
        ).item()
    )
    assert rir(*answers, labels, targets).item() == pytest.approx(
        robust_improvement_rate(
            acc_before=accuracies[0], ra_before=recoveries[0], acc_after=accuracies[1], ra_after=recoveries[1]
        ).item()
    )


@pytest.mark.parametrize("compute_groups", [True, False])
def test_in_a_collection(compute_groups: bool) -> None:
    collection = MetricCollection(
        {"der": DefenseEffectivenessRating(), "rir": RobustImprovementRate()}, compute_groups=compute_groups
    )
    collection.update(**part(slice(0, 3)), targets=0)
    collection.update(**part(slice(3, 5)), targets=0)
    values = collection.compute()
    assert values["der"].item() == pytest.approx(EXPECTED[DefenseEffectivenessRating])
    assert values["rir"].item() == pytest.approx(EXPECTED[RobustImprovementRate])


@BOTH
def test_states_are_integers(kind: type[Metric]) -> None:
    metric = kind()
    metric.update(**part(slice(None)), targets=0)
    counts = {name: state.item() for name, state in metric.metric_state.items()}
    assert counts == {
        "correct_before": 5,
        "correct_after": 4,
        "images": 5,
        "successes_before": 3,
        "successes_after": 1,
        "recoveries_before": 1,
        "recoveries_after": 2,
        "considered": 4,
    }
    assert {state.dtype for state in metric.metric_state.values()} == {torch.int64}


@BOTH
def test_no_triggered_image_to_count_is_nan_with_a_warning(kind: type[Metric]) -> None:
    metric = kind()
    metric.update(**part(slice(0, 1)), targets=0)
    with pytest.warns(UserWarning, match="has no image to count, so it is NaN"):
        assert metric.compute().isnan()


@BOTH
@pytest.mark.parametrize("name", list(ANSWERS))
def test_bad_input_raises_and_leaves_the_state(kind: type[Metric], name: str) -> None:
    metric = kind()
    metric.update(**part(slice(None)), targets=0)
    broken = part(slice(None)) | {name: torch.zeros(2, 3)}
    with pytest.raises(ValueError, match=r"preds must have shape \(5, C\) or \(5,\), one a label, but have \(2, 3\)"):
        metric.update(**broken, targets=0)
    assert metric.compute().item() == pytest.approx(EXPECTED[kind])


@BOTH
def test_flags(kind: type[Metric]) -> None:
    assert kind.higher_is_better is True
    assert kind.is_differentiable is False
    assert kind.full_state_update is False

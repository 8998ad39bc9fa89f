from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities import dim_zero_sum

from lightning_unlearn.metrics import AttackSuccessRate, RecoveryAccuracy, attack_success_rate, recovery_accuracy

METRICS = [(AttackSuccessRate, attack_success_rate), (RecoveryAccuracy, recovery_accuracy)]
BOTH = pytest.mark.parametrize(("kind", "function"), METRICS)

CLASSES = torch.tensor([0, 0, 0, 3, 1, 2])
LABELS = torch.tensor([0, 1, 2, 3, 2, 1])


def test_by_hand_over_two_batches() -> None:
    asr, ra = AttackSuccessRate(), RecoveryAccuracy()
    for metric in (asr, ra):
        metric.update(CLASSES[:2], LABELS[:2], 0)
        metric.update(CLASSES[2:], LABELS[2:], torch.zeros(4, dtype=torch.int64))
    assert asr.compute().item() == pytest.approx(2 / 5)
    assert ra.compute().item() == pytest.approx(1 / 5)


@BOTH
@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000), st.integers(1, 19))
def test_batches_and_merged_halves_equal_the_whole(kind: type[Metric], function: object, seed: int, cut: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(20, 3, generator=generator)
    labels = torch.randint(3, (20,), generator=generator)
    targets = (labels + torch.randint(2, (20,), generator=generator)) % 3
    targets[0] = (labels[0] + 1) % 3  # at least one image counts
    whole = function(logits, labels, targets)

    batches = kind()
    batches.update(logits[:cut], labels[:cut], targets[:cut])
    batches.update(logits[cut:], labels[cut:], targets[cut:])
    assert batches.compute() == whole

    first, second = kind(), kind()
    first.update(logits[:cut], labels[:cut], targets[:cut])
    second.update(logits[cut:], labels[cut:], targets[cut:])
    first.merge_state(second)
    assert first.compute() == whole


@BOTH
def test_states_are_integers_summed_over_ranks(kind: type[Metric], function: object) -> None:
    metric = kind()
    metric.update(CLASSES, LABELS, 0)
    assert metric.metric_state == {
        "successes": torch.tensor(2),
        "recoveries": torch.tensor(1),
        "considered": torch.tensor(5),
    }
    assert {state.dtype for state in metric.metric_state.values()} == {torch.int64}
    assert set(metric._reductions.values()) == {dim_zero_sum}


@pytest.mark.parametrize("compute_groups", [True, False])
def test_in_a_collection(compute_groups: bool) -> None:
    # In the first batch as many images reach the target as recover: a collection that took equal counts for equal
    # metrics would give both the same rate from then on.
    collection = MetricCollection([AttackSuccessRate(), RecoveryAccuracy()], compute_groups=compute_groups)
    collection.update(torch.tensor([0, 1]), torch.tensor([1, 1]), 0)
    collection.update(preds=torch.tensor([0, 0]), labels=torch.tensor([1, 1]), targets=torch.tensor([0, 0]))
    assert {name: value.item() for name, value in collection.compute().items()} == {
        "AttackSuccessRate": 0.75,
        "RecoveryAccuracy": 0.25,
    }


@BOTH
def test_forward_gives_the_batch_and_gathers(kind: type[Metric], function: object) -> None:
    metric = kind()
    assert metric(CLASSES[:3], LABELS[:3], 0) == function(CLASSES[:3], LABELS[:3], 0)
    assert metric(CLASSES[3:], LABELS[3:], 0) == function(CLASSES[3:], LABELS[3:], 0)
    assert metric.compute() == function(CLASSES, LABELS, 0)


@BOTH
def test_reset_forgets(kind: type[Metric], function: object) -> None:
    metric = kind()
    metric.update(CLASSES, LABELS, 0)
    metric.reset()
    metric.update(CLASSES[3:], LABELS[3:], 1)
    assert metric.compute() == function(CLASSES[3:], LABELS[3:], 1)


@BOTH
def test_nothing_to_count_is_nan_with_a_warning(kind: type[Metric], function: object) -> None:
    metric = kind()
    metric.update(torch.tensor([2, 1]), torch.tensor([2, 2]), 2)
    with pytest.warns(UserWarning, match="has no image to count, so it is NaN"):
        assert metric.compute().isnan()


@BOTH
def test_an_empty_batch_counts_for_nothing(kind: type[Metric], function: object) -> None:
    metric = kind()
    metric.update(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 0)
    metric.update(CLASSES, LABELS, 0)
    assert metric.compute() == function(CLASSES, LABELS, 0)


@BOTH
def test_bad_input_raises_and_leaves_the_state(kind: type[Metric], function: object) -> None:
    metric = kind()
    metric.update(CLASSES, LABELS, 0)
    with pytest.raises(ValueError, match="preds must have shape"):
        metric.update(CLASSES[:2], LABELS, 0)
    assert metric.compute() == function(CLASSES, LABELS, 0)


@BOTH
def test_a_pickled_metric_goes_on(kind: type[Metric], function: object) -> None:
    metric = kind()
    metric.update(CLASSES[:3], LABELS[:3], 0)
    twin = pickle.loads(pickle.dumps(metric))
    twin.update(CLASSES[3:], LABELS[3:], 0)
    assert twin.compute() == function(CLASSES, LABELS, 0)


def test_flags() -> None:
    assert AttackSuccessRate.higher_is_better is False
    assert RecoveryAccuracy.higher_is_better is True
    for kind in (AttackSuccessRate, RecoveryAccuracy):
        assert kind.is_differentiable is False
        assert kind.full_state_update is False

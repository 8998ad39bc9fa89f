from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_unlearn.metrics import (
    attack_success_rate,
    defense_effectiveness_rating,
    recovery_accuracy,
    robust_improvement_rate,
)

RATES = pytest.mark.parametrize("function", [attack_success_rate, recovery_accuracy])

# Of six triggered images the first is of the target's class; of the other five two reach the target, one recovers.
CLASSES = torch.tensor([0, 0, 0, 3, 1, 2])
LABELS = torch.tensor([0, 1, 2, 3, 2, 1])
CLASSES_TO_CHOOSE = st.integers(0, 3)


def test_by_hand() -> None:
    assert attack_success_rate(CLASSES, LABELS, 0).item() == pytest.approx(2 / 5)
    assert recovery_accuracy(CLASSES, LABELS, 0).item() == pytest.approx(1 / 5)


def test_a_target_for_each_image() -> None:
    # All-to-all over 4 classes: wanted are 1, 2, 3, 0, 3, 2; only the last answer is as wanted.
    targets = (LABELS + 1) % 4
    assert attack_success_rate(CLASSES, LABELS, targets).item() == pytest.approx(1 / 6)
    assert recovery_accuracy(CLASSES, LABELS, targets).item() == pytest.approx(2 / 6)


@RATES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_logits_and_classes_agree(function: Callable[..., Tensor], dtype: torch.dtype) -> None:
    logits = torch.nn.functional.one_hot(CLASSES, 4).to(dtype) * 5 - 2
    assert function(logits, LABELS, 0) == function(CLASSES, LABELS, 0)
    assert function(logits.softmax(dim=1), LABELS, 0) == function(CLASSES, LABELS, 0)


@RATES
def test_one_target_is_the_same_for_each(function: Callable[..., Tensor]) -> None:
    expected = function(CLASSES, LABELS, 2)
    assert function(CLASSES, LABELS, torch.tensor(2)) == expected
    assert function(CLASSES, LABELS, torch.full((6,), 2)) == expected
    assert function(CLASSES.to(torch.uint8), LABELS.to(torch.int32), 2) == expected


@RATES
def test_the_result_is_a_float32_scalar(function: Callable[..., Tensor]) -> None:
    result = function(CLASSES, LABELS, 0)
    assert result.shape == ()
    assert result.dtype == torch.float32


@given(st.lists(st.tuples(CLASSES_TO_CHOOSE, CLASSES_TO_CHOOSE, CLASSES_TO_CHOOSE), min_size=1))
def test_against_plain_python(images: list[tuple[int, int, int]]) -> None:
    preds, labels, targets = torch.tensor(images).T
    counted = [image for image in images if image[1] != image[2]]
    if counted:
        asr, ra = attack_success_rate(preds, labels, targets), recovery_accuracy(preds, labels, targets)
        assert asr.item() == pytest.approx(sum(pred == target for pred, _, target in counted) / len(counted))
        assert ra.item() == pytest.approx(sum(pred == label for pred, label, _ in counted) / len(counted))
        assert asr + ra <= 1 + 1e-6
    else:
        with pytest.warns(UserWarning, match="has no image to count"):
            assert attack_success_rate(preds, labels, targets).isnan()


@pytest.mark.parametrize(
    ("function", "name"), [(attack_success_rate, "attack success"), (recovery_accuracy, "recovery")]
)
@pytest.mark.parametrize("labels", [[], [2, 2]])
def test_nothing_to_count_is_nan_with_a_warning(function: Callable[..., Tensor], name: str, labels: list[int]) -> None:
    with pytest.warns(UserWarning, match=f"The {name}.* has no image to count, so it is NaN") as warned:
        result = function(torch.tensor(labels, dtype=torch.int64), torch.tensor(labels, dtype=torch.int64), 2)
    assert result.isnan()
    assert warned[0].filename == __file__


def test_an_answer_with_nan_is_no_class() -> None:
    nan = float("nan")
    logits = torch.tensor([[nan, nan], [0.0, nan], [1.0, 0.0], [0.0, 1.0]])
    assert attack_success_rate(logits, torch.tensor([1, 1, 1, 1]), 0).item() == 0.25
    assert recovery_accuracy(logits, torch.tensor([1, 1, 1, 1]), 0).item() == 0.25


@RATES
@pytest.mark.parametrize(
    ("preds", "labels", "targets", "error", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 1, dtype=torch.int64), 0, ValueError, r"labels must have shape \(N,\)"),
        (torch.zeros(2, 3), torch.zeros(2), 0, TypeError, "labels must be of an integer dtype, but are torch.float32"),
        (torch.zeros(3, 3), LABELS[:2], 0, ValueError, r"preds must have shape \(2, C\) or \(2,\), one a label, but"),
        (torch.zeros(2, 3, 4), LABELS[:2], 0, ValueError, r"but have \(2, 3, 4\)"),
        (torch.zeros(()), LABELS[:2], 0, ValueError, r"but have \(\)"),
        (torch.zeros(2, 0), LABELS[:2], 0, ValueError, "at least one class, but C is 0"),
        (torch.zeros(2), LABELS[:2], 0, TypeError, r"preds of shape \(N,\) must be classes of an integer dtype"),
        (torch.zeros(2, dtype=torch.bool), LABELS[:2], 0, TypeError, r"must be classes of an integer dtype"),
        (
            CLASSES,
            LABELS,
            torch.zeros(5, dtype=torch.int64),
            ValueError,
            r"targets must be one class or have the label",
        ),
        (CLASSES, LABELS, torch.zeros(1, dtype=torch.int64), ValueError, r"the labels' shape \(6,\), but have \(1,\)"),
        (CLASSES, LABELS, torch.zeros(6), TypeError, "targets must be of an integer dtype, but are torch.float32"),
        (CLASSES, LABELS, 0.0, TypeError, "targets must be a class index or a tensor of them, but is float"),
        (CLASSES, LABELS, True, TypeError, "but is bool"),
        (CLASSES, LABELS, "all_to_all", TypeError, "but is str"),
    ],
)
def test_bad_input_raises(
    function: Callable[..., Tensor],
    preds: Tensor,
    labels: Tensor,
    targets: object,
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        function(preds, labels, targets)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((0.9, 1.0), (0.9, 0.0), 1.0),  # a perfect repair
        ((0.9, 1.0), (0.9, 1.0), 0.5),  # nothing changed
        ((0.9, 1.0), (0.8, 0.1), 0.9),  # (0.9 - 0.1 + 1) / 2: the fall of accuracy is subtracted, not added
        ((0.9, 0.5), (0.95, 0.25), 0.625),  # better accuracy earns nothing
        ((0.9, 0.2), (0.4, 0.8), 0.25),  # a risen ASR costs nothing more
        ((1.0, 0.0), (0.0, 0.0), 0.0),
    ],
)
def test_defense_effectiveness_rating(before: tuple[float, float], after: tuple[float, float], expected: float) -> None:
    rating = defense_effectiveness_rating(
        acc_before=before[0], asr_before=before[1], acc_after=after[0], asr_after=after[1]
    )
    assert rating.item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((0.9, 0.0), (0.9, 1.0), 1.0),
        ((0.9, 0.0), (0.9, 0.0), 0.5),
        ((0.9, 0.0), (0.8, 0.7), 0.8),  # (0.7 - 0.1 + 1) / 2
        ((0.9, 0.5), (0.95, 0.75), 0.625),
        ((0.9, 0.8), (0.4, 0.2), 0.25),
    ],
)
def test_robust_improvement_rate(before: tuple[float, float], after: tuple[float, float], expected: float) -> None:
    rating = robust_improvement_rate(acc_before=before[0], ra_before=before[1], acc_after=after[0], ra_after=after[1])
    assert rating.item() == pytest.approx(expected)


@given(*[st.floats(0, 1)] * 4)
def test_the_ratings_lie_in_0_to_1_and_mirror_each_other(
    acc_before: float, rate_before: float, acc_after: float, rate_after: float
) -> None:
    der = defense_effectiveness_rating(
        acc_before=acc_before, asr_before=rate_before, acc_after=acc_after, asr_after=rate_after
    )
    rir = robust_improvement_rate(
        acc_before=acc_before, ra_before=rate_after, acc_after=acc_after, ra_after=rate_before
    )
    assert 0 <= der <= 1
    assert der == rir


def test_tensors_work_as_rates() -> None:
    rates = {"acc_before": 0.75, "asr_before": 1.0, "acc_after": 0.5, "asr_after": 0.25}
    rating = defense_effectiveness_rating(**{name: torch.tensor(value) for name, value in rates.items()})
    assert rating.item() == 0.75
    assert rating.dtype == torch.float32


@pytest.mark.parametrize("name", ["acc_before", "asr_before", "acc_after", "asr_after"])
def test_nan_stays_nan(name: str) -> None:
    rates = {"acc_before": 0.5, "asr_before": 0.5, "acc_after": 0.5, "asr_after": 0.5, name: math.nan}
    assert defense_effectiveness_rating(**rates).isnan()


@pytest.mark.parametrize("name", ["acc_before", "ra_before", "acc_after", "ra_after"])
@pytest.mark.parametrize("value", [-0.1, 91.5])
def test_a_rate_that_is_no_fraction_raises(name: str, value: float) -> None:
    rates = {"acc_before": 0.5, "ra_before": 0.5, "acc_after": 0.5, "ra_after": 0.5, name: value}
    with pytest.raises(ValueError, match=rf"{name} must be a fraction in \[0, 1\], but is {value}"):
        robust_improvement_rate(**rates)

from __future__ import annotations

import dataclasses
import math
from decimal import Decimal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_unlearn import methods
from lightning_unlearn.evaluation import Evaluation, evaluate
from lightning_unlearn.methods import FineTuning, GradPrune, MaskPrune, RepairMethod, Round, Stopwatch
from lightning_unlearn.methods.base import check_range
from lightning_unlearn.triggers import PatchTrigger


@pytest.fixture
def task(make_net, make_clean, make_task):
    return make_task(make_net("vgg"), make_clean(6), PatchTrigger(target=1), batch_size=7, seed=5)


def test_public_names():
    assert set(methods.__all__) >= {"FineTuning", "GradPrune", "MaskPrune", "RepairMethod", "RepairTask", "Round"}
    assert all(hasattr(methods, name) for name in methods.__all__)


def test_the_interface_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        RepairMethod()


@pytest.mark.parametrize("method", [FineTuning, GradPrune, MaskPrune])
def test_names(method):
    assert method().name == method.__name__
    assert isinstance(method(), RepairMethod)


@pytest.mark.parametrize("method", [FineTuning, GradPrune, MaskPrune])
def test_hyper_parameters_are_keyword_only(method):
    with pytest.raises(TypeError, match="positional"):
        method("mean_abs_grad")


def test_rounds_are_counted_through_all_stages(task):
    now = Evaluation(acc=0.5, asr=0.25, ra=0.75, loss=1.5, unlearning_loss=2.5)
    task.mask.prune([task.mask.locate(0), task.mask.locate(1)])
    first, second = task.round("prune", now, (("0", 1),)), task.round("finetune", now)
    assert first == Round(1, "prune", (("0", 1),), 0.5, 0.25, 0.75, 1.5, 2.5, total_pruned=2)
    assert second == Round(2, "finetune", (), 0.5, 0.25, 0.75, 1.5, 2.5, total_pruned=2)
    assert task.rounds == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.val_acc = 1.0


def test_logits_leave_the_images_as_they_are(task):
    images = task.scoring.clean[:3].clone()
    expected = task.model(images).float()
    task.forward = lambda taken: task.model(taken.mul_(2).div_(2)) + 0 * taken.zero_().sum()
    assert torch.equal(task.logits(images), expected)
    assert torch.equal(images, task.scoring.clean[:3])
    task.forward = lambda taken: task.model(taken).argmax(1)
    with pytest.raises(ValueError, match=r"model: expected logits of shape \(3, classes\)"):
        task.logits(images)


def test_validate_is_of_the_validation_part(task):
    assert task.validate() == evaluate(task.model, [task.validation]) == task.before
    task.mask.prune([("4", 0), ("4", 1)])
    assert task.validate() == evaluate(task.model, [task.validation]) != task.before
    assert task.watch.seconds["evaluate"] > 0


def test_measure_is_of_all_pairs(task):
    everything = task.measure()
    validation, scoring = (evaluate(task.model, [part]) for part in (task.validation, task.scoring))
    assert everything.loss == pytest.approx((4 * validation.loss + 20 * scoring.loss) / 24, rel=1e-5)
    assert everything.acc == pytest.approx((4 * validation.acc + 20 * scoring.acc) / 24, rel=1e-5)
    # One of the four classes is the target, and no part of ASR.
    assert everything.asr == pytest.approx((3 * validation.asr + 15 * scoring.asr) / 18, rel=1e-5)


def test_generators_are_the_seeds(task):
    wanted = torch.randperm(9, generator=torch.Generator().manual_seed(5))
    torch.manual_seed(123)
    for _ in range(2):
        assert torch.equal(torch.randperm(9, generator=task.generator()), wanted)


def test_a_stopwatch_adds_up():
    watch = Stopwatch()
    with watch.measure("score"), watch.measure("total"):
        pass
    first = watch.seconds["score"]
    with watch.measure("score"):
        pass
    assert watch.seconds["score"] > first > 0
    assert set(watch.seconds) == {"score", "total"}


def test_a_stopwatch_counts_what_fails():
    watch = Stopwatch()
    with pytest.raises(KeyError), watch.measure("score"):
        raise KeyError
    assert watch.seconds["score"] > 0


@given(st.floats(allow_nan=False), st.booleans())
def test_check_range(value, open_low):
    if (value > 0 if open_low else value >= 0) and value <= 1:
        check_range("alpha", value, 0, 1, open_low=open_low)
    else:
        bracket = r"\(" if open_low else r"\["
        with pytest.raises(ValueError, match=rf"^alpha: expected a value in {bracket}0, 1\], but got "):
            check_range("alpha", value, 0, 1, open_low=open_low)


def test_nan_is_in_no_range():
    with pytest.raises(ValueError, match=r"^alpha: .* but got nan"):
        check_range("alpha", math.nan, -math.inf, math.inf)
    with pytest.raises(TypeError, match=r"^alpha: expected a number, but got '0.5'"):
        check_range("alpha", "0.5", 0, 1)
    for value in (np.float32(0.5), torch.tensor(0.5), np.array(0.5), Decimal("0.5")):
        check_range("alpha", value, 0, 1)
    with pytest.raises(TypeError, match=r"^alpha: expected a number, but got None"):
        check_range("alpha", None, 0, 1)

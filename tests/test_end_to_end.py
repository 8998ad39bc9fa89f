"""A small net, really trained on real digits with a real backdoor, and really repaired."""

from __future__ import annotations

import copy

import pytest
import torch

from lightning_unlearn.data import overlap
from lightning_unlearn.methods import FineTuning, GradPrune, MaskPrune
from lightning_unlearn.repair import repair
from lightning_unlearn.report import Report

SHORT = FineTuning(triggered=True, learning_rate=1e-3, batch_size=128, patience=10, max_epochs=5, norms="frozen")


@pytest.fixture(scope="module")
def victim(digits_victim):
    """Asserted here too, because the repair of a net that never learned the backdoor proves nothing."""
    assert digits_victim.before.asr >= 0.9
    assert digits_victim.before.acc >= 0.95
    return digits_victim


def mend(victim, **arguments):
    """A fresh victim, repaired, and measured on the test part."""
    net = victim.fresh()
    result = repair(net, victim.holdout, trigger=victim.trigger, **arguments)
    return result, net, victim.measure(net)


@pytest.fixture(scope="module")
def mended(victim):
    """By the default method, with the default 10 images per class. Do not change it."""
    return mend(victim)


def test_nobody_saw_anyone_elses_images(victim):
    assert len(victim.poisoned.poison_indices) == 100
    assert (len(victim.holdout), len(victim.test)) == (200, 597)
    assert overlap(victim.holdout, victim.poisoned) == 0
    assert overlap(victim.holdout, victim.test) == 0
    assert overlap(victim.poisoned, victim.test) == 0


def test_the_default_removes_the_backdoor(victim, mended):
    result, _, after = mended
    assert (result.method, result.status) == ("MaskPrune", "repaired")
    assert len(result.scoring_labels) == 90
    assert after.asr <= 0.1
    assert after.acc >= victim.before.acc - 0.05
    assert victim.before.ra <= 0.1
    assert after.ra >= 0.85
    assert victim.measure(victim.trained) == victim.before


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({"seed": 1}, id="other images"),
        pytest.param({"method": MaskPrune(cut="soft", finetune=False)}, id="soft masks alone"),
        pytest.param({"method": MaskPrune(cut="hard", teacher="labels", steps=60, finetune=SHORT)}, id="hard labels"),
    ],
)
def test_mask_prune_removes_it(victim, arguments):
    _, _, after = mend(victim, **arguments)
    assert after.asr <= 0.1
    assert after.acc >= victim.before.acc - 0.05


def test_two_images_per_class(victim):
    result, _, after = mend(victim, samples_per_class=2)
    assert len(result.scoring_labels) == 10
    assert after.asr <= 0.3
    assert after.acc >= victim.before.acc - 0.1


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(GradPrune(finetune=SHORT), id="the paper's"),
        pytest.param(GradPrune(score="taylor", clean_weight=1.0, look_ahead=8, finetune=SHORT), id="taylor"),
        pytest.param(GradPrune(filters_per_round=2, look_ahead=4, finetune=SHORT), id="by twos"),
    ],
)
def test_grad_prune_helps_and_keeps_its_promises(victim, method):
    result, net, after = mend(victim, method=method)
    assert result.status == "repaired"
    assert after.unlearning_loss < 0.5 * victim.before.unlearning_loss
    assert after.asr < victim.before.asr
    # On the images it was given: no more than α of the accuracy, and lower losses.
    assert result.after.acc >= result.before.acc - 0.1 - 1e-6
    assert result.after.loss + result.after.unlearning_loss < result.before.loss + result.before.unlearning_loss
    for layer, filters in result.pruned.items():
        assert net.get_submodule(layer).weight[filters].count_nonzero() == 0


def test_a_net_without_a_backdoor_is_left_alone(victim, mended):
    _, net, _ = mended
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    result = repair(net, victim.holdout, trigger=victim.trigger)
    assert result.status == "not backdoored"
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_a_net_without_a_backdoor_is_not_ruined_by_force(victim, mended):
    _, net, clean = mended
    net = copy.deepcopy(net)
    result = repair(net, victim.holdout, trigger=victim.trigger, force=True)
    after = victim.measure(net)
    assert result.rounds
    assert after.asr <= clean.asr + 0.02
    assert after.acc >= clean.acc - 0.05


def test_the_report(victim, mended):
    result, _, after = mended
    report = Report.of(result, victim.trigger, samples_per_class=10, seed=0, test=(victim.before, after))
    assert report.measured_on == "test"
    assert report.der >= 0.9
    assert report.rir >= 0.9
    assert report.before == victim.before.rates()

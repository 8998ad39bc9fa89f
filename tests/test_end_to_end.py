"""A small net, really trained on real digits with a real backdoor, and really repaired."""

from __future__ import annotations

import copy

import pytest
import torch

from lightning_unlearn.data import Digits, overlap
from lightning_unlearn.methods import FineTuning, GradPrune, MaskPrune
from lightning_unlearn.repair import repair
from lightning_unlearn.report import Report


@pytest.fixture
def victim(digits_victim):
    """The victim is one; asserted here too, because a repair of a net without a backdoor proves nothing."""
    assert digits_victim.before.asr >= 0.9
    assert digits_victim.before.acc >= 0.95
    assert overlap(digits_victim.holdout, digits_victim.poisoned) == 0
    assert overlap(digits_victim.holdout, digits_victim.test) == 0
    assert overlap(digits_victim.poisoned, digits_victim.test) == 0
    return digits_victim


@pytest.fixture
def mended(victim):
    """Repairs a fresh victim and measures it on the test part."""

    def mend(**arguments):
        net = victim.fresh()
        result = repair(net, victim.holdout, trigger=victim.trigger, **arguments)
        assert result.status == "repaired"
        assert not net.training
        return result, net, victim.measure(net)

    return mend


def test_the_default_removes_the_backdoor(victim, mended):
    result, net, after = mended()
    assert after.asr <= 0.1
    assert after.acc >= victim.before.acc - 0.05
    assert after.ra >= 0.85
    assert victim.before.ra <= 0.1
    assert result.method == "MaskPrune"
    # The trained net itself is where it was.
    assert victim.measure(victim.trained) == victim.before
    assert not torch.equal(net.features[0].weight, victim.trained.features[0].weight) or result.pruned


@pytest.mark.parametrize("seed", [1, 2])
def test_other_images_and_another_order_do_as_well(victim, mended, seed):
    _, _, after = mended(seed=seed)
    assert after.asr <= 0.1
    assert after.acc >= victim.before.acc - 0.05


@pytest.mark.parametrize("cut", ["soft", "hard"])
def test_every_cut_removes_it(victim, mended, cut):
    _, _, after = mended(method=MaskPrune(cut=cut))
    assert after.asr <= 0.1
    assert after.acc >= victim.before.acc - 0.05


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(GradPrune(), id="the paper's"),
        pytest.param(
            GradPrune(score="taylor", clean_weight=1.0, look_ahead=8, finetune=False), id="taylor, look-ahead"
        ),
        pytest.param(GradPrune(filters_per_round=2, finetune=FineTuning(triggered=True, max_epochs=5)), id="by twos"),
    ],
)
def test_grad_prune_makes_nothing_worse(victim, mended, method):
    result, net, after = mended(method=method)
    # What it was promised: never more than α of the accuracy on the validation part, and never a higher L_u there.
    assert result.after.acc > result.before.acc - 0.1 - 1e-6
    assert result.after.loss + result.after.unlearning_loss < result.before.loss + result.before.unlearning_loss
    assert after.asr <= victim.before.asr
    assert after.unlearning_loss < victim.before.unlearning_loss
    for layer, filters in result.pruned.items():
        assert net.get_submodule(layer).weight[filters].count_nonzero() == 0


def test_taylor_with_look_ahead_removes_most_of_it(victim, mended):
    method = GradPrune(score="taylor", clean_weight=1.0, look_ahead=8)
    _, _, after = mended(method=method, samples_per_class=20)
    assert after.asr <= 0.2
    assert after.acc >= victim.before.acc - 0.1


def test_two_images_per_class(victim, mended):
    result, _, after = mended(samples_per_class=2)
    assert len(result.scoring_labels) == 10
    assert after.asr <= victim.before.asr
    assert after.acc >= victim.before.acc - 0.2


def test_a_net_without_the_backdoor_keeps_its_accuracy(victim, mended):
    # The repaired net is left alone, bit for bit; and if forced, its ASR does not rise.
    _, net, after = mended()
    before = copy.deepcopy(net.state_dict())
    again = repair(net, victim.holdout, trigger=victim.trigger)
    assert again.status == "not backdoored"
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    forced = repair(net, victim.holdout, trigger=victim.trigger, force=True)
    assert forced.status in ("repaired", "not improved")
    assert victim.measure(net).asr <= after.asr + 0.02
    assert victim.measure(net).acc >= after.acc - 0.05


def test_the_report(victim, mended):
    result, _, after = mended()
    report = Report.of(result, victim.trigger, samples_per_class=10, seed=0, test=(victim.before, after))
    assert report.measured_on == "test"
    assert report.der >= 0.9
    assert "| ASR ↓ |" in str(report)


def test_the_victim_was_trained_on_what_the_defender_does_not_hold(victim):
    assert len(victim.poisoned.poison_indices) == 100
    assert len(victim.holdout) == 200
    assert isinstance(victim.test, Digits)
    assert len(victim.test) == 597

from dataclasses import FrozenInstanceError

import pytest

from lightning_unlearn.auditor import Auditor
from lightning_unlearn.methods import GradPrune
from lightning_unlearn.plan import RepairPlan, check_trigger
from lightning_unlearn.triggers import PatchTrigger


def test_what_fits_is_kept_as_it_is():
    trigger, method, auditor = PatchTrigger(), GradPrune(), Auditor()
    plan = RepairPlan(trigger=trigger, method=method, batch_size=1, min_asr=1, auditor=auditor)
    assert (plan.trigger, plan.method, plan.auditor) == (trigger, method, auditor)
    with pytest.raises(FrozenInstanceError):
        plan.seed = 1


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        (
            {"trigger": 5},
            TypeError,
            r"^trigger: expected a lightning_unlearn.triggers.Trigger, but got int; .*",
        ),
        ({"method": GradPrune}, TypeError, r"^method: expected a lightning_unlearn.methods.RepairMethod, but got ABC"),
        ({"auditor": "fast"}, TypeError, r"^auditor: expected a lightning_unlearn.auditor.Auditor, but got str"),
        ({"batch_size": 0}, ValueError, r"^batch_size: expected a value in \[1, inf\], but got 0"),
        ({"batch_size": 128 / 2}, TypeError, r"^batch_size: expected a whole number, but got 64.0"),
        ({"seed": None}, TypeError, r"^seed: expected a whole number, but got None"),
        ({"min_asr": -0.1}, ValueError, r"^min_asr: expected a value in \[0, 1\], but got -0.1"),
        ({"min_asr": "0.1"}, TypeError, r"^min_asr: expected a number, but got '0.1'"),
        ({"min_asr": float("nan")}, ValueError, r"^min_asr: expected a value in \[0, 1\], but got nan"),
    ],
    ids=str,
)
def test_what_does_not_is_refused(given, error, match):
    with pytest.raises(error, match=match):
        RepairPlan(**given)


def test_a_trigger_is_named_as_the_argument_it_was_given_for():
    check_trigger("evaluation_trigger", None)
    with pytest.raises(TypeError, match=r"^evaluation_trigger: .* but got function"):
        check_trigger("evaluation_trigger", lambda images: images)

from __future__ import annotations

import inspect

import pytest

from lightning_unlearn import methods
from lightning_unlearn.methods import (
    FinePruning,
    FineTuning,
    GradPrune,
    MaskPrune,
    NeuralAttentionDistillation,
    RepairMethod,
)
from lightning_unlearn.roster import (
    ABBREVIATIONS,
    arguments_of,
    default_methods,
    full_name,
    method_labels,
    method_names,
    refuse_no_methods,
)


class NeedsArguments(RepairMethod):
    def __init__(self, *, strength: float) -> None:
        self.strength = strength

    def repair(self, task):
        return iter(())


def test_every_public_method_is_known():
    expected = {
        name
        for name in methods.__all__
        if isinstance(getattr(methods, name), type) and RepairMethod in getattr(methods, name).__mro__[1:]
    }
    expected.remove("Alternation")  # it makes its own triggers
    assert set(method_names()) == expected
    assert {"FineTuning", "GradPrune", "MaskPrune"} <= expected
    assert "RepairMethod" not in expected
    assert method_names() == sorted(expected)


@pytest.mark.parametrize(("given", "name"), list(ABBREVIATIONS.items()))
def test_abbreviations_stand_for_methods_that_there_are(given, name):
    assert name in method_names()
    assert full_name(given) == full_name(given.lower()) == full_name(name) == name
    assert given not in method_names()


def test_other_names_stay_as_they_are():
    assert [full_name(name) for name in ("MaskPrune", "anp2", "")] == ["MaskPrune", "anp2", ""]
    assert [method.name for method in default_methods(["CLP", "FineTuning"])] == [
        "ChannelLipschitzPruning",
        "FineTuning",
    ]


def test_every_public_method_has_defaults_and_a_plain_label():
    given = default_methods()
    assert [method.name for method in given] == method_names()
    labels = dict(zip(method_names(), method_labels(given), strict=True))
    assert labels.pop("AdversarialNeuronPruning") == "AdversarialNeuronPruning(steps=100, learning_rate=0.2)"
    assert labels.pop("InvertedMaskSelection") == "InvertedMaskSelection(initial_steps=50, joint_steps=100)"
    assert labels.pop("SharedAdversarialUnlearning") == "SharedAdversarialUnlearning(max_epochs=40)"
    assert all(name == label for name, label in labels.items())


def test_some_by_name():
    assert [method.name for method in default_methods(["MaskPrune", "FineTuning"])] == ["MaskPrune", "FineTuning"]
    assert default_methods([]) == []


@pytest.mark.parametrize("name", ["maskprune", "RepairMethod", "Round", ""])
def test_unknown_names(name):
    with pytest.raises(
        ValueError, match=rf"methods: there is no method '{name}'; expected some of .*FineTuning.*GradPr"
    ):
        default_methods(["MaskPrune", name])


def test_an_alternation_is_no_name():
    with pytest.raises(ValueError, match=r"^methods: Alternation makes its own triggers"):
        default_methods(["Alternation"])


@pytest.mark.parametrize(
    ("given", "labels"),
    [
        ([MaskPrune(cut="soft", steps=5)], ["MaskPrune(cut='soft', steps=5)"]),
        ([MaskPrune(accuracy_drop=0.3)], ["MaskPrune(accuracy_drop=0.3)"]),  # the fine-tuning inside follows it
        ([GradPrune(finetune=False)], ["GradPrune(finetune=False)"]),
        (
            [FineTuning(), FineTuning(), FineTuning(patience=3)],
            ["FineTuning", "FineTuning (2)", "FineTuning(patience=3)"],
        ),
        ([NeedsArguments(strength=2.0)], ["NeedsArguments(strength=2.0)"]),
    ],
    ids=["two arguments", "a limit", "no fine-tuning", "three of a kind", "one's own"],
)
def test_labels(given, labels):
    assert method_labels(given) == labels


def test_a_method_inside_is_told_in_full():
    (label,) = method_labels([GradPrune(finetune=FineTuning(triggered=True, max_epochs=3))])
    assert label.startswith("GradPrune(finetune=FineTuning(triggered=True, ")
    assert "max_epochs=3" in label


def test_of_a_method_inside_only_what_differs_is_told():
    given = [FinePruning(finetune=FineTuning(max_epochs=1)), NeuralAttentionDistillation(teacher_epochs=3)]
    labels = ["FinePruning(finetune=FineTuning(max_epochs=1))", "NeuralAttentionDistillation(teacher_epochs=3)"]
    assert method_labels(given) == labels


@pytest.mark.parametrize("name", method_names())
def test_every_method_keeps_all_its_arguments(name):
    kind = getattr(methods, name)
    assert arguments_of(kind()).keys() == inspect.signature(kind).parameters.keys()


def test_arguments_are_plain():
    arguments = arguments_of(MaskPrune(steps=100, finetune=FineTuning(max_epochs=3)))
    assert arguments["finetune"]["max_epochs"] == 3
    assert arguments["steps"] == 100
    assert arguments_of(NeedsArguments(strength=1.0)) == {"strength": 1.0}


def test_none_is_refused():
    with pytest.raises(ValueError, match=r"methods: none is left to compare; give some of .*MaskPrune"):
        refuse_no_methods([])
    with pytest.raises(TypeError, match=r"methods: expected .*RepairMethod each, but got str"):
        refuse_no_methods(["MaskPrune"])

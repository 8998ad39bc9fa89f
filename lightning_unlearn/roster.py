"""Which repair methods there are, and how one is told from another in a table."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_unlearn import methods
from lightning_unlearn.methods import RepairMethod

__all__ = [
    "ABBREVIATIONS",
    "SHORTENED",
    "arguments_of",
    "default_methods",
    "full_name",
    "method_labels",
    "method_names",
    "refuse_no_methods",
]

ABBREVIATIONS = {
    "AGE": "ActivationGuidedEditing",
    "ANP": "AdversarialNeuronPruning",
    "CLP": "ChannelLipschitzPruning",
    "FP": "FinePruning",
    "FT": "FineTuning",
    "FT-SAM": "SharpnessAwareFineTuning",
    "I-BAU": "ImplicitBackdoorUnlearning",
    "IMS": "InvertedMaskSelection",
    "NAD": "NeuralAttentionDistillation",
    "RNP": "ReconstructiveNeuronPruning",
    "SAU": "SharedAdversarialUnlearning",
}
"""What papers, and the tables here, call the published methods."""

SHORTENED: dict[str, dict[str, Any]] = {
    "AdversarialNeuronPruning": {"steps": 100, "learning_rate": 0.2},
    "InvertedMaskSelection": {"initial_steps": 50, "joint_steps": 100},
    "SharedAdversarialUnlearning": {"max_epochs": 40},
}
"""Arguments by which methods end within minutes in a comparison: of 2,000 steps, 500 steps and 100 epochs."""


def method_names() -> list[str]:
    """Names of all repair methods in :mod:`lightning_unlearn.methods` that can be compared, sorted.

    :class:`Alternation` is left out: it makes its own triggers, and a comparison is by one that is given.

    Example:
        >>> from lightning_unlearn.roster import method_names
        >>> {"FineTuning", "GradPrune", "MaskPrune"} <= set(method_names())
        True
    """
    found = {name: getattr(methods, name) for name in methods.__all__}
    return sorted(
        name
        for name, kind in found.items()
        if isinstance(kind, type)
        and issubclass(kind, RepairMethod)
        and not inspect.isabstract(kind)
        and name != "Alternation"
    )


def full_name(name: str) -> str:
    """The name of the method that an abbreviation stands for, in any case of letters; other names stay as they are.

    Example:
        >>> from lightning_unlearn.roster import full_name
        >>> full_name("ft-sam"), full_name("MaskPrune")
        ('SharpnessAwareFineTuning', 'MaskPrune')
    """
    return ABBREVIATIONS.get(name.upper(), name)


def default_methods(names: Sequence[str] | None = None) -> list[RepairMethod]:
    """Methods of :mod:`lightning_unlearn.methods` with their default arguments, all of them by default.

    Names may be abbreviated as papers do (:data:`ABBREVIATIONS`). Methods whose published defaults take far longer than
    the rest are :data:`SHORTENED`, which their label tells.

    Raises:
        ValueError: if a name is of none, listing those that there are.
    """
    known = method_names()
    wanted = known if names is None else [full_name(name) for name in names]
    unknown = [name for name in wanted if name not in known]
    if "Alternation" in unknown:
        raise ValueError(
            "methods: Alternation makes its own triggers, and a comparison is by one that is given; `repair` uses it "
            "where none is."
        )
    if unknown:
        raise ValueError(f"methods: there is no method {unknown[0]!r}; expected some of {', '.join(known)}.")
    return [getattr(methods, name)(**SHORTENED.get(name, {})) for name in wanted]


def refuse_no_methods(given: Sequence[RepairMethod]) -> None:
    """Refuse an empty list of methods, and what is no method.

    Raises:
        ValueError: if there is none.
        TypeError: if one is no RepairMethod.
    """
    if not given:
        raise ValueError(
            f"methods: none is left to compare; give some of {', '.join(method_names())}, or leave it out for all."
        )
    for method in given:
        if not isinstance(method, RepairMethod):
            raise TypeError(
                f"methods: expected lightning_unlearn.methods.RepairMethod each, but got {type(method).__name__}."
            )


def arguments_of(method: RepairMethod) -> dict[str, Any]:
    """A method's hyper-parameters by name, as far as it keeps them; those of a method within it as a dictionary.

    Example:
        >>> from lightning_unlearn.methods import FineTuning, GradPrune
        >>> from lightning_unlearn.roster import arguments_of
        >>> arguments = arguments_of(GradPrune(patience=5, finetune=FineTuning()))
        >>> arguments["patience"], arguments["finetune"]["method"]
        (5, 'FineTuning')
    """
    names = (name for name in inspect.signature(type(method)).parameters if hasattr(method, name))
    return {name: _plain(getattr(method, name)) for name in names}


def method_labels(given: Sequence[RepairMethod]) -> list[str]:
    """A name for each method by which tables tell it from the others: with the arguments that differ from defaults.

    Example:
        >>> from lightning_unlearn.methods import GradPrune, MaskPrune
        >>> from lightning_unlearn.roster import method_labels
        >>> method_labels([GradPrune(), MaskPrune(cut="soft"), GradPrune()])
        ['GradPrune', "MaskPrune(cut='soft')", 'GradPrune (2)']
    """
    labels, seen = [], Counter[str]()
    for method in given:
        changed = ", ".join(_written(name, value) for name, value in _changed(method).items())
        label = f"{method.name}({changed})" if changed else method.name
        seen[label] += 1
        labels.append(f"{label} ({seen[label]})" if seen[label] > 1 else label)
    return labels


def _changed(method: RepairMethod) -> dict[str, Any]:
    """The arguments that differ from those of a method built without them."""
    arguments = arguments_of(method)
    try:
        usual = arguments_of(type(method)())
        changed = {name: value for name, value in arguments.items() if value != usual[name]}
        # What is built inside may follow from an argument, such as the accuracy drop: then it is no change of its own.
        simple = {name: value for name, value in changed.items() if not isinstance(value, Mapping)}
        usual = arguments_of(type(method)(**simple))
    except (TypeError, ValueError):  # arguments without defaults, or only valid together
        return arguments
    return {
        # Of a method within it what differs from that one's own defaults, as one would write it.
        name: {"method": value["method"], **_changed(getattr(method, name))} if name not in simple else value
        for name, value in changed.items()
        if name in simple or value != usual[name]
    }


def _written(name: str, value: Any) -> str:
    if isinstance(value, Mapping):
        inner = ", ".join(_written(key, item) for key, item in value.items() if key != "method")
        return f"{name}={value.get('method', '')}({inner})"
    return f"{name}={value!r}"


def _plain(value: Any) -> Any:
    if isinstance(value, RepairMethod):
        return {"method": value.name, **arguments_of(value)}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else repr(value)

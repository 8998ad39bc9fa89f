"""Every trigger can be written in YAML, by class_path and init_args."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentError, ArgumentParser
from PIL import Image

from lightning_unlearn.triggers import BlendTrigger, ComposeTriggers, PatchTrigger, Trigger


def brighten(pixels):  # without annotations, as users write them
    return pixels + 0.25


def parser() -> ArgumentParser:
    made = ArgumentParser(exit_on_error=False)
    made.add_argument("--trigger", type=Trigger)
    return made


def load(text: str) -> Trigger:
    """Parses, dumps what was parsed, and makes the trigger from the dump."""
    first = parser().parse_string(text)
    again = parser().parse_string(parser().dump(first))
    return parser().instantiate(again).trigger


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("PatchTrigger", "PatchTrigger(3x3, place='bottom_right', target=0)"),
        (
            "{class_path: lightning_unlearn.triggers.PatchTrigger, init_args: {size: 2, place: [1, 4], value: 0.5, "
            "pattern: checkerboard, target: all_to_all, mean: [0.5], std: [0.25]}}",
            "PatchTrigger(2x2, place=(1, 4), target='all_to_all', Normalization(mean=(0.5,), std=(0.25,)))",
        ),
        ("{class_path: BlendTrigger, init_args: {seed: 3}}", "BlendTrigger(ratio=0.2, seed=3, target=0)"),
        ("SinusoidTrigger", "SinusoidTrigger(amplitude=0.1569, frequency=6, target=0)"),
        ("LowFrequencyTrigger", "LowFrequencyTrigger(strength=0.2, seed=0, target=0)"),
        ("{class_path: QuantizeTrigger, init_args: {target: 4}}", "QuantizeTrigger(levels=8, target=4)"),
        ("WarpTrigger", "WarpTrigger(strength=0.5, grid=4, seed=0, target=0)"),
        ("{class_path: FunctionTrigger, init_args: {function: torch.square}}", "FunctionTrigger(square, target=0)"),
    ],
)
def test_each_trigger(text: str, expected: str) -> None:
    assert repr(load(f"trigger: {text}")) == expected


def test_composed_triggers() -> None:
    trigger = load(
        "trigger: {class_path: ComposeTriggers, init_args: {triggers: [PatchTrigger, {class_path: BlendTrigger}]}}"
    )
    assert isinstance(trigger, ComposeTriggers)
    assert [type(part) for part in trigger.triggers] == [PatchTrigger, BlendTrigger]


def test_an_image_file(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "red.png")
    trigger = load(f"trigger: {{class_path: BlendTrigger, init_args: {{pattern: {tmp_path / 'red.png'}, ratio: 1.0}}}}")
    assert trigger(torch.zeros(3, 2, 2))[:, 0, 0].tolist() == [1, 0, 0]


def test_a_function_without_annotations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "brighten_for_test", brighten, raising=False)
    trigger = load("trigger: {class_path: FunctionTrigger, init_args: {function: torch.brighten_for_test}}")
    assert trigger(torch.zeros(1, 1, 1)).item() == 0.25


@pytest.mark.parametrize("init_args", ["{place: middle}", "{place: [1, 2, 3]}", "{target: one}", "{pattern: stripes}"])
def test_bad_values_are_refused(init_args: str) -> None:
    with pytest.raises(ArgumentError, match=init_args[1:-1].split(":")[0]):
        parser().parse_string(f"trigger: {{class_path: PatchTrigger, init_args: {init_args}}}")

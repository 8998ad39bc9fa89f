"""Estimated triggers come back from a file as they were, and nothing else is taken for one."""

from __future__ import annotations

import copy
import json
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from safetensors.torch import load, save

from lightning_unlearn.triggers import (
    AdditiveTrigger,
    CoveringTrigger,
    DisplacingTrigger,
    EstimatedTrigger,
    Normalization,
    ResidualTrigger,
    Trigger,
    TriggerPool,
)
from lightning_unlearn.triggers.families import FAMILIES
from lightning_unlearn.triggers.inversion import Estimate
from lightning_unlearn.triggers.stored import stored

FORMAT = "lightning-unlearn estimated trigger 1"
EACH = pytest.mark.parametrize("family", list(FAMILIES))


def made(family: str, *, target: int = 7, channels: int = 1, height: int = 6, width: int = 5, seed: int = 0) -> Trigger:
    """A trigger with random tensors, of values that no shorter number can hold."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator)

    if family == "additive":
        return AdditiveTrigger(uniform(channels, height, width) - 0.5, target=target)
    if family == "covering":
        return CoveringTrigger(uniform(1, height, width), uniform(channels, height, width), target=target)
    if family == "displacing":
        return DisplacingTrigger(uniform(2, 5, 5) - 0.5, target=target)
    weights = [uniform(4, channels, 3, 3), uniform(4), uniform(channels, 4, 3, 3)]
    return ResidualTrigger(*weights, strength=0.1 + 0.2 / 3, target=target)


def estimates(*families: str, target: int = 7, **options: Any) -> list[Estimate]:
    return [
        Estimate(
            made(family, target=target, seed=place, **options),
            family,
            target,
            0.1 / 3 * place,
            max(0.0, 1 - 0.1 * place),
        )
        for place, family in enumerate(families)
    ]


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


# Back from a file


@settings(max_examples=60, deadline=None)
@given(
    families=st.lists(st.sampled_from(list(FAMILIES)), min_size=1, max_size=12),
    target=st.integers(0, 10**6),
    channels=st.integers(1, 4),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    count=st.integers(0, 14),
    normalized=st.booleans(),
)
def test_any_pool_comes_back_and_stamps_the_same_bits(
    tmp_path_factory, families, target, channels, height, width, count, normalized
):
    found = estimates(*families, target=target, channels=channels, height=height, width=width)
    options: dict[str, Any] = {"mean": [0.45] * channels, "std": [0.22] * channels} if normalized else {}
    original = TriggerPool([estimate.trigger for estimate in found], **options)
    read = EstimatedTrigger(write(tmp_path_factory.mktemp("files") / "trigger.safetensors", stored(found)), **options)
    images = torch.rand(count, channels, height, width, generator=torch.Generator().manual_seed(1))
    if normalized:
        images = original.normalization.apply(images)
    assert read.target == target
    assert torch.equal(read(images), original(images))
    assert [estimate.to_dict() for estimate in read.estimates] == [estimate.to_dict() for estimate in found]
    assert read.normalization == original.normalization


@EACH
def test_each_family_comes_back_as_its_own_class(tmp_path, family):
    path = write(tmp_path / "trigger.safetensors", stored(estimates(family)))
    (trigger,) = EstimatedTrigger(path).triggers
    assert type(trigger) is type(made(family))
    again = EstimatedTrigger(str(path))
    assert all(torch.equal(a, b) for a, b in zip(trigger.buffers(), again.buffers(), strict=True))


def test_it_is_told_a_normalisation_as_any_trigger_is(tmp_path):
    trigger = EstimatedTrigger(write(tmp_path / "t.safetensors", stored(estimates("additive", "covering"))))
    normalization = Normalization((0.5,), (0.25,))
    told, images = trigger.normalized(normalization), torch.rand(4, 1, 6, 5)
    assert trigger.normalization is None
    torch.testing.assert_close(told(normalization.apply(images)), normalization.apply(trigger(images)))
    assert torch.equal(copy.deepcopy(told)(images), told(images))


def test_it_is_read_once(tmp_path):
    path = write(tmp_path / "trigger.safetensors", stored(estimates("additive")))
    trigger, images = EstimatedTrigger(path), torch.rand(2, 1, 6, 5)
    before = trigger(images)
    path.unlink()
    assert torch.equal(trigger(images), before)
    assert torch.equal(copy.deepcopy(trigger)(images), before)


def test_it_is_read_from_wherever_fsspec_reaches():
    from fsspec.core import url_to_fs

    files, place = url_to_fs("memory://stored/trigger.safetensors")
    files.pipe(place, stored(estimates("displacing")))
    assert EstimatedTrigger("memory://stored/trigger.safetensors").target == 7


def test_in_yaml(tmp_path):
    path = write(tmp_path / "trigger.safetensors", stored(estimates("covering")))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--trigger", type=Trigger)
    read = parser.parse_string(
        f"trigger: {{class_path: EstimatedTrigger, init_args: {{path: {path}, mean: [0.5], std: [1]}}}}"
    )
    trigger = parser.instantiate(parser.parse_string(parser.dump(read))).trigger
    assert (trigger.target, trigger.normalization) == (7, Normalization((0.5,), (1.0,)))
    by_options = parser.parse_args(["--trigger=EstimatedTrigger", f"--trigger.path={path}"])
    assert parser.instantiate(by_options).trigger.target == 7


def test_what_it_looks_like(tmp_path):
    trigger = EstimatedTrigger(write(tmp_path / "t.safetensors", stored(estimates("additive", "residual"))))
    assert "additive, residual, target=7" in repr(trigger)


# Written


def test_a_file_holds_tensors_and_words_alone(tmp_path):
    data = stored(estimates("covering", "residual"))
    (size,) = struct.unpack("<Q", data[:8])
    metadata = json.loads(data[8 : 8 + size])["__metadata__"]
    assert (metadata["format"], metadata["target"]) == (FORMAT, "7")
    first, second = json.loads(metadata["triggers"])
    assert first == {"family": "covering", "cost": 0.0, "success": 1.0}
    assert second == {"family": "residual", "cost": 0.1 / 3, "success": 0.9, "strength": 0.1 + 0.2 / 3}
    assert sorted(load(data)) == ["0.mask", "0.pattern", "1.bias", "1.first", "1.second"]


def test_estimates_of_several_classes_are_refused():
    with pytest.raises(ValueError, match=r"^estimates: expected some of one class, but got those of \[3, 7\]"):
        stored(estimates("additive") + estimates("additive", target=3))


def test_no_estimates_are_refused():
    with pytest.raises(ValueError, match=r"^estimates: expected some of one class, but got those of \[\]"):
        stored([])


# Something else


def bad(**changes: Any) -> bytes:
    """An additive trigger's file with other metadata or tensors; None takes one away."""
    one = {"family": "additive", "cost": 0.1, "success": 1.0} | changes.pop("one", {})
    triggers = json.dumps([{name: value for name, value in one.items() if value is not None}])
    metadata = {"format": FORMAT, "target": "7", "triggers": triggers} | changes.pop("metadata", {})
    tensors = {"0.pattern": torch.zeros(1, 6, 5)} | changes
    return save(
        {name: tensor for name, tensor in tensors.items() if tensor is not None},
        {name: value for name, value in metadata.items() if value is not None},
    )


def test_the_pattern_of_bad_files_is_good(tmp_path):
    assert EstimatedTrigger(write(tmp_path / "good", bad())).target == 7


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is no safetensors file"),
        (b"not at all", "is no safetensors file"),
        (pickle.dumps({"target": 7}), "is no safetensors file"),
        (bad()[:-1], "is no safetensors file"),
        (save({"weight": torch.zeros(2)}), "holds no estimated trigger: its metadata give the format None instead of"),
        (bad(metadata={"format": "lightning-unlearn estimated trigger 2"}), "give the format '.* 2' instead of '.* 1'"),
        (bad(metadata={"target": None}), "is a damaged estimated trigger: it lacks 'target'"),
        (bad(metadata={"target": "seven"}), "damaged .* 'seven'"),
        (bad(metadata={"target": "-1"}), "damaged .*: target must be a class index of 0 or more"),
        (bad(metadata={"triggers": None}), "damaged .*: it lacks 'triggers'"),
        (bad(metadata={"triggers": "[{"}), "damaged .*"),
        (bad(metadata={"triggers": "[]"}), r"damaged .*: triggers: expected a list of one trigger or more, .* \[\]"),
        (bad(metadata={"triggers": '{"family": 1}'}), "damaged .*: triggers: expected a list .*"),
        (bad(metadata={"triggers": "[3]"}), "damaged .*: triggers: expected a list .*"),
        (bad(one={"family": "patch"}), "family: expected one of additive, covering, displacing, residual, .* 'patch'"),
        (bad(one={"family": None}), "damaged .*: it lacks 'family'"),
        (bad(one={"cost": None}), "damaged .*: it lacks 'cost'"),
        (bad(one={"success": "all"}), "damaged .*: could not convert string to float"),
        (bad(one={"cost": float("nan")}), "damaged .*: cost: expected a finite number of at least 0, but got nan"),
        (bad(one={"cost": float("inf")}), "damaged .*: cost: expected a finite number of at least 0, but got inf"),
        (bad(one={"cost": -0.1}), "damaged .*: cost: expected a finite number of at least 0, but got -0.1"),
        (bad(one={"cost": 10**400}), "damaged .*: int too large to convert to float"),
        (bad(one={"success": 1.1}), r"damaged .*: success: expected a share in \[0, 1\], but got 1.1"),
        (bad(one={"success": float("nan")}), r"damaged .*: success: expected a share in \[0, 1\], but got nan"),
        (bad(metadata={"triggers": "[" * 200_000}), "damaged .*: maximum recursion depth exceeded"),
        (bad(one={"strength": 0.2}), "damaged .* unexpected keyword argument 'strength'"),
        (bad(one={"family": "covering"}), "damaged .* missing 1 required positional argument: 'mask'"),
        (bad(**{"0.pattern": None, "x": torch.zeros(1)}), "damaged .* missing 1 required positional argument"),
        (bad(**{"1.pattern": torch.zeros(1, 6, 5)}), "damaged .*: nothing is said of the tensors 1.pattern"),
        (bad(**{"0.extra": torch.zeros(1)}), "damaged .* unexpected keyword argument 'extra'"),
        (bad(**{"0.pattern": torch.full((1, 6, 5), torch.nan)}), "damaged .*: pattern: expected a finite float tensor"),
        (bad(**{"0.pattern": torch.zeros(6, 5)}), r"pattern: expected a finite float tensor .* shape \(6, 5\)"),
        (bad(**{"0.pattern": torch.zeros(1, 6, 5, dtype=torch.int8)}), "damaged .* but got torch.int8"),
        (
            bad(**{"0.pattern": torch.zeros(1, 6, 5).to(torch.float8_e4m3fn)}),
            "expected float32, but got .*e4m3fn",
        ),
    ],
)
def test_bad_files_one_by_one(tmp_path, data, message):
    path = write(tmp_path / "bad.safetensors", data)
    with pytest.raises(ValueError, match=f"^path: '.*bad.safetensors' .*{message}"):
        EstimatedTrigger(path)


@pytest.mark.parametrize("path", ["nowhere.safetensors", "."])
def test_no_file(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"^path: there is no file '{path}'"):
        EstimatedTrigger(path)


@pytest.mark.parametrize("family", ["additive", "covering", "residual"])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_other_channels(tmp_path, family, channels):
    path = write(tmp_path / "t.safetensors", stored(estimates(family, channels=4 - channels)))
    with pytest.raises(ValueError, match=r"images: this trigger was estimated for .* but these have"):
        EstimatedTrigger(path)(torch.rand(2, channels, 6, 5))


@pytest.mark.parametrize("family", ["additive", "covering"])
def test_images_of_another_size(tmp_path, family):
    trigger = EstimatedTrigger(write(tmp_path / "t.safetensors", stored(estimates(family))))
    with pytest.raises(ValueError, match=r"estimated for images of \(1, 6, 5\), but these have \(1, 5, 6\)"):
        trigger(torch.rand(2, 1, 5, 6))


def test_a_warp_goes_with_any_size(tmp_path):
    trigger = EstimatedTrigger(write(tmp_path / "t.safetensors", stored(estimates("displacing"))))
    assert trigger(torch.rand(2, 3, 9, 12)).shape == (2, 3, 9, 12)


@pytest.mark.parametrize("given", [{"mean": [0.5]}, {"std": [0.5]}])
def test_half_a_normalisation(tmp_path, given):
    with pytest.raises(ValueError, match="mean and std must be given together"):
        EstimatedTrigger(write(tmp_path / "t.safetensors", stored(estimates("additive"))), **given)

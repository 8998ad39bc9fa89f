from __future__ import annotations

import copy
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lightning_unlearn.checkpoint import Checkpoint, load_checkpoint
from lightning_unlearn.folder import Folder


def checkpoint():
    """What Lightning's Trainer saves, in small."""
    return {
        "epoch": 3,
        "global_step": 40,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": {"net.weight": torch.arange(6.0).view(2, 3), "net.bias": torch.zeros(2)},
        "loops": {"fit_loop": {"epoch_progress": {"total": {"ready": 4}}}},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5), "best_model_path": "somewhere"}},
        "optimizer_states": [{"state": {0: {"momentum_buffer": torch.ones(2, 3)}}, "param_groups": [{"lr": 0.1}]}],
        "lr_schedulers": [{"last_epoch": 3}],
        "hparams_name": "kwargs",
        "hyper_parameters": {"width": 8, "names": ["a", "b"], "_instantiator": "lightning.pytorch.cli.instantiate"},
    }


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


# load_checkpoint


def test_a_checkpoint_is_loaded(tmp_path):
    path, saved = tmp_path / "last.ckpt", checkpoint()
    torch.save(saved, path)
    for given in (path, str(path)):
        found = load_checkpoint(given)
        loaded = found.content
        assert (found.entry, found.path) == ("state_dict", str(path))
        assert list(loaded) == list(saved)
        assert loaded["hyper_parameters"] == saved["hyper_parameters"]
        assert torch.equal(loaded["state_dict"]["net.weight"], saved["state_dict"]["net.weight"])


def bare_pickle(content, path):
    path.write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize("where", ["hyper_parameters", "state_dict", "callbacks"])
@pytest.mark.parametrize("save", [torch.save, bare_pickle])
def test_objects_that_run_code_are_refused_and_do_not_run(tmp_path, save, where):
    path, content = tmp_path / "evil.ckpt", checkpoint()
    content[where]["payload"] = Bomb(tmp_path / "boom")
    save(content, path)
    with pytest.raises(ValueError, match=r"^ckpt_path: '.*evil.ckpt' cannot be loaded with weights_only=True"):
        load_checkpoint(path)
    assert os.listdir(tmp_path) == ["evil.ckpt"]
    # The bomb is real: an ordinary load sets it off.
    if save is torch.save:
        torch.load(path, weights_only=False)
        assert (tmp_path / "boom").is_dir()


@pytest.mark.parametrize("name", ["missing.ckpt", "."])
def test_no_such_file(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=r"^ckpt_path: there is no file '"):
        load_checkpoint(tmp_path / name)


@pytest.mark.parametrize("content", [[1, 2], {"model": {}}, torch.zeros(3)])
def test_something_else(tmp_path, content):
    path = tmp_path / "other.pt"
    torch.save(content, path)
    with pytest.raises(
        ValueError, match=r"^ckpt_path: '.*other.pt' holds no weights; expected a Lightning checkpoint, a .safetensors"
    ):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "damage", [lambda content: content[: len(content) // 2], lambda content: b"", lambda c: b"hello"]
)
def test_a_damaged_file(tmp_path, damage):
    path = tmp_path / "damaged.ckpt"
    torch.save(checkpoint(), path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"^ckpt_path: '.*damaged.ckpt' cannot be loaded .* so it is damaged or holds"):
        load_checkpoint(path)


# Weights that are not Lightning's


WEIGHTS = {"conv.weight": torch.arange(4.0).view(2, 2), "conv.bias": torch.ones(2)}


@pytest.mark.parametrize(
    ("content", "entry"),
    [
        (WEIGHTS, None),
        ({"model": WEIGHTS, "epoch": 7}, "model"),
        ({"net": WEIGHTS, "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": []}}, "net"),
        ({"state_dict": WEIGHTS, "arch": "resnet18"}, "state_dict"),
    ],
    ids=["alone", "in a dict", "beside an optimizer's", "under Lightning's name"],
)
def test_weights_are_found(tmp_path, content, entry):
    torch.save(content, tmp_path / "handed.pth")
    found = load_checkpoint(tmp_path / "handed.pth")
    assert found.entry == entry
    assert same(found.weights, WEIGHTS)


def test_safetensors(tmp_path):
    save_file(WEIGHTS, tmp_path / "handed.safetensors")
    found = load_checkpoint(tmp_path / "handed.safetensors")
    assert found.entry is None
    assert same(found.weights, WEIGHTS)
    (tmp_path / "damaged.safetensors").write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"^ckpt_path: '.*damaged.safetensors' cannot be loaded"):
        load_checkpoint(tmp_path / "damaged.safetensors")


def test_one_of_several_models_must_be_chosen(tmp_path):
    torch.save({"model": WEIGHTS, "ema": WEIGHTS}, tmp_path / "two.pt")
    with pytest.raises(ValueError, match=r"^ckpt_path: '.*two.pt' holds several models' weights \('model', 'ema'\)"):
        load_checkpoint(tmp_path / "two.pt")


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        (["a.w", "b.w"], ["net.a.w", "net.b.w"]),
        (["module.a.w", "module.b.w"], ["a.w", "b.w"]),
        (["model._orig_mod.a.w", "model._orig_mod.b.w"], ["net.a.w", "net.b.w"]),
        (["a.w"], ["net.a.w"]),
        (["features.0.w", "features.1.w"], ["net.features.0.w", "net.features.1.w"]),
    ],
)
def test_what_all_names_begin_with_does_not_matter(stored, wanted):
    tensors = [torch.tensor(float(number)) for number in range(len(stored))]
    found = Checkpoint(dict(zip(stored, tensors, strict=True)), None, "handed.pt").named_as(wanted)
    assert list(found.weights.items()) == list(zip(wanted, tensors, strict=True))
    assert list(found.named_as(wanted).weights) == wanted  # asked again
    assert list(found.repaired(found.weights)) == stored


@pytest.mark.parametrize(
    "wanted",
    [["a.w", "b.w"], ["a.w", "b.w", "c.w"], ["net.a.w"], ["net.a.w", "net.c.w"], ["x.a.w", "y.b.w"], []],
    ids=" ".join,
)
def test_names_that_differ_otherwise_stay(wanted):
    found = Checkpoint({"a.w": torch.ones(1), "b.w": torch.ones(1)}, None, "handed.pt").named_as(wanted)
    assert list(found.weights) == ["a.w", "b.w"]


@pytest.mark.parametrize("name", ["handed.pth", "handed.pt", "handed.bin", "handed", "handed.safetensors"])
def test_a_repaired_file_is_of_its_kind(tmp_path, name):
    shared = torch.full((2, 2), 3.0).T  # neither contiguous nor, in two places, safe for safetensors
    new = {"net.conv.weight": shared, "net.conv.bias": shared[0]}
    found = Checkpoint(WEIGHTS, None, str(tmp_path / name)).named_as(list(new))
    saved = [found.save_repaired(new, Folder(tmp_path)) for _ in range(2)]
    stem, suffix = name.partition(".")[0], "." + (name.partition(".")[2] or "ckpt")
    assert saved == [str(tmp_path / f"{stem}-unlearned{mark}{suffix}") for mark in ("", "-v1")]
    read = load_checkpoint(saved[0])
    assert read.entry is None
    assert same(read.weights, {"conv.weight": torch.full((2, 2), 3.0), "conv.bias": torch.full((2,), 3.0)})


def test_nothing_of_the_old_weights_is_left_beside_the_repaired_ones():
    """The names are those of timm's and many papers' training scripts."""
    old = {"momentum": [(torch.ones(2), 1)]}
    content = {"state_dict": WEIGHTS, "epoch": 7, "args": {"lr": 0.1}, "optimizer": old, "ema": torch.ones(2)}
    repaired = Checkpoint(content, "state_dict", "handed.pt").repaired({"conv.bias": torch.zeros(2)})
    assert repaired.keys() == {"state_dict", "epoch", "args"}
    assert list(repaired["state_dict"]) == ["conv.bias"]


# Repaired checkpoints of Lightning


def test_a_repaired_checkpoint(tmp_path):
    original = checkpoint()
    before = copy.deepcopy(original)
    weights = {"net.weight": torch.full((2, 3), 7.0, requires_grad=True), "net.bias": torch.ones(2)}
    repaired = Checkpoint(original, "state_dict", "last.ckpt").repaired(weights)
    assert set(repaired) == set(original) - {"optimizer_states", "lr_schedulers", "loops"}
    assert all(torch.equal(repaired["state_dict"][key], weight) for key, weight in weights.items())
    assert list(repaired["state_dict"]) == list(weights)
    assert not any(tensor.requires_grad for tensor in repaired["state_dict"].values())
    for key in ("hyper_parameters", "hparams_name", "callbacks", "epoch", "global_step", "pytorch-lightning_version"):
        assert repaired[key] == original[key]
    # The original is as it was, and what was made can be read back.
    assert list(original) == list(before)
    assert torch.equal(original["state_dict"]["net.weight"], before["state_dict"]["net.weight"])
    torch.save(repaired, tmp_path / "repaired.ckpt")
    assert load_checkpoint(tmp_path / "repaired.ckpt").content["hyper_parameters"] == before["hyper_parameters"]


def test_a_checkpoint_without_training_state():
    assert Checkpoint({"state_dict": {}, "epoch": 1}, "state_dict", "a.ckpt").repaired({}) == {
        "state_dict": {},
        "epoch": 1,
    }


def test_weights_that_were_averaged_are_not_kept_beside_the_repaired_ones():
    """As Lightning's WeightAveraging writes them."""
    content = checkpoint() | {"current_model_state": {"net.bias": torch.ones(2)}, "averaging_state": {"n": 3}}
    repaired = Checkpoint(content, "state_dict", "last.ckpt").repaired({"net.bias": torch.zeros(2)})
    assert not {"current_model_state", "averaging_state"} & repaired.keys()


def test_a_header_that_says_nothing_in_so_many_words(tmp_path):
    header = json.dumps({"__metadata__": None, "w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    found = load_checkpoint(tmp_path / "w.safetensors")
    assert Path(found.save_repaired(found.weights, Folder(str(tmp_path)))).is_file()


@pytest.mark.parametrize("metadata", [None, {"format": "pt", "source": "somewhere", "epoch": "7"}])
def test_what_a_safetensors_file_says_of_itself_is_kept(tmp_path, metadata):
    save_file(WEIGHTS, tmp_path / "handed.safetensors", metadata)
    found = load_checkpoint(tmp_path / "handed.safetensors").named_as(WEIGHTS)
    with safe_open(found.save_repaired(WEIGHTS, Folder(str(tmp_path))), "pt") as repaired:
        assert repaired.metadata() == (metadata or {"format": "pt"})

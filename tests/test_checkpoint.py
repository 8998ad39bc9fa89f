from __future__ import annotations

import copy
import os
import pickle

import pytest
import torch

from lightning_unlearn.checkpoint import load_checkpoint, repaired_checkpoint


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
        loaded = load_checkpoint(given)
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
        ValueError, match=r"^ckpt_path: '.*other.pt' is no Lightning checkpoint: it holds no 'state_dict'"
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


# repaired_checkpoint


def test_a_repaired_checkpoint(tmp_path):
    original = checkpoint()
    before = copy.deepcopy(original)
    weights = {"net.weight": torch.full((2, 3), 7.0, requires_grad=True), "net.bias": torch.ones(2)}
    repaired = repaired_checkpoint(original, weights)
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
    assert load_checkpoint(tmp_path / "repaired.ckpt")["hyper_parameters"] == before["hyper_parameters"]


def test_a_checkpoint_without_training_state():
    assert repaired_checkpoint({"state_dict": {}, "epoch": 1}, {}) == {"state_dict": {}, "epoch": 1}

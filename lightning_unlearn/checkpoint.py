"""Read files of weights without running code in them, and make repaired ones of the same kind."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any

import safetensors.torch
import torch
from fsspec.core import url_to_fs
from torch import Tensor

from lightning_unlearn.folder import Folder

__all__ = ["Checkpoint", "load_checkpoint"]

_LIGHTNING = "state_dict"
# What Lightning's WeightAveraging keeps beside the averages that are the state dict: the last weights, as backdoored.
_AVERAGING = ("current_model_state", "averaging_state")
_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a file holds: weights, and what stands beside them.

    Attributes:
        content: all that the file holds.
        entry: under which name it holds the weights, ``"state_dict"`` in Lightning's; None if it is weights alone.
        path: where it is.
        names: for each weight's name in the file its name in the model, where :meth:`named_as` found that they differ.
        metadata: what a ``.safetensors`` file says of itself.

    Example:
        >>> import torch
        >>> from lightning_unlearn.checkpoint import Checkpoint
        >>> handed = Checkpoint({"module.fc.bias": torch.ones(2)}, entry=None, path="handed.pth")
        >>> handed = handed.named_as(["net.fc.bias"])
        >>> handed.weights
        {'net.fc.bias': tensor([1., 1.])}
        >>> handed.repaired({"net.fc.bias": torch.zeros(2)})
        {'module.fc.bias': tensor([0., 0.])}
    """

    content: Mapping[str, Any]
    entry: str | None
    path: str
    names: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights by their names in the model."""
        return {self.names.get(name, name): tensor for name, tensor in self._stored.items()}

    @property
    def _stored(self) -> Mapping[str, Tensor]:
        stored: Mapping[str, Tensor] = self.content if self.entry is None else self.content[self.entry]
        return stored

    def named_as(self, names: Collection[str]) -> Checkpoint:
        """The same for a model of these names, if its differ from the file's by what all of them begin with.

        So a network's own weights fit the module that wraps it, and those of ``DataParallel`` or ``torch.compile``,
        or of another wrapper, the plain one.
        """
        found = list(self._stored)
        if not set(found) <= set(names):
            for ours in _beginnings(found):
                for theirs in _beginnings(names):
                    renamed = {name: theirs + name[len(ours) :] for name in found}
                    if set(renamed.values()) == set(names):
                        return replace(self, names=renamed)
        return self

    def repaired(self, weights: Mapping[str, Tensor]) -> dict[str, Any]:
        """What the file holds, with repaired weights under the file's own names.

        Optimizer states go, since their momentum belongs to the old weights; of files that are not Lightning's all
        goes that holds any other tensors, which may be as old.

        Args:
            weights: all of the model's, by their names in the model.
        """
        in_file = {ours: name for name, ours in self.names.items()}
        # Copies, since safetensors takes no two weights that share memory.
        new = {in_file.get(name, name): tensor.detach().cpu().clone() for name, tensor in weights.items()}
        if self.entry is None:
            return new
        if "pytorch-lightning_version" in self.content:
            left_out = {"optimizer_states", "lr_schedulers", "loops", *_AVERAGING}
        else:
            left_out = {name for name, value in self.content.items() if name != self.entry and _holds_tensors(value)}
        return {**{name: value for name, value in self.content.items() if name not in left_out}, self.entry: new}

    def save_repaired(self, weights: Mapping[str, Tensor], folder: Folder) -> str:
        """Write :meth:`repaired` beside nothing of the same name, whole or not at all; where it is.

        The file is of the kind of the original and named after it, ``NAME-unlearned``.

        Raises:
            OSError: if it cannot be written.
        """
        path, content = PurePath(self.path), self.repaired(weights)
        suffix = path.suffix if path.suffix in _SUFFIXES else ".ckpt"
        if suffix == ".safetensors":
            tensors = {name: tensor.contiguous() for name, tensor in content.items()}
            data = safetensors.torch.save(tensors, {"format": "pt", **self.metadata})
        else:
            buffer = io.BytesIO()  # torch's own writer turns a full disk into an error that does not say so
            torch.save(content, buffer)
            data = buffer.getvalue()
        name = folder.free(f"{path.stem}-unlearned{suffix}")
        with folder.whole(name) as partial:
            folder.fs.pipe(partial, data)
        return folder.path(name)


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Load a file of weights onto the CPU without running any code that it may hold.

    Args:
        path: a file on this machine, or an address that fsspec knows, such as ``s3://bucket/last.ckpt``: a Lightning
            checkpoint, a state dict, alone or under any name in a dict, or a ``.safetensors`` file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds more than tensors and plain Python, or no weights, or several models' weights.
    """
    files, place = url_to_fs(os.fspath(path))
    metadata: dict[str, str] = {}
    if not files.isfile(place):
        raise FileNotFoundError(f"ckpt_path: there is no file {str(path)!r}.")
    try:
        with files.open(place, "rb") as file:
            if PurePath(place).suffix == ".safetensors":
                data = file.read()
                content: Any = safetensors.torch.load(data)
                header = data[8 : 8 + int.from_bytes(data[:8], "little")]  # as the format has it: its length before it
                metadata = json.loads(header).get("__metadata__") or {}
            else:
                content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"ckpt_path: {str(path)!r} cannot be loaded with weights_only=True, so it is damaged or holds Python "
            "objects that could run code on loading. Save it again with plain hyper-parameters, or its state dict "
            f"alone. ({error})"
        ) from error
    return Checkpoint(content, _entry(content, path), os.fspath(path), metadata=metadata)


def _entry(content: object, path: str | os.PathLike[str]) -> str | None:
    """Under which name a file holds weights."""
    if _are_weights(content):
        return None
    entries = content if isinstance(content, Mapping) else {}
    if isinstance(entries.get(_LIGHTNING), Mapping):
        return _LIGHTNING
    found = [name for name, value in entries.items() if isinstance(name, str) and _are_weights(value)]
    if len(found) == 1:
        return found[0]
    problem = f"holds several models' weights ({', '.join(map(repr, found))})" if found else "holds no weights"
    raise ValueError(
        f"ckpt_path: {str(path)!r} {problem}; expected a Lightning checkpoint, a .safetensors file, or a model's "
        "state dict, alone or as the only one in a dict."
    )


def _are_weights(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items())
    )


def _holds_tensors(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_tensors, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_holds_tensors, value))
    return isinstance(value, Tensor)


def _beginnings(names: Collection[str]) -> Iterator[str]:
    """What all dotted names begin with: nothing, ``"module."``, ``"module.net."`` and so on."""
    yield ""
    low, high = min(names, default=""), max(names, default="")  # what these two share, all share
    for place, (one, other) in enumerate(zip(low, high, strict=False), start=1):
        if one != other:
            return
        if one == ".":
            yield low[:place]

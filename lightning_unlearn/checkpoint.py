"""Read checkpoints without running code in them, and make repaired ones."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from typing import Any

import torch
from fsspec.core import url_to_fs
from torch import Tensor

from lightning_unlearn.folder import Folder

__all__ = ["load_checkpoint", "repaired_checkpoint", "save_repaired"]


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Load a Lightning checkpoint onto the CPU without running any code that it may hold.

    Args:
        path: a file on this machine, or an address that fsspec knows, such as ``s3://bucket/last.ckpt``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds more than tensors and plain Python, or no ``state_dict``.
    """
    files, place = url_to_fs(os.fspath(path))
    if not files.isfile(place):
        raise FileNotFoundError(f"ckpt_path: there is no file {str(path)!r}.")
    try:
        with files.open(place, "rb") as file:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"ckpt_path: {str(path)!r} cannot be loaded with weights_only=True, so it is damaged or holds Python "
            f"objects that could run code on loading. Save it again with plain hyper-parameters. ({error})"
        ) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), Mapping):
        raise ValueError(f"ckpt_path: {str(path)!r} is no Lightning checkpoint: it holds no 'state_dict'.")
    return checkpoint


def repaired_checkpoint(checkpoint: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The same checkpoint with repaired weights; optimizer states go: their momentum belongs to the old weights."""
    kept = {
        key: value for key, value in checkpoint.items() if key not in ("optimizer_states", "lr_schedulers", "loops")
    }
    return {**kept, "state_dict": {name: tensor.detach().cpu() for name, tensor in weights.items()}}


def save_repaired(checkpoint: Mapping[str, Any], weights: Mapping[str, Tensor], folder: Folder, name: str) -> str:
    """Write :func:`repaired_checkpoint` whole or not at all; where it is.

    Raises:
        OSError: if it cannot be written.
    """
    buffer = io.BytesIO()  # torch's own writer turns a full disk into an error that does not say so
    torch.save(repaired_checkpoint(checkpoint, weights), buffer)
    with folder.whole(name) as partial:
        folder.fs.pipe(partial, buffer.getvalue())
    return folder.path(name)

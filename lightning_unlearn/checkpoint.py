"""Write repaired checkpoints: beside the original, never over it, whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["free_path", "load_checkpoint", "repaired_checkpoint", "write_whole"]


def free_path(path: Path) -> Path:
    """The path itself, or the first of ``name-v1.ext``, ``name-v2.ext``, … that does not exist.

    Example:
        >>> from pathlib import Path
        >>> from lightning_unlearn.checkpoint import free_path
        >>> free_path(Path("surely") / "not-there.ckpt").name
        'not-there.ckpt'
    """
    number, free = 0, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.stem}-v{number}{path.suffix}")
    return free


def write_whole(path: Path, write: Callable[[Path], object]) -> Path:
    """Let ``write`` write to a temporary name beside ``path`` and rename it when it is done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Load a Lightning checkpoint onto the CPU without running any code that it may hold.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds more than tensors and plain Python, or no ``state_dict``.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"ckpt_path: there is no file {str(path)!r}.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"ckpt_path: {str(path)!r} cannot be loaded with weights_only=True, so it is damaged or holds Python objects that could "
            f"run code on loading. Save it again with plain hyper-parameters. ({error})"
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"ckpt_path: {str(path)!r} is no Lightning checkpoint: it holds no 'state_dict'.")
    return checkpoint


def repaired_checkpoint(checkpoint: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The same checkpoint with repaired weights; optimizer states go, since their momentum belongs to the old weights."""
    kept = {
        key: value for key, value in checkpoint.items() if key not in ("optimizer_states", "lr_schedulers", "loops")
    }
    return {**kept, "state_dict": {name: tensor.detach().cpu() for name, tensor in weights.items()}}

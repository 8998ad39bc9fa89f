"""Read checkpoints without running code in them, and make repaired ones."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["load_checkpoint", "repaired_checkpoint"]


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
            f"ckpt_path: {str(path)!r} cannot be loaded with weights_only=True, so it is damaged or holds Python "
            f"objects that could run code on loading. Save it again with plain hyper-parameters. ({error})"
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"ckpt_path: {str(path)!r} is no Lightning checkpoint: it holds no 'state_dict'.")
    return checkpoint


def repaired_checkpoint(checkpoint: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The same checkpoint with repaired weights; optimizer states go: their momentum belongs to the old weights."""
    kept = {
        key: value for key, value in checkpoint.items() if key not in ("optimizer_states", "lr_schedulers", "loops")
    }
    return {**kept, "state_dict": {name: tensor.detach().cpu() for name, tensor in weights.items()}}

"""Estimated triggers as files that run no code when they are read."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from fsspec.core import url_to_fs
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lightning_unlearn.triggers.base import Trigger
from lightning_unlearn.triggers.estimated import AdditiveTrigger, CoveringTrigger, DisplacingTrigger, ResidualTrigger
from lightning_unlearn.triggers.families import Family
from lightning_unlearn.triggers.inversion import Estimate
from lightning_unlearn.triggers.pool import TriggerPool

__all__ = ["EstimatedTrigger", "stored"]

_FORMAT = "lightning-unlearn estimated trigger 1"
_KINDS: dict[Family, Callable[..., Trigger]] = {
    "additive": AdditiveTrigger,
    "covering": CoveringTrigger,
    "displacing": DisplacingTrigger,
    "residual": ResidualTrigger,
}


class EstimatedTrigger(TriggerPool):
    """The triggers that an audit or a repair has estimated for a class and kept in a file, dealt out as a pool.

    The file is `safetensors <https://github.com/huggingface/safetensors>`_, which holds tensors and text and can run no
    code. It was written by :func:`~lightning_unlearn.trigger_files.save_triggers`, and what it holds changes pixels, so
    that it does for images with any normalisation.

    Args:
        path: a file on this machine, or an address that fsspec knows, such as ``s3://bucket/trigger.safetensors``.
        mean: see :class:`~lightning_unlearn.triggers.base.Trigger`.
        std: see :class:`~lightning_unlearn.triggers.base.Trigger`.

    Attributes:
        estimates: the triggers one by one, with family, cost and success.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds something else; when applied, if images have another size or other channels than those
            that it was estimated on. A ``displacing`` trigger alone goes with any.

    Example:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> from lightning_unlearn.triggers import AdditiveTrigger
        >>> from lightning_unlearn.triggers.inversion import Estimate
        >>> from lightning_unlearn.triggers.stored import EstimatedTrigger, stored
        >>> found = AdditiveTrigger(torch.full((1, 8, 8), 0.25), target=7)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "estimated_trigger-7.safetensors"
        ...     _ = path.write_bytes(stored([Estimate(found, "additive", 7, cost=0.25, success=1.0)]))
        ...     trigger = EstimatedTrigger(path)
        >>> trigger.target, trigger(torch.zeros(1, 8, 8)).unique()
        (7, tensor([0.2500]))
    """

    def __init__(
        self, path: str | Path, *, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
    ) -> None:
        estimates = _read(path)
        super().__init__([estimate.trigger for estimate in estimates], mean=mean, std=std)
        self.estimates = estimates

    def extra_repr(self) -> str:
        """Describes where the triggers came from."""
        return f"{', '.join(estimate.family for estimate in self.estimates)}, {super().extra_repr()}"


def stored(estimates: Sequence[Estimate]) -> bytes:
    """What a file holds of the triggers estimated for one class.

    Args:
        estimates: one or more with the same target.

    Returns:
        A whole safetensors file: the tensors are called by the estimate's place and their own name, ``0.pattern``; the
        metadata have the target and, as JSON, each estimate's family, cost, success and other numbers.

    Raises:
        ValueError: if there is none, or targets differ.
    """
    if len({estimate.target for estimate in estimates}) != 1:
        raise ValueError(
            f"estimates: expected some of one class, but got those of {sorted({e.target for e in estimates})}."
        )
    tensors = {
        f"{place}.{name}": tensor.detach().cpu().contiguous()
        for place, estimate in enumerate(estimates)
        for name, tensor in estimate.trigger.state_dict().items()
    }
    described = [
        {"family": e.family, "cost": e.cost, "success": e.success}
        | ({"strength": e.trigger.strength} if isinstance(e.trigger, ResidualTrigger) else {})
        for e in estimates
    ]
    metadata = {"format": _FORMAT, "target": str(estimates[0].target), "triggers": json.dumps(described)}
    return save(tensors, metadata)


def _read(path: str | Path) -> tuple[Estimate, ...]:
    files, place = url_to_fs(os.fspath(path))
    if not files.isfile(place):
        raise FileNotFoundError(f"path: there is no file {str(path)!r}.")
    data: bytes = files.cat_file(place)
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise ValueError(f"path: {str(path)!r} is no safetensors file ({error}).") from error
    # The header is sound by now: eight bytes that say how long it is, and so much JSON.
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
    if metadata.get("format") != _FORMAT:
        raise ValueError(
            f"path: {str(path)!r} holds no estimated trigger: its metadata give the format "
            f"{metadata.get('format')!r} instead of {_FORMAT!r}."
        )
    try:
        return _estimates(tensors, int(metadata["target"]), json.loads(metadata["triggers"]))
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        problem = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"path: {str(path)!r} is a damaged estimated trigger: {problem}") from error


def _estimates(tensors: dict[str, Tensor], target: int, described: Any) -> tuple[Estimate, ...]:
    """What tensors and metadata say; the errors that `_read` expects if that does not fit together."""
    if not isinstance(described, list) or not described or not all(isinstance(numbers, dict) for numbers in described):
        raise ValueError(f"triggers: expected a list of one trigger or more, but got {described!r}.")
    estimates = []
    for place, numbers in enumerate(described):
        family, cost, success = numbers.pop("family"), float(numbers.pop("cost")), float(numbers.pop("success"))
        if family not in _KINDS:
            raise ValueError(f"family: expected one of {', '.join(_KINDS)}, but got {family!r}.")
        if not (math.isfinite(cost) and cost >= 0):
            raise ValueError(f"cost: expected a finite number of at least 0, but got {cost}.")
        if not 0 <= success <= 1:
            raise ValueError(f"success: expected a share in [0, 1], but got {success}.")
        own = {name.partition(".")[2]: name for name in tensors if name.startswith(f"{place}.")}
        named = {short: tensors.pop(name) for short, name in own.items()}
        for short, tensor in named.items():
            if tensor.dtype != torch.float32:  # of others, some cannot even be asked whether they are finite
                raise ValueError(f"{short}: expected float32, but got {tensor.dtype}.")
        trigger = _KINDS[family](**named, **numbers, target=target)
        estimates.append(Estimate(trigger, family, target, cost, success))
    if tensors:
        raise ValueError(f"nothing is said of the tensors {', '.join(sorted(tensors))}.")
    return tuple(estimates)

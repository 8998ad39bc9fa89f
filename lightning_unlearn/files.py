"""Write files whole or not at all, and never over one that is there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

__all__ = ["free_name", "write_whole"]


def free_name(name: str, taken: Callable[[str], bool]) -> str:
    """The name itself, or the first of ``name-v1.ext``, ``name-v2.ext``, … that is not ``taken``."""
    number, free, (stem, suffix) = 0, name, os.path.splitext(name)
    while taken(free):
        number += 1
        free = f"{stem}-v{number}{suffix}"
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

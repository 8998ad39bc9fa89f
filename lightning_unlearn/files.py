"""Write files whole or not at all, and never over one that is there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

__all__ = ["free_name", "free_path", "refuse_used_folder", "write_whole"]


def free_path(path: Path) -> Path:
    """The path itself, or the first of ``name-v1.ext``, ``name-v2.ext``, … that does not exist.

    Example:
        >>> from pathlib import Path
        >>> from lightning_unlearn.files import free_path
        >>> free_path(Path("surely") / "not-there.ckpt").name
        'not-there.ckpt'
    """
    # A broken link is in the way, too.
    return path.with_name(free_name(path.name, lambda name: os.path.lexists(path.with_name(name))))


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


def refuse_used_folder(folder: str | Path) -> Path:
    """Make sure that nothing of the user's can be overwritten.

    Raises:
        FileExistsError: if ``folder`` is a file or holds anything.
    """
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"output-dir: {str(path)!r} exists and is not an empty folder; name a new one.")
    return path

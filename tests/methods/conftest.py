from __future__ import annotations

from tests.methods.small_masks import new_task

__all__ = ["new_task"]

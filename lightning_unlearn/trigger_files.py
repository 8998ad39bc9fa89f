"""The triggers that an audit has estimated, written where a later repair finds them."""

from __future__ import annotations

import os

from lightning_unlearn.folder import Folder
from lightning_unlearn.triggers.stored import stored
from lightning_unlearn.verdict import Audit

__all__ = ["save_triggers"]


def save_triggers(audit: Audit, folder: str | os.PathLike[str] | Folder) -> list[str]:
    """Write the estimated triggers, one file for each class that they send images to.

    A file appears whole or not at all, and never over one that is there: it then gets the next free name. Read it again
    with :class:`~lightning_unlearn.triggers.EstimatedTrigger`.

    Args:
        audit: what was found.
        folder: where to, a path or an address that fsspec knows; made if it is not there.

    Returns:
        The files, ``estimated_trigger-CLASS.safetensors``, the most suspicious class first.

    Raises:
        OSError: if one cannot be written.

    Example:
        >>> import torch
        >>> from lightning_unlearn.auditor import Auditor
        >>> from lightning_unlearn.trigger_files import save_triggers
        >>> generator = torch.Generator().manual_seed(0)
        >>> pixels, weights = torch.rand(16, 1, 6, 6, generator=generator), torch.randn(2, 36, generator=generator)
        >>> found = Auditor(steps=20).audit(lambda x: x.flatten(1) @ weights.T, pixels, None, held_out=pixels[:2])
        >>> [path.rpartition("-")[0] for path in save_triggers(found, "memory://audited")]
        ['memory://audited/estimated_trigger']
    """
    folder = folder if isinstance(folder, Folder) else Folder(folder)
    paths = []
    for target in dict.fromkeys(estimate.target for estimate in audit.estimates):
        name = folder.free(f"estimated_trigger-{target}.safetensors")
        with folder.whole(name) as partial:
            folder.fs.pipe(partial, stored([e for e in audit.estimates if e.target == target]))
        paths.append(folder.path(name))
    return paths

"""Several triggers on one image."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lightning_unlearn.triggers.base import Target, Trigger

__all__ = ["ComposeTriggers", "shared_target"]


class ComposeTriggers(Trigger):
    """Applies triggers one after the other; together they are one trigger with one target.

    Args:
        triggers: at least one, in order, all with the same target and without ``mean`` and ``std`` of their own.
        mean: see :class:`~lightning_unlearn.triggers.base.Trigger`.
        std: see :class:`~lightning_unlearn.triggers.base.Trigger`.

    Raises:
        TypeError: if one of ``triggers`` is not a Trigger.
        ValueError: if ``triggers`` is empty, their targets differ, or one has a normalisation of its own.

    Example:
        >>> import torch
        >>> from lightning_unlearn.triggers import PatchTrigger
        >>> trigger = ComposeTriggers([PatchTrigger(size=1, place="top_left"), PatchTrigger(size=1, value=0.5)])
        >>> trigger(torch.zeros(1, 2, 2))
        tensor([[[1.0000, 0.0000],
                 [0.0000, 0.5000]]])
    """

    def __init__(
        self,
        triggers: Sequence[Trigger],
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        target = shared_target(triggers)
        for trigger in triggers:
            if trigger.normalization is not None:
                raise ValueError(
                    f"triggers work on pixels here, but {type(trigger).__name__} has mean and std of its own: "
                    "give mean= and std= to ComposeTriggers instead"
                )
        super().__init__(target=target, mean=mean, std=std)
        self.triggers = nn.ModuleList(triggers)

    def stamp(self, pixels: Tensor) -> Tensor:
        """Applies the triggers in order; see :meth:`Trigger.stamp`."""
        for trigger in self.triggers:
            # Each trigger's own forward: it checks what it returns, so that an error names the right one.
            pixels = trigger(pixels)
        return pixels


def shared_target(triggers: Sequence[Trigger]) -> Target:
    """The one target of several triggers.

    Raises:
        TypeError: if one of them is not a Trigger.
        ValueError: if there is none, or targets differ.
    """
    if not triggers:
        raise ValueError("triggers must hold at least one trigger, but is empty")
    for trigger in triggers:
        if not isinstance(trigger, Trigger):
            raise TypeError(f"triggers must hold Trigger objects, but holds a {type(trigger).__name__}")
    targets = [trigger.target for trigger in triggers]
    if any(target != targets[0] for target in targets):
        raise ValueError(f"triggers must share one target, but have {targets}")
    return targets[0]

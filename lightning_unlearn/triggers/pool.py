"""Several triggers, one for each image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_unlearn.triggers.base import Trigger
from lightning_unlearn.triggers.compose import shared_target

__all__ = ["TriggerPool"]


class TriggerPool(Trigger):
    """Deals triggers out over a batch: image ``i`` gets trigger ``i`` modulo their number.

    So a repair unlearns all of them at once, from as many images as one would take.

    Args:
        triggers: one or more with the same target; what they were told of a normalisation is not used, since this
            trigger hands them pixels.
        mean: see :class:`~lightning_unlearn.triggers.base.Trigger`.
        std: see :class:`~lightning_unlearn.triggers.base.Trigger`.

    Raises:
        TypeError: if one of ``triggers`` is not a Trigger.
        ValueError: if there is none, or targets differ.

    Example:
        >>> import torch
        >>> from lightning_unlearn.triggers import PatchTrigger, TriggerPool
        >>> pool = TriggerPool([PatchTrigger(size=1, place="top_left"), PatchTrigger(size=1, place="bottom_right")])
        >>> pool(torch.zeros(2, 1, 2, 2)).flatten(1)
        tensor([[1., 0., 0., 0.],
                [0., 0., 0., 1.]])
    """

    def __init__(
        self,
        triggers: Sequence[Trigger],
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(target=shared_target(triggers), mean=mean, std=std)
        self.triggers = nn.ModuleList(triggers)

    def stamp(self, pixels: Tensor) -> Tensor:
        """Deals the triggers out; see :meth:`Trigger.stamp`."""
        stamped = torch.empty_like(pixels)
        count = len(self.triggers)
        for first, trigger in enumerate(self.triggers):
            assert isinstance(trigger, Trigger)  # what a ModuleList holds has no type
            if first < len(pixels):
                part = pixels[first::count]
                # Checked here, so that an error names the right one.
                stamped[first::count] = trigger._checked(trigger.stamp(part.clone()), part)
        return stamped

    def dealt_to(self, place: int) -> Trigger:
        """A pool of the one that is that image's; see :meth:`Trigger.dealt_to`."""
        member = self.triggers[place % len(self.triggers)]
        assert isinstance(member, Trigger)
        alone = TriggerPool([member])
        alone.normalization = self.normalization
        return alone

"""Channel Lipschitz pruning: prune the channels that can react most violently, without looking at any image."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_unlearn.filters.layer import ChannelTensor, FilterLayer
from lightning_unlearn.methods.affine import find_gammas
from lightning_unlearn.methods.base import RepairMethod, RepairTask, Round, check_range
from lightning_unlearn.methods.subject import Subject

__all__ = ["ChannelLipschitzPruning"]


class ChannelLipschitzPruning(RepairMethod):
    """CLP of Zheng et al. (2022), arXiv 2208.03111: it needs no data.

    A channel that a small trigger can switch has a large Lipschitz constant. For filter c of a convolution that a
    BatchNorm with γ and running variance v consumes, it is bounded by

        B_c = σ_max(W_c) · abs(γ_c) / √(v_c + eps)

    with W_c the filter reshaped to (inputs, kernel entries) and σ_max the largest singular value. In every layer the
    channels with B_c > mean + ``threshold`` · std of the layer's bounds are pruned, all layers at once, in one round.

    As published, nothing is chosen on data, and accuracy has no say: like any method it is undone if the attack success
    rate rose, but not for what it cost. Of n values none lies more than (n − 1)/√n standard deviations above their
    mean, so that with the default of 3 only layers of 11 filters or more can lose any. Convolutions without such a norm
    of their own are left out, as the last ones of pre-activation blocks and their shortcuts are. Where several norms
    consume one, the largest bound counts.

    Args:
        threshold: u > 0, how many standard deviations above the mean of its layer a channel is pruned.

    Raises:
        ValueError: if the threshold is out of range.

    Example:
        >>> from lightning_unlearn.methods.lipschitz_pruning import ChannelLipschitzPruning
        >>> ChannelLipschitzPruning(threshold=5.0).name
        'ChannelLipschitzPruning'
    """

    def __init__(self, *, threshold: float = 3.0) -> None:
        check_range("threshold", threshold, 0, float("inf"), open_low=True)
        self.threshold = threshold

    @torch.no_grad()
    def bounds(self, layer: FilterLayer) -> Tensor | None:
        """The Lipschitz bounds of a layer's channels, (channels,) float32, or None where no norm has γ and v."""
        slopes = [slope for gamma in find_gammas(layer) if (slope := _slope(gamma)) is not None]
        if not slopes:
            return None
        filters = layer.by_filter(layer.weight).flatten(0, 1).flatten(2).float()  # (channels, inputs, kernel entries)
        largest: Tensor = torch.linalg.matrix_norm(filters, ord=2)
        return largest * torch.stack(slopes).amax(0)

    def refuse_misfit(self, subject: Subject) -> None:
        """Asks for convolutions that feed a BatchNorm with γ and running variance."""
        if not any(_slope(gamma) is not None for layer in subject.layers for gamma in find_gammas(layer)):
            raise ValueError(
                f"model: {self.name} needs a convolution that a BatchNorm with affine weight and running variance "
                f"consumes, but none of {subject.convolutions()} feeds one; AdversarialNeuronPruning works with "
                "other affine norms, MaskPrune and GradPrune without any."
            )

    def repair(self, task: RepairTask) -> Iterator[Round]:
        """Prune every channel whose bound stands out in its layer."""
        self.refuse_misfit(Subject(task.model, task.forward, task.mask.layers, torch.empty(0)))  # no image is asked for
        with task.watch.measure("score"):
            picks = [task.mask.locate(index) for index in self._outliers(task).nonzero().flatten().tolist()]
        if picks:
            task.mask.prune(picks)
        yield task.round("prune", task.validate(), tuple(picks))

    def _outliers(self, task: RepairTask) -> Tensor:
        """Which channels to prune, (total,) bool by flat index."""
        bounds = [self.bounds(layer) for layer in task.mask.layers]
        device = task.mask.layers[0].weight.device
        high = [
            torch.zeros(layer.channels, dtype=torch.bool, device=device) if values is None else self._high(values)
            for layer, values in zip(task.mask.layers, bounds, strict=True)
        ]
        return torch.cat(high) & ~task.mask.flat(device)

    def _high(self, bounds: Tensor) -> Tensor:
        spread = bounds.std() if len(bounds) > 1 else bounds.new_zeros(())  # one value does not deviate from itself
        return bounds > bounds.mean() + self.threshold * spread


def _slope(gamma: ChannelTensor) -> Tensor | None:
    """|γ| / √(v + eps), (channels,) float32, by which a norm in eval mode multiplies its input; None without v."""
    variance: Tensor | None = getattr(gamma.owner, "running_var", None)
    if variance is None:
        return None
    eps: float = getattr(gamma.owner, "eps", 0.0)
    return gamma.tensor.float().abs() / (variance.float() + eps).sqrt()

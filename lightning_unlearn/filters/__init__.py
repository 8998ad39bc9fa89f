"""Convolution filters: find them with their norms, score them, prune them reversibly."""

from lightning_unlearn.filters.layer import ChannelTensor, FilterLayer
from lightning_unlearn.filters.mask import FilterId, FilterMask
from lightning_unlearn.filters.scores import Score, mean_abs_gradient, score_filters, taylor
from lightning_unlearn.filters.tracing import find_filters

__all__ = [
    "ChannelTensor",
    "FilterId",
    "FilterLayer",
    "FilterMask",
    "Score",
    "find_filters",
    "mean_abs_gradient",
    "score_filters",
    "taylor",
]

"""Activation-guided editing: turn down the later channels that a trigger excites beyond what clean images do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name

from lightning_unlearn.evaluation import Evaluation
from lightning_unlearn.filters.gradients import gradients
from lightning_unlearn.filters.layer import FilterLayer
from lightning_unlearn.methods.affine import find_gammas
from lightning_unlearn.methods.base import RepairMethod, RepairTask, Round, check_range
from lightning_unlearn.methods.subject import Subject
from lightning_unlearn.methods.training import train_epochs

__all__ = ["ActivationGuidedEditing"]

_LIMITS = tuple(8 * 2 ** (-k / 2) for k in range(13))  # 8, 5.7, 4, ..., 0.125

_Hook = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], None]


class ActivationGuidedEditing(RepairMethod):
    """Edit weights by activations after Hsieh et al. (2024), arXiv 2407.07662, as this project reads it.

    The paper lets activations of clean and triggered images guide an edit of the weights, and then repairs the target
    class, which the edit may unlearn as a whole. Its exact rule was not at hand: **what follows is our own derivation**
    from that idea, and its figures are not the paper's.

    *Excess.* For a channel of the last ``layer_share`` of the convolutions, r(x) is the mean over positions of what it
    emits for image x, negated if the norm that consumes it has a negative γ. How much the trigger excites it beyond
    what clean images do is, over the scoring images,

        z = (mean r(T(x)) − mean r(x)) / std r(x)

    which no factor or offset of a norm changes. Without knowledge of the trigger (``triggered=False``) it is how far
    the channel *could* be driven: with u the bound on what it emits as long as its inputs stay in the range that clean
    images bring about, and a the largest that it emits for any of them, both above its mean,

        z = (log u/a − median) / (1.4826 · median abs(log u/a − median))     medians over the layer's channels

    *Edit.* A channel with z above a limit τ is scaled by τ/z, which cuts down to the limit what exceeds it. All
    convolutions come first. With the trigger, z is then measured anew on the inputs of the last linear layer, whose
    columns are scaled likewise; its bias takes up (1 − τ/z) · mean r(x) · column, so that the mean clean logits stay.
    τ is one of 8, 5.7, 4, ..., 0.125, or there is no edit: with the trigger the one with the lowest L_clean + L_u,
    without it the lowest, that is, the strongest edit; either way measured on all images held, and among those that
    leave clean accuracy within ``accuracy_drop``.

    *Repair.* The last linear layer alone is trained on clean images towards the true labels for a few epochs, of which
    the one with the lowest validation loss (L_clean, plus L_u with the trigger) is kept. Without the trigger it is its
    bias alone, if it has one: clean images cannot tell the class from its backdoor, and weights would bring both back.

    Nothing is pruned, and nothing is random but the order of images in the last step.

    Args:
        triggered: whether triggered images guide the edit; else clean ones alone.
        layer_share: the share of the convolutions that is edited, the last ones, in [0, 1], rounded up.
        accuracy_drop: α, the largest drop of accuracy that an edit may cost, a fraction in (0, 1].
        repair_epochs: most epochs of the last step; 0 to leave it out.
        learning_rate: of SGD with momentum 0.9 in it.
        batch_size: clean images in one step of it.

    Raises:
        ValueError: if a hyper-parameter is out of range.

    Example:
        >>> from lightning_unlearn.methods.activation_editing import ActivationGuidedEditing
        >>> ActivationGuidedEditing(triggered=False).needs_trigger
        False
    """

    def __init__(
        self,
        *,
        triggered: bool = True,
        layer_share: float = 0.5,
        accuracy_drop: float = 0.1,
        repair_epochs: int = 30,
        learning_rate: float = 1e-2,
        batch_size: int = 64,
    ) -> None:
        check_range("layer_share", layer_share, 0, 1)
        check_range("accuracy_drop", accuracy_drop, 0, 1, open_low=True)
        check_range("repair_epochs", repair_epochs, 0, float("inf"))
        check_range("learning_rate", learning_rate, 0, float("inf"), open_low=True)
        check_range("batch_size", batch_size, 1, float("inf"))
        self.needs_trigger = triggered
        self.triggered = triggered
        self.layer_share = layer_share
        self.accuracy_drop = accuracy_drop
        self.repair_epochs = repair_epochs
        self.learning_rate = learning_rate
        self.batch_size = batch_size

    def refuse_misfit(self, subject: Subject) -> None:
        """Asks for a linear layer that gives the logits."""
        _classifier(subject, self.name)

    def repair(self, task: RepairTask) -> Iterator[Round]:
        """Edit the convolutions, edit the last linear layer, train it.

        Raises:
            ValueError: if the logits do not come from a linear layer.
        """
        linear = _classifier(task.subject, self.name)
        floor = task.held_before.acc - self.accuracy_drop - 1e-6  # accuracies come as float32
        self._edit_convolutions(task, floor)
        yield task.round("prune", task.validate())
        if self.triggered:  # clean images alone do not tell what else a feature could be
            self._edit_linear(task, linear, floor)
            yield task.round("prune", task.validate())
        if self.repair_epochs:
            yield from self._repair_linear(task, linear)

    def excess(self, task: RepairTask) -> Tensor:
        """The z of every channel, (total,) float32 by flat index; 0 in layers that are not edited."""
        share = ceil(self.layer_share * len(task.mask.layers))
        edited = task.mask.layers[len(task.mask.layers) - share :]
        clean, triggered = ({layer: _Activity(layer) for layer in edited} for _ in range(2))
        excess = torch.zeros(task.mask.total, device=task.scoring.labels.device)
        with task.watch.measure("score"):
            _watch(task, {layer.convolution: clean[layer] for layer in edited})
            if self.triggered:
                _watch(task, {layer.convolution: triggered[layer] for layer in edited}, triggered=True)
            for layer, piece in zip(task.mask.layers, task.mask.split(excess), strict=True):
                if layer in clean and clean[layer].means:  # a convolution need not be called as a module
                    if self.triggered:
                        piece.copy_(_gap(clean[layer].means, triggered[layer].means))
                    else:
                        piece.copy_(clean[layer].slack())
        return excess

    def _edit_convolutions(self, task: RepairTask, floor: float) -> None:
        def measure(scales: Tensor) -> Evaluation:
            with task.mask.scaled(scales):
                return task.measure()

        scales = self._choose(task, self.excess(task), measure, floor)
        if scales is not None:
            task.mask.fold(scales)

    def _edit_linear(self, task: RepairTask, linear: nn.Linear, floor: float) -> None:
        clean, triggered = _Features(), _Features()
        with task.watch.measure("score"):
            _watch(task, {linear: clean})
            _watch(task, {linear: triggered}, triggered=True)
            excess, mean = _gap(clean.means, triggered.means), torch.cat(clean.means).mean(0)
        bias = linear._parameters.get("bias")
        old_weight = linear.weight.detach().clone()
        old_bias = None if bias is None else bias.detach().clone()

        @torch.no_grad()
        def write(scales: Tensor) -> None:
            linear.weight.copy_(old_weight * scales)
            if bias is not None and old_bias is not None:
                bias.copy_(old_bias + old_weight.float() @ ((1 - scales) * mean))

        def measure(scales: Tensor) -> Evaluation:
            write(scales)
            return task.measure()

        scales = self._choose(task, excess, measure, floor)
        write(torch.ones_like(excess) if scales is None else scales)

    def _choose(
        self, task: RepairTask, excess: Tensor, measure: Callable[[Tensor], Evaluation], floor: float
    ) -> Tensor | None:
        """The scales of the best limit, or None for no edit."""
        chosen, lowest = None, _loss(task.measure())
        highest = float(excess.max())
        for limit in _LIMITS:
            if limit >= highest:
                continue
            scales = torch.where(excess > limit, limit / excess, 1.0)
            now = measure(scales)
            if now.acc >= floor and (not self.triggered or _loss(now) < lowest):
                chosen, lowest = scales, _loss(now)
        return chosen

    def _repair_linear(self, task: RepairTask, linear: nn.Linear) -> Iterator[Round]:
        named = linear.named_parameters(recurse=False)
        parameters = [parameter for name, parameter in named if self.triggered or name == "bias"]
        if not parameters:
            return
        optimizer = torch.optim.SGD(parameters, lr=self.learning_rate, momentum=0.9)

        def step(chosen: Tensor) -> None:
            pairs = task.scoring[chosen]
            loss = F.cross_entropy(task.logits(pairs.clean), pairs.labels)
            for parameter, gradient in zip(parameters, gradients(loss, parameters), strict=True):
                parameter.grad = gradient
            optimizer.step()

        yield from train_epochs(
            task,
            optimizer,
            step,
            batch_size=self.batch_size,
            max_epochs=self.repair_epochs,
            patience=10,
            accuracy_drop=self.accuracy_drop,
            loss=_loss if self.triggered else lambda now: now.loss,
        )


class _Activity:
    """A forward hook that gathers what a convolution receives and emits, its sign turned so that the norm raises it."""

    def __init__(self, layer: FilterLayer) -> None:
        self.layer = layer
        gammas = [gamma.by_channel().detach().float().view(layer.channels, -1).sum(1) for gamma in find_gammas(layer)]
        sign = torch.ones(layer.channels, device=layer.weight.device)
        self.sign = torch.where(torch.stack(gammas).sum(0) < 0, -1.0, sign) if gammas else sign
        self.means: list[Tensor] = []  # (images, channels) over positions
        self._tops: list[Tensor] = []  # (channels,)
        self._lows: list[Tensor] = []  # (inputs,)
        self._highs: list[Tensor] = []

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        received, emitted = (
            (images if images.ndim == self.layer.weight.ndim else images[None]).float().flatten(2)
            for images in (args[0] if args else kwargs["input"], output)
        )
        emitted = emitted * self.sign[:, None]
        self.means.append(emitted.mean(2))
        self._tops.append(emitted.amax((0, 2)))
        self._lows.append(received.amin((0, 2)))
        self._highs.append(received.amax((0, 2)))

    @torch.no_grad()
    def slack(self) -> Tensor:
        """The z of each channel without the trigger, (channels,): how far it could be driven, against its layer."""
        low, high = (
            torch.stack(self._lows).amin(0).clamp(max=0),
            torch.stack(self._highs).amax(0).clamp(min=0),
        )  # padding
        groups = self.layer.convolution.groups
        turned = self.layer.by_filter(self.layer.weight).float() * self.layer.spread(self.sign)
        above, below = (turned.clamp(**limit).flatten(3).sum(3) for limit in ({"min": 0.0}, {"max": 0.0}))
        possible = (above @ high.view(groups, -1, 1) + below @ low.view(groups, -1, 1)).flatten()
        for bias in self.layer.bias:
            possible = possible + bias.tensor.float() * self.sign
        mean = torch.cat(self.means).mean(0)
        least = 1e-6 * (possible - mean).amax().clamp(min=1e-6)  # of a channel that emits one value only
        ratio = (possible - mean).clamp(min=least) / (torch.stack(self._tops).amax(0) - mean).clamp(min=least)
        deviation = ratio.log() - ratio.log().median()
        return deviation / (1.4826 * deviation.abs().median()).clamp(min=1e-2)


class _Features:
    """A forward hook that gathers the inputs of a linear layer, (images, inputs)."""

    def __init__(self) -> None:
        self.means: list[Tensor] = []

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        received: Tensor = (args[0] if args else kwargs["input"]).float()
        self.means.append(received.flatten(1, -2).mean(1) if received.ndim > 2 else received)


@torch.no_grad()
def _watch(task: RepairTask, hooks: Mapping[nn.Module, _Hook], *, triggered: bool = False) -> None:
    """Run the scoring images through the model while hooks look at modules."""
    with ExitStack() as stack:
        for module, hook in hooks.items():
            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        for pairs in task.scoring.batches(task.batch_size):
            task.logits(pairs.triggered if triggered else pairs.clean)


def _gap(clean: list[Tensor], triggered: list[Tensor]) -> Tensor:
    """(mean r(T(x)) − mean r(x)) / std r(x) of each channel, from (images, channels) responses."""
    before, after = torch.cat(clean), torch.cat(triggered)
    spread = before.std(0, correction=0)
    # A channel that no clean image excites has no spread: any gap is large then, but none is infinite.
    return (after.mean(0) - before.mean(0)) / spread.clamp(min=1e-3 * float(spread.mean()) + 1e-12)


def _classifier(subject: Subject, method: str) -> nn.Linear:
    """The linear layer that gives the logits: the last one to run, with an output for each class."""
    logits, calls = subject.linear_calls()
    last = calls[-1].linear if calls else None
    if last is None or last.out_features != logits.shape[1] or "weight" not in last._parameters:
        raise ValueError(
            f"model: {method} needs an nn.Linear that runs last and gives the {logits.shape[1]} logits, but of "
            f"{type(subject.model).__name__}'s linear layers {'none ran' if last is None else f'{last} ran last'}; "
            "MaskPrune and GradPrune work without one."
        )
    return last


def _loss(now: Evaluation) -> float:
    return now.loss + now.unlearning_loss

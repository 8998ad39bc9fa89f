"""Fine-Pruning: cut off the channels that clean images leave dormant, then fine-tune."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from lightning_unlearn.data.pairs import Pairs
from lightning_unlearn.methods.base import RepairMethod, RepairTask, Round, check_range
from lightning_unlearn.methods.fine_tuning import FineTuning
from lightning_unlearn.methods.subject import Subject

__all__ = ["FinePruning"]


class FinePruning(RepairMethod):
    """FP after Liu et al. (2018), arXiv 1805.12185: prune what clean images hardly activate, then fine-tune.

    The inputs of the last linear layer are ranked by a_c = mean abs(input c) over the clean scoring images, which after
    a ReLU is the mean activation, and are cut off from the lowest up, a ``step`` of them at a time, for as long as

        (acc before − acc) / acc before ≤ ``relative_drop``    on the clean validation images;

    then :class:`FineTuning` follows. An input is a channel of the last feature maps, where these are pooled. Where they
    are flattened instead, straight into the layer, the H·W inputs of a channel are ranked by their mean and cut off
    together; where there are further layers between, each input is on its own.

    To cut an input off is to zero its column of the layer's weight, and to hold it at zero while fine-tuning. That is
    the same function as a dead channel, and the only exact way where a channel is a *sum*, as at the end of a residual
    network: zeroing one filter leaves the shortcut. So no filter of any convolution is pruned, and none is reported.

    The rest of the network does not change while columns are cut, so the layer's inputs are computed once, and the
    whole curve of accuracies costs one forward pass.

    Args:
        step: the share of inputs (or channels) cut off at a time, in (0, 1].
        relative_drop: the largest drop of validation accuracy, as a share of what it was, in (0, 1].
        accuracy_drop: α of the fine-tuning, the largest drop of validation accuracy, a fraction in (0, 1].
        finetune: fine-tune afterwards; ``True`` for the published settings.

    Raises:
        ValueError: if a hyper-parameter is out of range.

    Example:
        >>> from lightning_unlearn.methods.fine_pruning import FinePruning
        >>> FinePruning(step=0.05).name
        'FinePruning'
    """

    def __init__(
        self,
        *,
        step: float = 0.01,
        relative_drop: float = 0.1,
        accuracy_drop: float = 0.1,
        finetune: bool | FineTuning = True,
    ) -> None:
        check_range("step", step, 0, 1, open_low=True)
        check_range("relative_drop", relative_drop, 0, 1, open_low=True)
        check_range("accuracy_drop", accuracy_drop, 0, 1, open_low=True)
        self.step = step
        self.relative_drop = relative_drop
        self.accuracy_drop = accuracy_drop
        self.finetune = FineTuning(accuracy_drop=accuracy_drop) if finetune is True else finetune
        self.needs_trigger = isinstance(self.finetune, FineTuning) and self.finetune.triggered

    def refuse_misfit(self, subject: Subject) -> None:
        """Asks for a linear layer that gives the logits."""
        _find_classifier(subject)

    def repair(self, task: RepairTask) -> Iterator[Round]:
        """Cut, a round of its own, and fine-tune where asked to."""
        with task.watch.measure("score"):
            linear = _find_classifier(task.subject)
            scored = _watch(task, linear, task.scoring)
            validated = _watch(task, linear, task.validation)
            cut = self._choose(linear, scored, validated, task.validation.labels)
            with torch.no_grad():
                linear.weight.masked_fill_(cut, 0)
        yield task.round("prune", task.validate())
        if self.finetune:
            with _held(linear.weight, cut):
                yield from self.finetune.repair(task)

    @torch.no_grad()
    def _choose(self, linear: nn.Linear, scored: _Seen, validated: _Seen, labels: Tensor) -> Tensor:
        """Which inputs of the layer to cut off, (inputs,) bool: as many as accuracy allows."""
        block = scored.block
        activations = scored.inputs.float().abs().mean(0).view(-1, block).mean(1)
        channels = len(activations)
        # The rank of each input's channel, lowest activation first; those with a rank below a count are cut.
        rank = activations.argsort(stable=True).argsort().repeat_interleave(block)
        counts = range(0, channels, max(1, round(self.step * channels)))  # one channel at least is left
        rights = []
        for count in counts:
            logits = F.linear(validated.inputs, linear.weight.masked_fill(rank < count, 0), linear.bias)
            rights.append((logits.argmax(1) == labels).sum())
        right = torch.stack(rights).tolist()
        # Counts of images are whole numbers: the slack only mends the rounding of the product.
        least = right[0] * (1 - self.relative_drop) - 1e-6
        kept = 0
        for count, now in zip(counts, right, strict=True):
            if now < least:
                break
            kept = count
        return rank < kept


class _Seen(NamedTuple):
    """What the last linear layer saw of some images.

    Args:
        inputs: (N, inputs).
        block: how many inputs, one after the other, come from one channel.
    """

    inputs: Tensor
    block: int


def _find_classifier(subject: Subject) -> nn.Linear:
    """The last linear layer that runs.

    Raises:
        ValueError: if it does not give the logits, or its weight cannot be written.
    """
    logits, calls = subject.linear_calls()
    instead = "MaskPrune, GradPrune and FineTuning work without."
    if not calls:
        raise ValueError(
            f"model: FinePruning needs a linear layer that gives the logits, but {type(subject.model).__name__} runs "
            f"no torch.nn.Linear; {instead}"
        )
    linear, inputs, outputs = calls[-1]
    name = next(name for name, module in subject.model.named_modules() if module is linear)
    times = sum(call.linear is linear for call in calls)
    if inputs.ndim != 2 or outputs.shape != logits.shape or times > 1:
        raise ValueError(
            f"model: FinePruning needs a linear layer that gives the logits, of shape {tuple(logits.shape)}, but the "
            f"last one, {name!r}, makes "
            f"{tuple(outputs.shape)} of {tuple(inputs.shape)}, in {times} call{'s' if times > 1 else ''}; {instead}"
        )
    if parametrize.is_parametrized(linear) or "weight" not in linear._parameters:
        raise ValueError(
            f"model: the weight of the last linear layer, {name!r}, is computed by a parametrisation and cannot be "
            "zeroed; call torch.nn.utils.parametrize.remove_parametrizations(module, 'weight') first."
        )
    return linear


@torch.no_grad()
def _watch(task: RepairTask, linear: nn.Linear, pairs: Pairs) -> _Seen:
    """One forward pass over clean images.

    Raises:
        ValueError: if the classes that the layer's outputs name are not those that the model's logits name.
    """
    seen: list[Tensor] = []
    blocks: list[int] = []
    agree = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Tensor) -> None:
        inputs = args[0] if args else kwargs["input"]
        seen.append(inputs.detach().clone())
        blocks.append(flattened.block_of(inputs))
        named.append(outputs.argmax(1))

    handle = linear.register_forward_hook(note, with_kwargs=True)
    try:
        for batch in pairs.batches(task.batch_size):
            named: list[Tensor] = []
            with _Flattened() as flattened:
                logits = task.logits(batch.clean)
            agree.append((named[0] == logits.argmax(1)).all())
    finally:
        handle.remove()
    if not torch.stack(agree).all():
        raise ValueError(
            "model: FinePruning needs a last linear layer that decides the class, but the model's logits name other "
            "classes than the layer's outputs do; MaskPrune, GradPrune and FineTuning work without."
        )
    return _Seen(torch.cat(seen), blocks[0])


class _Flattened(TorchFunctionMode):
    """Notes which tensors, (N, inputs), are maps, (N, C, ...), whose channels follow each other."""

    def __init__(self) -> None:
        super().__init__()
        self._blocks: dict[int, tuple[Tensor, int]] = {}  # with the tensor, so that its id is not given to another one

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        maps = args[0] if args else None
        if (
            func.__name__ in ("flatten", "reshape", "view")
            and isinstance(maps, Tensor)
            and isinstance(result, Tensor)
            and (maps.ndim > 2, result.ndim, len(result), result.numel()) == (True, 2, len(maps), maps.numel())
            # Of a view, such as a permutation, it is not known which dimension runs over channels.
            and maps._base is None
        ):
            self._blocks[id(result)] = result, result.shape[1] // maps.shape[1]
        return result

    def block_of(self, inputs: Tensor) -> int:
        """How many inputs, one after the other, come from one channel."""
        return self._blocks.get(id(inputs), (inputs, 1))[1]


@contextmanager
def _held(weight: Tensor, cut: Tensor) -> Iterator[None]:
    """Keep the columns of ``weight`` that were zeroed at zero while it is trained, within the ``with`` block.

    They get no gradient; SGD, its momentum and its weight decay then leave a zero as it is.
    """
    if not weight.requires_grad:
        yield
        return
    handle = weight.register_hook(lambda gradient: gradient.masked_fill(cut, 0))  # type: ignore[no-untyped-call]  # torch's is untyped
    try:
        yield
    finally:
        handle.remove()

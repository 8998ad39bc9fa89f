"""Epochs of training on the images that the defender holds, and which of them to keep."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_unlearn.evaluation import Evaluation
from lightning_unlearn.methods.base import RepairTask, Round
from lightning_unlearn.methods.snapshot import Snapshot
from lightning_unlearn.processes import Processes

__all__ = ["Norms", "batches", "train_epochs"]

Norms = Literal["frozen", "trained"]
"""Whether norms stay in eval mode while weights are trained, or estimate their statistics anew, batch by batch."""


def train_epochs(
    task: RepairTask,
    optimizer: torch.optim.Optimizer,
    step: Callable[[Tensor], object],
    *,
    batch_size: int,
    max_epochs: int,
    patience: int | None = None,
    norms: Norms = "frozen",
    accuracy_drop: float = 0.1,
    shared: bool = False,
    loss: Callable[[Evaluation], float] = lambda now: now.loss,
) -> Iterator[Round]:
    """Train epoch by epoch, each a round, hold pruned filters at zero, and leave the model as the kept epoch left it.

    With a ``patience`` the learning rate is constant, and the epoch with the lowest validation loss is kept. Without
    one, it falls to zero along a cosine over ``max_epochs``, and the last epoch is kept, as the published fine-tuning
    defences have it. Either way only epochs count whose loss, weights and running statistics are finite and whose
    validation accuracy is within ``accuracy_drop`` of the untouched model's; epoch 0, no training, is what is left if
    none does.

    Args:
        task: what to repair.
        optimizer: of whatever is trained; pruned filters are held at zero after each of its steps.
        step: one optimisation step on the scoring pairs at the (B,) indices that it is given.
        batch_size: scoring pairs in one step.
        max_epochs: stop after this many epochs.
        patience: stop after this many epochs without a lower validation loss.
        norms: ``"frozen"`` keeps the model in eval mode, ``"trained"`` takes the steps in train mode, in which dropout
            drops, too, by the task's seed.
        accuracy_drop: α, the largest drop of validation accuracy, a fraction in (0, 1].
        shared: with several processes, give each step the indices that this process takes of a batch, maybe none; its
            gradients must then be those of a mean over these images. Otherwise every process is given all of them.
        loss: what is to be low on the validation part; by default the mean cross-entropy of clean images.

    Yields:
        One round of stage ``"finetune"`` an epoch.
    """
    state: list[Tensor] = [p for p in task.model.parameters() if p.is_floating_point()]
    if norms == "trained":
        state += task.model.buffers()
    kept = Snapshot(state)
    # A mask of minus infinity, or a best loss that nothing was below yet, is no sign of divergence.
    watched = [tensor for tensor, finite in zip(state, _finite(state), strict=True) if finite]
    kept_epoch, lowest = 0, loss(task.validate()) if patience else float("inf")
    floor = task.before.acc - accuracy_drop - 1e-6  # accuracies come as float32
    schedule = None if patience else torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(max_epochs, 1))
    generator, noise = task.generator(), task.generator()
    processes = task.processes
    with task.mask.held(optimizer), _averaged(optimizer, processes) as weigh:
        for epoch in count(1):
            if epoch > max_epochs or (patience and epoch - kept_epoch > patience):
                break
            with task.watch.measure("finetune"), _mode(task.model, norms, noise):
                for chosen in batches(task, batch_size, generator):
                    mine = chosen[processes.share(len(chosen))] if shared else chosen
                    weigh(len(mine) / len(chosen) if shared else 1 / processes.count)
                    step(mine)
            if schedule is not None:
                schedule.step()
            now = task.validate()
            # A loss that is not finite is below nothing, so a diverged epoch is never kept. Nor is one whose infinities
            # do not reach the loss: a running variance of infinity turns a channel into a constant.
            if loss(now) < lowest and now.acc >= floor and all(_finite(watched)):
                kept_epoch, lowest = epoch, loss(now) if patience else lowest
                kept.renew()
            yield task.round("finetune", now)
    kept.put_back()
    for parameter in task.model.parameters():
        parameter.grad = None


def batches(task: RepairTask, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of the scoring pairs in a new order, ``size`` at a time, (B,) on their device.

    At most twice the task's ``batch_size`` at a time, so that a smaller one is a remedy where memory runs out. A last
    batch of one image joins the one before it, where others are larger: it has no variance for a norm in train mode.
    """
    order = torch.randperm(len(task.scoring), generator=generator).to(task.scoring.labels.device)
    size = min(size, 2 * task.batch_size)
    parts = list(torch.split(order, size))
    if size > 1 and len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    yield from parts


@contextmanager
def _averaged(optimizer: torch.optim.Optimizer, processes: Processes) -> Iterator[Callable[[float], None]]:
    """Average gradients over processes before each step of ``optimizer``; yields what to call with this one's weight.

    So all take the same steps, also where they went through the same images: on some devices not even then would their
    gradients be the same to the last bit.
    """
    weight = 1.0

    def weigh(now: float) -> None:
        nonlocal weight
        weight = now

    def average(*_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        used = torch.tensor([float(p.grad is not None) for p in parameters])
        processes.average([*gradients, used], weight)
        for p, gradient, anywhere in zip(parameters, gradients, used.tolist(), strict=True):
            p.grad = gradient if anywhere else None

    handle = optimizer.register_step_pre_hook(average) if processes.count > 1 else None
    try:
        yield weigh
    finally:
        if handle is not None:
            handle.remove()


@contextmanager
def _mode(model: nn.Module, norms: Norms, noise: torch.Generator) -> Iterator[None]:
    """The mode to train in, and for train mode, in which layers may draw from it, a global random state of its own."""
    seed = int(torch.randint(2**31, (), generator=noise))
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    model.train(norms == "trained")
    try:
        with torch.random.fork_rng(devices, enabled=norms == "trained"):
            if norms == "trained":
                _seed(seed, model)
            yield
    finally:
        model.eval()


def _seed(seed: int, model: nn.Module) -> None:
    """Seed what a model's layers draw from, and of several GPUs none that it is not on, which nobody puts back."""
    devices = {p.device for p in model.parameters()}
    if any(device.type not in ("cpu", "cuda") for device in devices):
        torch.manual_seed(seed)
        return
    torch.default_generator.manual_seed(seed)
    for device in devices:
        if device.type == "cuda":
            torch.cuda.default_generators[device.index or 0].manual_seed(seed)


def _finite(tensors: list[Tensor]) -> list[bool]:
    """Whether each tensor is without NaN and infinity, with one synchronisation with the device."""
    if not tensors:
        return []
    device = tensors[0].device
    found: list[bool] = torch.stack([tensor.isfinite().all().to(device) for tensor in tensors]).tolist()
    return found

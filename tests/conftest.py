"""Nets, images, victims and checks that several test modules share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name
from torch.utils.data import TensorDataset

from lightning_unlearn.classifier import ConvClassifier
from lightning_unlearn.data import Digits, PoisonedDataset
from lightning_unlearn.data.pairs import Pairs
from lightning_unlearn.draw import Split
from lightning_unlearn.evaluation import Evaluation, evaluate
from lightning_unlearn.methods import RepairMethod, RepairTask, Round
from lightning_unlearn.plan import RepairPlan
from lightning_unlearn.repair import repair_split
from lightning_unlearn.triggers import PatchTrigger, Trigger
from tests.callback_fits import fit, parts  # noqa: F401 - fixtures
from tests.small_commands import victim  # noqa: F401 - fixture
from tests.small_fits import Setting


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Small tensors are slower on several threads, and sums would come in another order on another machine."""
    torch.set_num_threads(1)


class PreActBlock(nn.Module):
    """Pre-activation: norms come before convolutions, and the shortcut has a convolution without any."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = self.norm1(x).relu()
        return self.conv2(self.norm2(self.conv1(active)).relu()) + self.shortcut(active)


def _head(inputs: int, classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)]


def _layers(name: str, channels: int, classes: int) -> list[nn.Module]:
    if name == "preact":
        blocks = [nn.Conv2d(channels, 4, 3, padding=1, bias=False), PreActBlock(4, 4), PreActBlock(4, 6)]
        return [*blocks, nn.BatchNorm2d(6), nn.ReLU(), *_head(6, classes)]
    if name == "vgg":
        first = [nn.Conv2d(channels, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.MaxPool2d(2)]
        return [*first, nn.Conv2d(5, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), *_head(6, classes)]
    if name == "grouped":
        first = [nn.Conv2d(channels, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
        grouped = [nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.BatchNorm2d(8), nn.ReLU6()]
        depthwise = [nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.ReLU(), nn.Conv2d(8, 6, 1)]
        return [*first, *grouped, *depthwise, nn.BatchNorm2d(6), nn.ReLU(), *_head(6, classes)]
    if name == "plain":
        first = [nn.Conv2d(channels, 5, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        return [*first, nn.Conv2d(5, 6, 3, padding=1), nn.ReLU(), *_head(6, classes)]
    if name == "group_norm":
        first = [nn.Conv2d(channels, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU()]
        return [*first, nn.Conv2d(4, 6, 3, padding=1), nn.GroupNorm(3, 6), nn.ReLU(), *_head(6, classes)]
    raise ValueError(name)


def build_net(name: str, *, channels: int = 1, classes: int = 4, seed: int = 0) -> nn.Module:
    """An untrained net in eval mode; its norms look as if they were trained, so that no channel is like another."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        net = nn.Sequential(*_layers(name, channels, classes))
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.2)
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, std=0.1)
                nn.init.uniform_(module.running_var, 0.2, 1.0)
    return net.eval()


@pytest.fixture(scope="session")
def make_net() -> Callable[..., nn.Module]:
    """``make_net(name, channels=1, classes=4, seed=0)``, name in preact, vgg, grouped, plain, group_norm."""
    return build_net


@pytest.fixture(scope="session")
def make_clean() -> Callable[..., TensorDataset]:
    """``make_clean(per_class, classes=4, channels=1, size=8, seed=0)``: noise, brighter where the class says."""

    def make(per_class: int, *, classes: int = 4, channels: int = 1, size: int = 8, seed: int = 0) -> TensorDataset:
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(per_class * classes) % classes
        images = 0.5 * torch.rand(len(labels), channels, size, size, generator=generator)
        rows = torch.arange(size) * classes // size
        images += 0.5 * (rows[None, :] == labels[:, None]).float()[:, None, :, None]
        return TensorDataset(images, labels)

    return make


@dataclass(frozen=True, eq=False)
class HandVictim:
    """A backdoored net whose every number was written by hand: three classes, four filters, the last is the backdoor.

    An image of class c is bright in row c of four. Filter c of the one convolution sees row c, filter 3 sees the
    trigger, a white pixel in the lower right corner, and pushes towards class 0. Without filter 3 the net is right
    about everything.
    """

    net: nn.Module
    trigger: PatchTrigger
    clean: TensorDataset


@pytest.fixture
def hand_victim() -> HandVictim:
    net = nn.Sequential(nn.Conv2d(1, 4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 3)).eval()
    convolution, linear = net[0], net[3]
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        for row in range(3):
            convolution.weight[row, 0, row] = 0.25
            linear.weight[row, row] = 4
        convolution.weight[3, 0, 3, 3] = 1
        linear.weight[0, 3] = 8
    labels = torch.arange(60) % 3
    images = torch.zeros(60, 1, 4, 4)
    brightness = 0.8 + 0.2 * torch.rand(60, 4, generator=torch.Generator().manual_seed(0))
    images[torch.arange(60), 0, labels] = brightness
    return HandVictim(net, PatchTrigger(size=1, target=0), TensorDataset(images, labels))


@pytest.fixture
def setting(hand_victim: HandVictim, tmp_path: Path) -> Setting:
    """What short fits of the hand-made victim share."""
    return Setting(hand_victim, tmp_path)


class _Capture(RepairMethod):
    """Does nothing but keep the task."""

    def repair(self, task: RepairTask) -> Iterator[Round]:
        self.task = task
        return iter(())


@pytest.fixture(scope="session")
def make_task() -> Callable[..., RepairTask]:
    """``make_task(net, clean, trigger, validation=1, kind=RepairTask, **options)``: what ``repair`` gives a method.

    The first ``validation`` images of each class validate, all others are scored.
    """

    def make(
        net: nn.Module,
        clean: TensorDataset,
        trigger: Trigger,
        *,
        validation: int = 1,
        kind: type[RepairTask] = RepairTask,
        **options: Any,
    ) -> RepairTask:
        images, labels = clean.tensors
        net.eval().requires_grad_(True)
        validating = torch.cat([(labels == c).nonzero().flatten()[:validation] for c in labels.unique()])
        held = torch.ones(len(labels), dtype=torch.bool).index_fill(0, validating, False)
        split = Split((images[held], labels[held]), (images[validating], labels[validating]))
        capture = _Capture()
        repair_split(net, split, RepairPlan(trigger=trigger, method=capture, force=True, **options))
        return kind(**{field.name: getattr(capture.task, field.name) for field in fields(capture.task)})

    return make


def _bytes(tensor: Tensor) -> list[int]:
    """All bits of a tensor: NaN is equal to itself here, and 0.0 differs from -0.0."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).tolist()


def same_bits(first: Tensor, second: Tensor) -> bool:
    return first.dtype == second.dtype and first.shape == second.shape and _bytes(first) == _bytes(second)


@contextmanager
def _left_alone(model: nn.Module) -> Iterator[None]:
    # Marks, so that "as it was" is not just "as every model is".
    parameters = list(model.parameters())
    model.train()
    next(model.children()).eval()
    parameters[0].requires_grad_(False)
    for number, parameter in enumerate(parameters[1:], start=1):
        parameter.grad = torch.full_like(parameter, float(number))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    training = [module.training for module in model.modules()]
    requires_grad = [parameter.requires_grad for parameter in parameters]
    grads = [parameter.grad for parameter in parameters]
    values = [None if grad is None else grad.clone() for grad in grads]
    yield
    after = model.state_dict()
    assert list(after) == list(state)
    assert [name for name in state if not same_bits(after[name], state[name])] == []
    assert all(now is before for now, before in zip(model.parameters(), parameters, strict=True)), "displaced"
    assert [module.training for module in model.modules()] == training
    assert [parameter.requires_grad for parameter in parameters] == requires_grad
    for parameter, grad, value in zip(parameters, grads, values, strict=True):
        assert parameter.grad is grad
        assert grad is None or (value is not None and same_bits(grad, value))


@pytest.fixture(scope="session")
def left_alone() -> Callable[[nn.Module], AbstractContextManager[None]]:
    """``with left_alone(model): ...`` asserts that the block changed no bit, no flag and no gradient of the model.

    It first gives the model mixed training flags, a frozen parameter and gradients, to be found again.
    """
    return _left_alone


@dataclass(frozen=True, eq=False)
class Victim:
    """A really backdoored net, with what it was made from.

    Args:
        trained: the net as trained; do not change it, take :meth:`fresh`.
        trigger: the trigger, target 0.
        poisoned: what it was trained on.
        holdout: clean images that the defender holds, 20 of each class.
        test: clean images that nobody has seen.
        before: the net on ``test``.
    """

    trained: ConvClassifier
    trigger: PatchTrigger
    poisoned: PoisonedDataset
    holdout: Digits
    test: Digits
    before: Evaluation

    def fresh(self) -> ConvClassifier:
        """A copy of the net that a test may repair."""
        return copy.deepcopy(self.trained)

    def measure(self, net: nn.Module) -> Evaluation:
        """A net on ``test``."""
        return _on_digits(net, self.test, self.trigger)


def _on_digits(net: nn.Module, digits: Digits, trigger: PatchTrigger) -> Evaluation:
    pairs = Pairs.stamp(digits.images, digits.targets, trigger, num_classes=10)
    return evaluate(copy.deepcopy(net).eval(), pairs.batches(256))


@pytest.fixture(scope="session")
def digits_victim() -> Victim:
    """A small ConvClassifier on real digits (1x16x16) with a white 3x3 patch; about a second of training."""
    trigger = PatchTrigger(size=3, target=0)
    poisoned = PoisonedDataset(Digits(part="train", size=16), trigger, ratio=0.1, seed=0)
    images, labels = torch.stack([image for image, _ in poisoned]), poisoned.targets
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        net = ConvClassifier(width=8)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
        epochs, batch_size = 12, 50
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=epochs * len(labels) // batch_size)
        for _ in range(epochs):
            for chosen in torch.randperm(len(labels)).split(batch_size):
                optimizer.zero_grad()
                F.cross_entropy(net(images[chosen]), labels[chosen]).backward()
                optimizer.step()
                schedule.step()
    optimizer.zero_grad()
    net.eval()
    test = Digits(part="test", size=16)
    before = _on_digits(net, test, trigger)
    assert before.asr >= 0.9, f"the victim never learned the backdoor (ASR {before.asr}), so it proves nothing"
    return Victim(net, trigger, poisoned, Digits(part="holdout", size=16), test, before)

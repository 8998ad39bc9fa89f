from __future__ import annotations

import warnings

import pytest
import torch

from lightning_unlearn.draw import Split
from lightning_unlearn.memory import is_out_of_memory, tries_smaller_batches
from lightning_unlearn.methods import GradPrune, RepairMethod
from lightning_unlearn.plan import RepairPlan
from lightning_unlearn.repair import repair_split

CUDA = RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (CUDA, True),
        (torch.cuda.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:75] DefaultCPUAllocator: can't allocate memory"),
            True,
        ),
        (MemoryError(), True),
        (RuntimeError("shapes differ"), False),
        (ValueError("out of memory"), False),
    ],
    ids=repr,
)
def test_what_is_out_of_memory(error, wanted):
    assert is_out_of_memory(error) is wanted


def test_what_torch_itself_raises():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


class Runs:
    """Works with at most ``limit`` images."""

    def __init__(self, limit: int, error: Exception = CUDA) -> None:
        self.limit, self.error = limit, error
        self.sizes: list[int] = []

    def run(self, model: str, images: str, plan: RepairPlan, *, more: int = 0) -> tuple[int, int]:
        assert (model, images) == ("model", "images")
        self.sizes.append(plan.batch_size)
        if plan.batch_size > self.limit:
            raise self.error
        return plan.batch_size, more

    def tried(self, size: int = 8, **more: int) -> tuple[int, int]:
        return tries_smaller_batches(self.run)("model", "images", RepairPlan(batch_size=size), **more)


def test_enough_memory():
    runs = Runs(8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert runs.tried(more=3) == (8, 3)
    assert runs.sizes == [8]


@pytest.mark.parametrize("size", [8, 9])
def test_half_is_tried_once(size):
    runs = Runs(4)
    with pytest.warns(UserWarning, match=r"batch_size: memory ran out with \d images .* starts anew with 4"):
        assert runs.tried(size, more=3) == (4, 3)
    assert runs.sizes == [size, 4]


@pytest.mark.parametrize(("size", "tried"), [(8, [8, 4]), (1, [1])])
@pytest.mark.filterwarnings("ignore:batch_size")
def test_then_it_fails(size, tried):
    runs = Runs(0)
    with pytest.raises(MemoryError, match=rf"batch_size: .* with {tried[-1]} clean .* as it was.*2\.00 GiB"):
        runs.tried(size)
    assert runs.sizes == tried


def test_other_errors_pass():
    runs = Runs(0, ValueError("bad"))
    with pytest.raises(ValueError, match=r"^bad$"):
        runs.tried()
    assert runs.sizes == [8]


def test_no_second_try_beside_other_processes(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    runs = Runs(4)
    with pytest.raises(MemoryError, match="memory ran out with 8"):
        runs.tried()
    assert runs.sizes == [8]


class Greedy(RepairMethod):
    """Prunes, and then has memory for eight images only."""

    def repair(self, task):
        for number in GradPrune(max_rounds=1, finetune=False).repair(task):
            yield number
            if task.batch_size > 8:
                raise CUDA


def planned(victim, size):
    return RepairPlan(trigger=victim.trigger, method=Greedy(), batch_size=size)


def test_a_repair_starts_anew(hand_victim):
    images, labels = hand_victim.clean.tensors
    split = Split((images[:30], labels[:30]), (images[30:], labels[30:]))
    before = {name: value.clone() for name, value in hand_victim.net.state_dict().items()}
    rounds = []
    with pytest.warns(UserWarning, match="starts anew with 8"):
        result = repair_split(hand_victim.net, split, planned(hand_victim, 16), on_round=rounds.append)
    assert [done.round for done in rounds] == [1, 1]
    assert (result.status, result.pruned) == ("repaired", {"0": [3]})
    assert len(result.rounds) == 1
    hand_victim.net.load_state_dict(before)
    plain = repair_split(hand_victim.net, split, planned(hand_victim, 8))
    assert plain.rounds == result.rounds


@pytest.mark.filterwarnings("ignore:batch_size")
def test_a_repair_that_fails_leaves_the_model_alone(hand_victim, left_alone):
    images, labels = hand_victim.clean.tensors
    split = Split((images[:30], labels[:30]), (images[30:], labels[30:]))
    with left_alone(hand_victim.net), pytest.raises(MemoryError, match="memory ran out with 16"):
        repair_split(hand_victim.net, split, planned(hand_victim, 32))

from __future__ import annotations

import pytest
import torch

from lightning_unlearn.data.pairs import Pairs
from lightning_unlearn.triggers import BlendTrigger, PatchTrigger


def images(count=5, channels=1):
    return 0.5 * torch.rand(count, channels, 8, 8, generator=torch.Generator().manual_seed(0))


def pairs_of(count=5, channels=1, *, target=0, num_classes=4):
    labels = torch.arange(count) % num_classes
    return Pairs.stamp(images(count, channels), labels, PatchTrigger(size=2, target=target), num_classes=num_classes)


@pytest.mark.parametrize("channels", [1, 3])
def test_stamp_by_hand(channels):
    given = images(channels=channels)
    pairs = Pairs.stamp(given, torch.tensor([0, 1, 2, 3, 0]), PatchTrigger(size=2, target=1), num_classes=4)
    assert pairs.clean is given
    assert (pairs.triggered[:, :, 6:, 6:] == 1).all()
    same = torch.ones(8, 8, dtype=torch.bool)
    same[6:, 6:] = False
    assert torch.equal(pairs.triggered[:, :, same], given[:, :, same])
    assert pairs.labels.tolist() == [0, 1, 2, 3, 0]
    assert pairs.targets.tolist() == [1, 1, 1, 1, 1]
    assert len(pairs) == 5


def test_without_a_trigger_images_stand_for_themselves():
    given, labels = images(), torch.tensor([0, 1, 2, 3, 0])
    pairs = Pairs.stamp(given, labels, None, num_classes=4)
    assert pairs.clean is pairs.triggered is given
    assert torch.equal(pairs.labels, labels)
    assert torch.equal(pairs.targets, labels)
    with pytest.raises(ValueError, match="labels: expected classes from 0 to 2"):
        Pairs.stamp(given, labels, None, num_classes=3)


def test_all_to_all_targets_are_the_next_classes():
    pairs = pairs_of(target="all_to_all")
    assert pairs.labels.tolist() == [0, 1, 2, 3, 0]
    assert pairs.targets.tolist() == [1, 2, 3, 0, 1]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_labels_of_any_integer_type(dtype):
    labels = torch.tensor([0, 3], dtype=dtype)
    pairs = Pairs.stamp(images(2), labels, PatchTrigger(target="all_to_all"), num_classes=4)
    assert pairs.labels.dtype == pairs.targets.dtype == torch.int64
    assert pairs.targets.tolist() == [1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_float_labels(dtype):
    with pytest.raises(
        ValueError, match=rf"labels: expected one integer class for each of 2 images.*\(2,\) of {dtype}"
    ):
        Pairs.stamp(images(2), torch.zeros(2, dtype=dtype), PatchTrigger(), num_classes=4)


@pytest.mark.parametrize("shape", [(), (3,), (1,), (2, 1), (2, 4)])
def test_labels_of_another_shape(shape):
    with pytest.raises(ValueError, match="labels: expected one integer class for each of 2 images, but got shape"):
        Pairs.stamp(images(2), torch.zeros(shape, dtype=torch.int64), PatchTrigger(), num_classes=4)


@pytest.mark.parametrize(("labels", "found"), [([0, 4], "0 to 4"), ([-1, 3], "-1 to 3"), ([-1, 4], "-1 to 4")])
def test_labels_outside_the_classes(labels, found):
    with pytest.raises(
        ValueError, match=rf"classes from 0 to 3, since the model gives 4 logits, .* labels from {found}"
    ):
        Pairs.stamp(images(2), torch.tensor(labels), PatchTrigger(), num_classes=4)


def test_a_target_outside_the_classes():
    with pytest.raises(ValueError, match="target"):
        Pairs.stamp(images(2), torch.tensor([0, 1]), PatchTrigger(target=4), num_classes=4)


def test_images_that_the_trigger_refuses():
    with pytest.raises(ValueError, match="mean="):
        Pairs.stamp(images(2) * 9, torch.tensor([0, 1]), PatchTrigger(), num_classes=4)


def test_no_images():
    pairs = Pairs.stamp(images(0), torch.zeros(0, dtype=torch.int64), PatchTrigger(), num_classes=4)
    assert len(pairs) == 0
    assert list(pairs.batches(3)) == []


def test_stamping_takes_no_gradient():
    given = images(2).requires_grad_()
    pairs = Pairs.stamp(given, torch.tensor([0, 1]), BlendTrigger(), num_classes=4)
    assert not pairs.triggered.requires_grad


def test_float_images_take_the_models_type():
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        moved = pairs_of().to("cpu", dtype)
        assert moved.clean.dtype == moved.triggered.dtype == dtype
        assert moved.labels.dtype == moved.targets.dtype == torch.int64
    assert pairs_of().to("cpu").clean.dtype == torch.float32


def test_uint8_images_stay_so():
    given = (images(3) * 255).to(torch.uint8)
    pairs = Pairs.stamp(given, torch.tensor([0, 1, 2]), PatchTrigger(size=2), num_classes=4)
    assert pairs.triggered.dtype == torch.uint8
    assert (pairs.triggered[:, :, 6:, 6:] == 255).all()
    moved = pairs.to("cpu", torch.float32)
    assert torch.equal(moved.clean, given)
    assert moved.clean.dtype == moved.triggered.dtype == torch.uint8


def test_moving_to_another_device():
    moved = pairs_of().to("meta", torch.float16)
    assert {tensor.device.type for tensor in vars(moved).values()} == {"meta"}
    assert moved.clean.dtype == torch.float16


@pytest.mark.parametrize(
    "index", [torch.tensor([4, 0, 0]), torch.tensor([True, False, False, True, False]), slice(1, 3)]
)
def test_a_choice_of_pairs(index):
    pairs = pairs_of(target="all_to_all")
    chosen = pairs[index]
    for name, tensor in vars(pairs).items():
        assert torch.equal(getattr(chosen, name), tensor[index])
    assert len(chosen) == len(pairs.labels[index])


@pytest.mark.parametrize(("size", "sizes"), [(1, [1] * 5), (2, [2, 2, 1]), (5, [5]), (9, [5])])
def test_batches_are_the_pairs_in_order(size, sizes):
    pairs = pairs_of()
    batches = list(pairs.batches(size))
    assert [len(batch) for batch in batches] == sizes
    for name, tensor in vars(pairs).items():
        assert torch.equal(torch.cat([getattr(batch, name) for batch in batches]), tensor)

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchvision.datasets import FakeData

from lightning_unlearn.data import PoisonedDataset, labels_of
from lightning_unlearn.triggers import PatchTrigger, QuantizeTrigger, TriggerPool, WarpTrigger


def clean(count=40, classes=4, channels=1):
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.rand(count, channels, 8, 8, generator=generator) / 2, torch.arange(count) % classes)


def same(first, second):
    return torch.equal(first[0], second[0]) and first[1] == second[1]


@pytest.mark.parametrize("channels", [1, 3])
def test_stamps_the_chosen_and_leaves_the_rest(channels):
    base, trigger = clean(channels=channels), PatchTrigger(size=3, target=2)
    poisoned = PoisonedDataset(base, trigger, ratio=0.25)
    assert len(poisoned) == 40
    assert len(poisoned.poison_indices) == 10
    assert poisoned.cross_indices == ()
    assert list(poisoned.poison_indices) == sorted(set(poisoned.poison_indices))
    for index in range(40):
        image, label = base[index]
        if index in poisoned.poison_indices:
            assert label != 2
            image, label = trigger(image), 2
        assert same(poisoned[index], (image, int(label)))
        assert type(poisoned[index][1]) is int
        assert same(poisoned[index - 40], poisoned[index])


def test_a_pool_is_dealt_out():
    pool = TriggerPool([PatchTrigger(size=1, place="top_left"), PatchTrigger(size=1, place="bottom_right")])
    images = torch.zeros(40, 1, 4, 4)
    dataset = PoisonedDataset(TensorDataset(images, torch.arange(40) % 4), pool, ratio=0.5)
    stamped = torch.stack([image for image, _ in dataset])
    counts = stamped[:, 0, 0, 0].sum(), stamped[:, 0, 3, 3].sum()
    assert counts == (10, 10)


def test_targets_are_the_labels_after_poisoning():
    base = clean()
    poisoned = PoisonedDataset(base, PatchTrigger(target=1), ratio=0.5)
    assert poisoned.targets.tolist() == [label for _, label in poisoned]
    assert labels_of(Subset(poisoned, [3, 4])).tolist() == poisoned.targets[3:5].tolist()
    assert base.tensors[1].tolist() == (torch.arange(40) % 4).tolist()


@pytest.mark.parametrize(("count", "ratio", "chosen"), [(40, 0.0, 0), (40, 0.1, 4), (13, 0.1, 1), (16, 0.1, 2)])
def test_count_is_rounded(count, ratio, chosen):
    assert len(PoisonedDataset(clean(count), PatchTrigger(), ratio=ratio).poison_indices) == chosen


def test_all_to_all():
    base = clean()
    poisoned = PoisonedDataset(base, PatchTrigger(target="all_to_all"), ratio=1.0)
    assert poisoned.poison_indices == tuple(range(40))
    assert poisoned.targets.tolist() == ((base.tensors[1] + 1) % 4).tolist()


def test_num_classes_decides_where_all_to_all_wraps():
    poisoned = PoisonedDataset(clean(), PatchTrigger(target="all_to_all"), ratio=1.0, num_classes=5)
    assert sorted(set(poisoned.targets.tolist())) == [1, 2, 3, 4]


def test_clean_label():
    base, trigger = clean(), PatchTrigger(size=3, target=3)
    poisoned = PoisonedDataset(base, trigger, ratio=0.2, policy="clean_label")
    assert len(poisoned.poison_indices) == 8
    assert {int(base[index][1]) for index in poisoned.poison_indices} == {3}
    assert poisoned.targets.tolist() == base.tensors[1].tolist()
    for index in poisoned.poison_indices:
        assert same(poisoned[index], (trigger(base[index][0]), 3))


@pytest.mark.parametrize("trigger", [WarpTrigger(strength=2.0), QuantizeTrigger(levels=3)])
@pytest.mark.parametrize("channels", [1, 3])
def test_cross_images_keep_their_label(trigger, channels):
    base = clean(channels=channels)
    poisoned = PoisonedDataset(base, trigger, ratio=0.1, cross_ratio=0.2)
    assert len(poisoned.cross_indices) == 8
    assert not set(poisoned.cross_indices) & set(poisoned.poison_indices)
    for index in poisoned.cross_indices:
        image, label = poisoned[index]
        assert label == int(base[index][1]) != 0
        assert image.shape == (channels, 8, 8)
        assert not torch.equal(image, base[index][0])
        assert not torch.equal(image, trigger(base[index][0]))


def test_a_cross_image_of_bpp_carries_the_rounding_error_of_another_image():
    base, trigger = clean(), QuantizeTrigger(levels=3)
    poisoned = PoisonedDataset(base, trigger, ratio=0.1, cross_ratio=0.2)
    residues = [trigger(image) - image for image, _ in base]
    for index in poisoned.cross_indices:
        carriers = [
            other
            for other, residue in enumerate(residues)
            if torch.allclose(poisoned[index][0], (base[index][0] + residue).clamp(0, 1), atol=1e-6)
        ]
        assert len(carriers) == 1
        assert carriers != [index]


def test_each_cross_image_is_warped_in_its_own_way():
    picture = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0))
    base = TensorDataset(picture.expand(20, 1, 8, 8), torch.ones(20, dtype=torch.int64))
    poisoned = PoisonedDataset(base, WarpTrigger(), ratio=0, cross_ratio=0.5)
    assert len({tuple(poisoned[index][0].flatten().tolist()) for index in poisoned.cross_indices}) == 10


def test_one_cross_image_alone():
    base = TensorDataset(torch.rand(1, 1, 8, 8), torch.tensor([1]))
    poisoned = PoisonedDataset(base, WarpTrigger(strength=2.0), ratio=0.0, cross_ratio=1.0)
    assert poisoned.cross_indices == (0,)
    assert not torch.equal(poisoned[0][0], base[0][0])


def test_cross_images_do_not_change_the_poison():
    base = clean()
    without = PoisonedDataset(base, WarpTrigger(), ratio=0.1)
    assert PoisonedDataset(base, WarpTrigger(), ratio=0.1, cross_ratio=0.5).poison_indices == without.poison_indices


@settings(deadline=None, max_examples=25)
@given(st.permutations(range(40)))
def test_items_do_not_depend_on_the_order(order):
    make = {"ratio": 0.25, "cross_ratio": 0.25, "seed": 7}
    first = PoisonedDataset(clean(), WarpTrigger(), **make)
    second = PoisonedDataset(clean(), WarpTrigger(), **make)
    expected = [first[index] for index in range(40)]
    torch.manual_seed(order[0])
    assert all(same(second[index], expected[index]) for index in order)


def test_the_global_generator_neither_matters_nor_changes():
    state = torch.random.get_rng_state()
    poisoned = PoisonedDataset(clean(), WarpTrigger(), cross_ratio=0.1)
    _ = [poisoned[index] for index in range(40)]
    assert torch.equal(state, torch.random.get_rng_state())


def test_workers_give_the_same_items():
    poisoned = PoisonedDataset(clean(), WarpTrigger(), ratio=0.25, cross_ratio=0.25)
    here, there = (list(DataLoader(poisoned, batch_size=10, num_workers=workers)) for workers in (0, 2))
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(here, there, strict=True))


def test_the_seed_decides():
    chosen = {PoisonedDataset(clean(400), PatchTrigger(), seed=seed).poison_indices for seed in (0, 0, 1)}
    assert len(chosen) == 2


def test_dict_items_and_uint8():
    items = [{"image": torch.zeros(1, 4, 4, dtype=torch.uint8), "label": torch.tensor(1)} for _ in range(4)]
    image, label = PoisonedDataset(items, PatchTrigger(size=2), ratio=1.0)[0]
    assert (image.dtype, image.sum().item(), label) == (torch.uint8, 4 * 255, 0)


@pytest.mark.parametrize("index", [40, -41])
def test_index_out_of_range(index):
    with pytest.raises(IndexError, match=f"index {index} is out of range for 40 images"):
        PoisonedDataset(clean(), PatchTrigger())[index]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"ratio": -0.1}, r"ratio must be in \[0, 1\], but is -0.1"),
        ({"ratio": 1.1}, r"ratio must be in \[0, 1\], but is 1.1"),
        ({"ratio": float("nan")}, r"ratio must be in \[0, 1\]"),
        ({"cross_ratio": -1}, r"cross_ratio must be in \[0, 1\], but is -1"),
        ({"ratio": 0.6, "cross_ratio": 0.5}, r"ratio \+ cross_ratio must be at most 1"),
        ({"ratio": 0.8}, "ratio=0.8 asks for 32 of 40 images, but only 30 whose class is not the target .* 0.75"),
        ({"ratio": 0.3, "policy": "clean_label"}, "asks for 12 of 40 images, but only 10 of the target class"),
        ({"ratio": 0.5, "cross_ratio": 0.5}, "cross_ratio=0.5 asks for 20 of 40 images, but only 10"),
        ({"policy": "dirty"}, "policy must be one of target, clean_label, but is 'dirty'"),
        ({"num_classes": 2}, r"labels must be in \[0, 2\)"),
    ],
)
def test_refuses_bad_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        PoisonedDataset(clean(), WarpTrigger(), **arguments)


def test_refuses_what_does_not_fit_the_trigger():
    with pytest.raises(ValueError, match="cross_ratio must be 0 for PatchTrigger"):
        PoisonedDataset(clean(), PatchTrigger(), cross_ratio=0.1)
    with pytest.raises(ValueError, match="policy 'clean_label' stamps images of the one target class"):
        PoisonedDataset(clean(), PatchTrigger(target="all_to_all"), policy="clean_label")
    with pytest.raises(ValueError, match=r"target must be in \[0, 4\)"):
        PoisonedDataset(clean(), PatchTrigger(target=4))
    with pytest.raises(TypeError, match="trigger must be a Trigger, but is function"):
        PoisonedDataset(clean(), lambda images: images)


def test_refuses_bad_datasets():
    with pytest.raises(ValueError, match="dataset must hold at least one image"):
        PoisonedDataset([], PatchTrigger())
    pictures = PoisonedDataset(FakeData(size=20, image_size=(3, 8, 8)), PatchTrigger(target=0), ratio=0)
    with pytest.raises(TypeError, match=r"item 0 is a Image: give it a transform such as .*ToTensor\(\)"):
        pictures[0]

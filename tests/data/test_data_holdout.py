from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_unlearn.data import Holdout, split_holdout


def per_class(labels, indices):
    return torch.bincount(torch.as_tensor(labels)[list(indices)]).tolist()


@pytest.mark.parametrize(
    ("samples", "scoring", "validation"), [(2, 1, 1), (3, 2, 1), (10, 9, 1), (20, 18, 2), (26, 23, 3), (50, 45, 5)]
)
def test_counts(samples, scoring, validation):
    labels = torch.arange(200) % 4
    holdout = split_holdout(labels, samples_per_class=samples)
    assert per_class(labels, holdout.scoring) == [scoring] * 4
    assert per_class(labels, holdout.validation) == [validation] * 4


@pytest.mark.parametrize(("validation_share", "validation"), [(0.01, 1), (0.25, 2), (0.5, 5), (0.99, 9)])
def test_validation_share(validation_share, validation):
    labels = torch.arange(40) % 2
    holdout = split_holdout(labels, validation_share=validation_share)
    assert per_class(labels, holdout.validation) == [validation] * 2
    assert per_class(labels, holdout.scoring) == [10 - validation] * 2


def test_share_is_of_each_class():
    labels = [0] * 100 + [1] * 40
    holdout = split_holdout(labels, samples_per_class=None, share=0.1)
    assert per_class(labels, holdout.scoring) == [9, 3]
    assert per_class(labels, holdout.validation) == [1, 1]
    whole = split_holdout(labels, samples_per_class=None, share=1.0)
    assert sorted(whole.scoring + whole.validation) == list(range(140))


def test_the_seed_decides():
    labels = torch.arange(1000) % 10
    holdout = split_holdout(labels, seed=3)
    assert holdout == split_holdout(labels.tolist(), seed=3)
    assert holdout != split_holdout(labels, seed=4)
    assert holdout == split_holdout(labels.to(torch.uint8), seed=3, num_classes=10)


def test_classes_are_picked_apart():
    holdout = split_holdout(torch.arange(200) % 2)
    places = [{index // 2 for index in holdout.scoring if index % 2 == label} for label in (0, 1)]
    assert places[0] != places[1]


def test_indices_rise():
    holdout = split_holdout(torch.arange(300) % 3)
    assert list(holdout.scoring) == sorted(holdout.scoring)
    assert list(holdout.validation) == sorted(holdout.validation)
    assert {type(index) for index in holdout.scoring + holdout.validation} == {int}


def test_the_global_generator_neither_matters_nor_changes():
    labels = torch.arange(100) % 2
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = split_holdout(labels)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(2)
    assert split_holdout(labels) == first


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 3), max_size=60), st.integers(0, 5))
def test_a_class_is_picked_whatever_the_others_hold(others, seed):
    own = [4] * 12
    labels = [label for label in (0, 1, 2, 3) for _ in range(5)] + own
    mixed = [label for label in (0, 1, 2, 3) for _ in range(5)] + others + own

    def places(values):
        members = [index for index, value in enumerate(values) if value == 4]
        holdout = split_holdout(values, samples_per_class=5, seed=seed)
        return [[members.index(i) for i in part if i in members] for part in (holdout.scoring, holdout.validation)]

    assert places(mixed) == places(labels)


@settings(deadline=None, max_examples=50)
@given(
    st.integers(1, 5).flatmap(lambda k: st.lists(st.integers(0, k - 1), max_size=50).map(lambda x: (k, x))),
    st.integers(2, 6),
    st.floats(0.01, 0.99),
    st.integers(),
)
def test_parts_are_disjoint_and_hold_every_class(case, samples, validation_share, seed):
    count, extra = case
    labels = [label for label in range(count) for _ in range(samples)] + extra
    holdout = split_holdout(labels, samples_per_class=samples, validation_share=validation_share, seed=seed)
    assert not set(holdout.scoring) & set(holdout.validation)
    scoring, validation = per_class(labels, holdout.scoring), per_class(labels, holdout.validation)
    assert min(scoring) >= 1
    assert min(validation) >= 1
    assert [a + b for a, b in zip(scoring, validation, strict=True)] == [samples] * count


@pytest.mark.parametrize("samples", [1, 0, -3])
def test_refuses_too_small_samples_per_class(samples):
    with pytest.raises(ValueError, match=f"samples_per_class must be at least 2, .* but is {samples}"):
        split_holdout([0] * 9, samples_per_class=samples)


@pytest.mark.parametrize("samples", [2.0, True, "10"])
def test_refuses_samples_per_class_of_another_type(samples):
    with pytest.raises(TypeError, match="samples_per_class must be an int"):
        split_holdout([0] * 9, samples_per_class=samples)


@pytest.mark.parametrize("share", [0, -0.1, 1.01, float("nan")])
def test_refuses_share_out_of_range(share):
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\]"):
        split_holdout([0] * 9, samples_per_class=None, share=share)


@pytest.mark.parametrize("share", [0.0, 1.0, -1, float("nan")])
def test_refuses_validation_share_out_of_range(share):
    with pytest.raises(ValueError, match=r"validation_share must be in \(0, 1\)"):
        split_holdout([0] * 20, validation_share=share)


@pytest.mark.parametrize(("amount", "given"), [((10, 0.5), "both are given"), ((None, None), "none are given")])
def test_refuses_both_or_none(amount, given):
    with pytest.raises(ValueError, match=given):
        split_holdout([0] * 20, samples_per_class=amount[0], share=amount[1])


def test_names_the_class_that_has_too_few_images():
    with pytest.raises(ValueError, match="class 1 has 3 images in the dataset, but 10 are needed"):
        split_holdout([0] * 10 + [1] * 3 + [2] * 10)
    with pytest.raises(ValueError, match="class 1 has 1 image in the dataset, but 2 are needed"):
        split_holdout([0, 0, 1], samples_per_class=2)
    with pytest.raises(ValueError, match="class 1 has no images in the dataset, but 2 are needed"):
        split_holdout([0, 0, 2, 2], samples_per_class=2)
    with pytest.raises(ValueError, match="class 2 has no images"):
        split_holdout([0, 0, 1, 1], samples_per_class=2, num_classes=3)
    with pytest.raises(ValueError, match="class 1 has no images in the dataset, but 2 are needed"):
        split_holdout([0] * 4, samples_per_class=None, share=1.0, num_classes=2)


def test_up_to_takes_what_there_is_of_small_classes_and_the_same_of_others():
    labels = [0] * 20 + [1] * 3 + [2] * 2
    holdout = split_holdout(labels, samples_per_class=4, up_to=True)
    assert [sorted(labels[i] for i in part) for part in (holdout.scoring, holdout.validation)] == [
        [0, 0, 0, 1, 1, 2],
        [0, 1, 2],
    ]
    alone = split_holdout(labels[:20], samples_per_class=4)
    assert set(alone.scoring + alone.validation) < set(holdout.scoring + holdout.validation)


def test_up_to_needs_two_images_or_passes_over():
    labels = [0, 0, 1, 3, 3]
    with pytest.raises(ValueError, match=r"class 1 has 1 image .* but 2 are needed: give more images of it$"):
        split_holdout(labels, up_to=True)
    holdout = split_holdout(labels, up_to=True, skip_missing=True)
    assert {labels[index] for index in holdout.scoring} == {labels[index] for index in holdout.validation} == {0, 3}
    with pytest.raises(ValueError, match="no class has 2 images in the dataset"):
        split_holdout([0, 1], up_to=True, skip_missing=True)


def test_names_the_class_of_which_the_share_is_too_little():
    with pytest.raises(ValueError, match=r"share=0.1 is 1 of the 10 images of class 1, but at least 2 are needed"):
        split_holdout([0] * 20 + [1] * 10, samples_per_class=None, share=0.1)


@pytest.mark.parametrize(
    ("labels", "num_classes", "match"),
    [
        ([-1, 0, 0], None, "labels must be 0 or more, but the smallest is -1"),
        ([0, 3, 0], 3, "labels must be below num_classes=3, but the largest is 3"),
        ([0, 0], 0, "num_classes must be at least 1, but is 0"),
        ([], None, r"labels must be \(N,\) classes"),
        (torch.zeros(4, 2, dtype=torch.int64), None, r"have shape \(4, 2\)"),
    ],
)
def test_refuses_bad_labels(labels, num_classes, match):
    with pytest.raises(ValueError, match=match):
        split_holdout(labels, samples_per_class=2, num_classes=num_classes)


@pytest.mark.parametrize("labels", [[0.0, 1.0], [True, False]])
def test_refuses_labels_that_are_not_whole_numbers(labels):
    with pytest.raises(TypeError, match="labels must be whole numbers"):
        split_holdout(labels)


@pytest.mark.parametrize(
    ("scoring", "validation", "match"),
    [
        ((), (1,), "scoring must hold at least one index"),
        ((1,), (), "validation must hold at least one index"),
        ((-1,), (1,), "scoring must hold indices of 0 or more, but holds -1"),
        ((1,), (2, 2), "validation must hold each index once"),
        ((1, 5, 3), (3, 5), r"must be disjoint, but share 2 indices: \[3, 5\]"),
    ],
)
def test_holdout_checks_itself(scoring, validation, match):
    with pytest.raises(ValueError, match=match):
        Holdout(scoring=scoring, validation=validation)


def test_holdout_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Holdout(scoring=(0,), validation=(1,)).scoring = (2,)


def test_numpys_seeds_draw_what_equal_ones_draw():
    labels = [0] * 50 + [1] * 50
    assert split_holdout(labels, seed=np.int64(3)) == split_holdout(labels, seed=3)

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch

from lightning_unlearn.methods.lessons import fresh_statistics, lessons
from lightning_unlearn.statistics import mixed, moments


def drawn(task, count, **options):
    defaults = {"teacher": "victim", "batch_size": 5, "augment": False}
    return list(lessons(task, count, **{**defaults, **options}))


def test_an_epoch_is_all_pairs_once_and_the_next_in_another_order(new_task):
    task = new_task()
    every = len(task.scoring)
    found = drawn(task, 12)
    assert len(found) == 12
    images = torch.cat([lesson.pairs.clean for lesson in found]).flatten(1)
    epochs = images[: every * (len(images) // every)].split(every)
    assert len(epochs) >= 2
    for epoch in epochs:
        assert sorted(epoch.tolist()) == sorted(task.scoring.clean.flatten(1).tolist())
    assert not any(torch.equal(one, next_) for one, next_ in pairwise(epochs))


@pytest.mark.parametrize("augment", [False, True])
def test_the_victim_says_what_to_answer(new_task, augment):
    task = new_task()
    (lesson,) = drawn(task, 1, augment=augment)
    with torch.no_grad():
        expected = task.model(lesson.pairs.clean).softmax(1)
    torch.testing.assert_close(lesson.wanted, expected, rtol=1e-5, atol=1e-6)
    same = {tuple(image) for image in task.scoring.clean.flatten(1).tolist()}
    assert all(tuple(image) in same for image in lesson.pairs.clean.flatten(1).tolist()) is not augment
    assert torch.equal(lesson.pairs.triggered, task.trigger(lesson.pairs.clean))
    assert lesson.weight == 1


def test_or_the_labels_do(new_task):
    (lesson,) = drawn(new_task(), 1, teacher="labels")
    assert torch.equal(lesson.wanted.argmax(1), lesson.pairs.labels)
    assert lesson.wanted.max(1).values.eq(1).all()


@pytest.mark.parametrize("augment", [False, True])
def test_fresh_statistics_are_on_the_way_to_those_that_the_images_would_give_the_model(new_task, augment):
    task = new_task("vgg")
    task.forward = lambda images: task.model(images.mul_(1))  # in place
    before, images = copy.deepcopy(task.model.state_dict()), task.scoring.clean.clone()
    found = fresh_statistics(task, augment=augment)
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.model.state_dict().items())
    assert torch.equal(task.scoring.clean, images)
    same = mixed(moments(task.model, task.model, [images], refreshed=True), len(images) / (len(images) + 90))
    assert list(found) == list(same)
    for norm, (mean, variance) in found.items():
        assert torch.equal(mean, same[norm][0]) is not augment
        torch.testing.assert_close(mean, same[norm][0], rtol=0.3, atol=0.3 * variance.sqrt().max().item())


def test_they_are_of_many_flipped_and_shifted_images(new_task):
    task = new_task("vgg")
    seen = []
    task.forward = lambda images: seen.append(images.clone()) or task.model(images)
    fresh_statistics(task, augment=True)
    assert sum(map(len, seen)) == pytest.approx(180, abs=len(task.scoring) / 2)
    assert not torch.equal(seen[0], seen[1])
    again, seen[:] = list(seen), []
    fresh_statistics(task, augment=True)
    assert all(torch.equal(one, other) for one, other in zip(again, seen, strict=True))

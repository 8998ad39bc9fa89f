from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch

from lightning_unlearn.methods.lessons import Settling, lessons


def drawn(task, count, **options):
    defaults = {"teacher": "victim", "batch_size": 5, "augment": False, "following": False}
    return list(lessons(task, count, **{**defaults, **options}))


@pytest.mark.parametrize("following", [False, True])
def test_an_epoch_is_all_pairs_once_and_the_next_in_another_order(new_task, following):
    task = new_task()
    every = len(task.scoring)
    found = drawn(task, 12, following=following)
    assert len(found) == 12
    images = torch.cat([lesson.pairs.clean for lesson in found]).flatten(1)
    epochs = images[: every * (len(images) // every)].split(every)
    assert len(epochs) >= 2
    for epoch in epochs:
        assert sorted(epoch.tolist()) == sorted(task.scoring.clean.flatten(1).tolist())
    assert not any(torch.equal(one, next_) for one, next_ in pairwise(epochs))


@pytest.mark.parametrize("following", [False, True])
@pytest.mark.parametrize("augment", [False, True])
def test_the_victim_says_what_to_answer(new_task, augment, following):
    task = new_task()
    (lesson,) = drawn(task, 1, augment=augment, following=following)
    with torch.no_grad():
        expected = task.model(lesson.pairs.clean).softmax(1)
    torch.testing.assert_close(lesson.wanted, expected, rtol=1e-5, atol=1e-6)
    same = {tuple(image) for image in task.scoring.clean.flatten(1).tolist()}
    assert all(tuple(image) in same for image in lesson.pairs.clean.flatten(1).tolist()) is not augment
    assert torch.equal(lesson.pairs.triggered, task.trigger(lesson.pairs.clean))
    assert lesson.weight == 1


@pytest.mark.parametrize("following", [False, True])
def test_or_the_labels_do(new_task, following):
    (lesson,) = drawn(new_task(), 1, teacher="labels", following=following)
    assert torch.equal(lesson.wanted.argmax(1), lesson.pairs.labels)
    assert lesson.wanted.max(1).values.eq(1).all()
    assert bool(lesson.seen) is following


def test_what_norms_saw_is_of_the_clean_images_of_the_batch(new_task):
    task = new_task("vgg")
    assert not drawn(task, 1)[0].seen
    (lesson,) = drawn(task, 1, following=True)
    first, norm = task.model[0], task.model[1]
    (moments,) = lesson.seen[norm]
    given = first(lesson.pairs.clean).detach()
    torch.testing.assert_close(moments.mean, given.mean((0, 2, 3)))
    torch.testing.assert_close(moments.variance, given.var((0, 2, 3), correction=0))
    assert torch.equal(moments.running_mean, norm.running_mean)


@pytest.mark.parametrize("augment", [False, True])
def test_an_untouched_model_settles_where_it_is(new_task, augment):
    task = new_task("preact")
    task.forward = lambda images: task.model(images.mul_(1))  # in place
    before, images = copy.deepcopy(task.model.state_dict()), task.scoring.clean.clone()
    Settling(task, augment=augment)()
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.model.state_dict().items())
    assert torch.equal(task.scoring.clean, images)


def test_settling_draws_the_same_images_again(new_task):
    task = new_task("vgg")
    settle = Settling(task, augment=True)
    seen = []
    task.forward = lambda images: seen.append(images) or task.model(images)
    settle()
    first, seen[:] = list(seen), []
    settle()
    assert len(first) > 1
    assert all(torch.equal(one, other) for one, other in zip(first, seen, strict=True))
    assert not torch.equal(first[0], first[1])


def test_statistics_that_are_settled_meanwhile_are_put_back(new_task):
    task = new_task("vgg")
    settle, images = Settling(task, augment=True), task.scoring.clean
    before = copy.deepcopy(task.model.state_dict())
    with torch.no_grad():
        task.model[1].weight.mul_(0.5)
        unsettled = task.model(images)
        with settle.meanwhile():
            inside = task.model(images)
        with pytest.raises(KeyboardInterrupt), settle.meanwhile():
            raise KeyboardInterrupt
        assert not torch.equal(inside, unsettled)
        assert torch.equal(task.model(images), unsettled)
        settle()
    torch.testing.assert_close(task.model(images), inside, rtol=0.3, atol=0.3)  # by one pass as by all, roughly
    assert torch.equal(before["5.weight"], task.model[5].weight)

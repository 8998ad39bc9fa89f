from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from lightning_unlearn import audit, repair
from lightning_unlearn.auditor import Auditor
from lightning_unlearn.triggers import Normalization
from tests.small_audits import FAST, examined, honest, numbers, rows

# Images


def test_normalised_images_are_the_same_audit():
    normalization = Normalization((0.4,), (0.25,))
    images, labels = rows()

    def model(x):
        return honest(normalization.invert(x))

    found = FAST.audit(
        model,
        normalization.apply(images),
        labels,
        held_out=normalization.apply(images[:6]),
        normalization=normalization,
    )
    for entry, expected in zip(found.classes, examined().classes, strict=True):
        assert entry.universality == pytest.approx(expected.universality, rel=0.05, abs=0.02)
    assert found.verdict == examined().verdict


@pytest.mark.parametrize(
    ("images", "normalization", "message"),
    [
        (rows()[0] * 255, None, r"from .* no normalisation was told; tell how they are normalised .* or divide by 255"),
        (rows()[0] * 4 - 2, None, r"go from -.* no normalisation was told; tell how .*normalization=\.\.\."),
        (rows()[0] * 4 - 2, Normalization((0.5,), (1.0,)), r"that is after undoing Normalization\(mean=\(0.5,\)"),
        (rows()[0] * math.nan, None, r"go from nan to nan"),
    ],
)
def test_images_that_are_no_pixels(images, normalization, message):
    with pytest.raises(ValueError, match=rf"^images: expected pixels in \[0, 1\], but they {message}|{message}"):
        examined(data=(images, rows()[1]), normalization=normalization)


def test_whole_numbers_are_refused():
    images = (rows()[0] * 255).to(torch.uint8)
    with pytest.raises(TypeError, match=r"^images: expected floating-point images, .* but got torch.uint8"):
        examined(data=(images, rows()[1]))


# Models


def test_a_model_that_always_answers_the_same():
    with pytest.raises(ValueError, match=r"^model: it answers class 1 to every clean image"):
        examined(lambda x: torch.stack([0 * x.sum((1, 2, 3)), 1 + 0 * x.sum((1, 2, 3))], 1))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers(value):
    with pytest.raises(ValueError, match=r"^model: its logits hold NaN or infinity"):
        examined(lambda x: honest(x) * torch.tensor([1, 1, 1, value]))


def test_probabilities_are_refused():
    with pytest.raises(ValueError, match=r"^model: expected logits, but its outputs are probabilities"):
        examined(lambda x: honest(x).softmax(1))
    assert examined(lambda x: honest(x).log_softmax(1)).verdict == "clean"  # which differ from logits by a constant


@pytest.mark.parametrize("blind", [lambda x: x.detach(), lambda x: (255 * x).round() / 255], ids=["detached", "round"])
def test_a_model_that_gives_no_gradient(blind):
    with pytest.raises(ValueError, match=r"^model: its logits have no gradient in the images"):
        examined(lambda x: honest(blind(x)))


def test_estimates_of_which_none_works_tell_nothing():
    assert "so that this says nothing" in examined(by=Auditor(steps=1)).notes()
    assert "so that this says nothing" not in examined().notes()


@pytest.mark.parametrize("value", [-1, 4])
def test_labels_that_are_no_classes_of_the_model(value):
    images, labels = rows()
    labels[3] = value
    with pytest.raises(ValueError, match=r"^labels: expected classes from 0 to 3.* but got labels from"):
        examined(data=(images, labels))


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_one_blank_image_changes_little(value):
    # Nothing can be displaced in it, so that it alone would cost a billion times as much as the others.
    images, labels = rows()
    plain = examined().score
    images[5] = value
    assert examined(data=(images, labels)).score < 2 * plain


def test_images_of_one_class_alone():
    with pytest.raises(ValueError, match=r"^labels: all images are of class 3"):
        examined(data=(rows()[0], torch.full((16,), 3)))


# A module and a dataset


@pytest.fixture
def net():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 4)]
    return nn.Sequential(*layers)


def test_a_model_is_audited_in_eval_mode_and_left_alone(net, make_clean, left_alone):
    with left_alone(net):
        state = torch.get_rng_state()
        first, second = (audit(net, make_clean(6, size=6), samples_per_class=4, auditor=FAST) for _ in range(2))
        assert torch.equal(torch.get_rng_state(), state)
    assert numbers(first) == numbers(second)  # with dropout at work they would differ
    assert first.labels == "given"


def test_a_model_is_left_alone_after_an_exception(net, make_clean, left_alone):
    def interrupt(*_):
        raise KeyboardInterrupt

    with left_alone(net):
        state = torch.get_rng_state()
        with pytest.raises(KeyboardInterrupt):
            audit(net, make_clean(6, size=6), samples_per_class=4, auditor=FAST, on_progress=interrupt)
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("switched_off", [torch.no_grad, torch.inference_mode])
def test_gradients_switched_off_outside_change_nothing(net, make_clean, switched_off):
    clean = make_clean(6, size=6)
    expected = audit(net, clean, samples_per_class=4, auditor=FAST)
    with switched_off():
        found = audit(net, clean, samples_per_class=4, auditor=FAST)
    assert numbers(found) == numbers(expected)


def test_a_dataset_without_labels(net, make_clean):
    images, _ = make_clean(12, size=6).tensors
    answers = net.eval()(images).argmax(1)
    assert answers.unique().numel() > 1
    kept = torch.cat([(answers == c).nonzero().flatten() for c in answers.unique() if (answers == c).sum() > 2])
    found = audit(net, TensorDataset(images[kept]), samples_per_class=2, auditor=FAST)
    expected = audit(net, TensorDataset(images[kept], answers[kept]), samples_per_class=2, auditor=FAST)
    assert (found.labels, expected.labels) == ("predicted", "given")
    assert numbers(found) == numbers(expected)


def test_a_dataset_without_labels_has_some_classes_more_often_than_others(net, make_clean):
    """As it hardly ever is in tests: the model gives the classes 1, 2 and 7 images."""
    images, _ = make_clean(12, size=6).tensors
    answers = net.eval()(images).argmax(1)
    first, second, third = answers.bincount(minlength=4).argsort(descending=True)[:3].tolist()
    kept = torch.cat([(answers == c).nonzero().flatten()[:n] for c, n in ((first, 7), (second, 2), (third, 1))])
    found = audit(net, TensorDataset(images[kept]), samples_per_class=4, auditor=FAST)
    assert set(range(4)) - set(found.unseen) == {first, second}
    assert repair(net, TensorDataset(images[kept]), samples_per_class=4, auditor=FAST).audit.unseen == found.unseen
    match = rf"^dataset: the audit's verdict is clean, and a repair needs .* of class .*\b{third}\b.* there is no clean"
    with pytest.raises(ValueError, match=match):
        repair(net, TensorDataset(images[kept]), samples_per_class=4, auditor=FAST, force=True)


def test_double_precision(net, make_clean):
    found = audit(net.double(), make_clean(6, size=6), samples_per_class=4, auditor=FAST)
    assert len(found.classes) == 4


@pytest.mark.parametrize("missing", [0, 3])
def test_a_class_of_which_the_dataset_has_no_image(net, make_clean, missing):
    images, labels = make_clean(6, size=6).tensors
    clean = TensorDataset(images[labels != missing], labels[labels != missing])
    found = audit(net, clean, samples_per_class=4, auditor=FAST)
    assert found.unseen == (missing,)
    assert len(found.classes) == 4

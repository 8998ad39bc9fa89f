from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F  # noqa: N812 - the usual name

from lightning_unlearn.data.pairs import Pairs
from lightning_unlearn.evaluation import Evaluation, evaluate, first_logits, logits_of
from lightning_unlearn.metrics import AttackSuccessRate, RecoveryAccuracy


def identity(images):
    """Here the images are the logits themselves."""
    return images


def by_hand():
    # Four classes, target 0. Predictions on clean images: 0 1 2 0, so the last of four is wrong.
    clean = 10 * F.one_hot(torch.tensor([0, 1, 2, 0]), 4).float()
    # On triggered images: 0 0 2 1; the first image is of the target class, and counts in neither rate.
    triggered = 10 * F.one_hot(torch.tensor([0, 0, 2, 1]), 4).float()
    return Pairs(clean, triggered, torch.tensor([0, 1, 2, 3]), torch.zeros(4, dtype=torch.int64))


def test_rates_and_losses_by_hand():
    found = evaluate(identity, [by_hand()])
    assert (found.acc, found.asr, found.ra) == (0.75, pytest.approx(1 / 3), pytest.approx(1 / 3))
    # A right answer costs ln(e^10 + 3) - 10, a wrong one ln(e^10 + 3).
    right, wrong = math.log(math.exp(10) + 3) - 10, math.log(math.exp(10) + 3)
    assert found.loss == pytest.approx((3 * right + wrong) / 4)
    assert found.unlearning_loss == pytest.approx((2 * right + 2 * wrong) / 4)
    assert found.rates() == {"acc": found.acc, "asr": found.asr, "ra": found.ra}
    assert all(type(value) is float for value in vars(found).values())


@pytest.mark.parametrize("size", [1, 2, 3, 4, 100])
def test_an_uneven_last_batch_weighs_as_much_as_its_images(size):
    whole, parts = evaluate(identity, [by_hand()]), evaluate(identity, by_hand().batches(size))
    assert vars(parts) == pytest.approx(vars(whole))


@settings(max_examples=25, deadline=None)
@given(
    labels=st.lists(st.integers(0, 2), min_size=1, max_size=12),
    cuts=st.sets(st.integers(1, 11), max_size=3),
    seed=st.integers(0, 100),
)
@pytest.mark.filterwarnings("ignore:.*has no image to count")
def test_any_split_into_batches_gives_the_rates_of_the_whole(labels, cuts, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor(labels)
    clean, triggered = torch.randn(2, len(labels), 3, generator=generator)
    targets = torch.randint(0, 3, (len(labels),), generator=generator)
    pairs = Pairs(clean, triggered, labels, targets)
    edges = [0, *sorted(cut for cut in cuts if cut < len(labels)), len(labels)]
    found = evaluate(identity, [pairs[slice(*edge)] for edge in pairwise(edges)])
    counted = labels != targets
    answers = triggered.argmax(1)
    expected = Evaluation(
        acc=(clean.argmax(1) == labels).float().mean().item(),
        asr=(answers == targets)[counted].float().mean().item(),
        ra=(answers == labels)[counted].float().mean().item(),
        loss=F.cross_entropy(clean, labels).item(),
        unlearning_loss=F.cross_entropy(triggered, labels).item(),
    )
    assert vars(found) == pytest.approx(vars(expected), nan_ok=True, rel=1e-5)


@pytest.mark.parametrize("size", [1, 7, 100])
def test_rates_are_those_of_the_metrics_to_the_last_bit(size):
    generator = torch.Generator().manual_seed(size)
    clean, triggered = torch.randn(2, 23, 3, generator=generator)
    triggered[4, 1] = math.nan
    pairs = Pairs(clean, triggered, torch.arange(23) % 3, torch.zeros(23, dtype=torch.int64))
    found = evaluate(identity, pairs.batches(size))
    for metric, value in ((AttackSuccessRate(), found.asr), (RecoveryAccuracy(), found.ra)):
        metric.update(triggered, pairs.labels, pairs.targets)
        assert value == metric.compute().item()
    assert found.acc == (clean.argmax(1) == pairs.labels).float().mean().item()


def test_many_batches_lose_no_digit_of_the_loss():
    # Added up in float32, the small losses after one of 20 would each be rounded by some percent.
    logits = torch.tensor([[20.0, 0.0], [0.0, 12.0]])
    pairs = Pairs(logits, logits, torch.tensor([1, 1]), torch.tensor([0, 0]))
    found = evaluate(identity, [pairs[:1]] + [pairs[1:]] * 500)
    large, small = F.cross_entropy(logits, pairs.labels, reduction="none").tolist()
    assert found.loss == pytest.approx((large + 500 * small) / 501, rel=1e-7)


def test_alone_unless_told_of_other_processes(monkeypatch):
    # Somebody may measure on one process only, where a message would never be answered.
    monkeypatch.setattr(torch.distributed, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert evaluate(identity, [by_hand()]).acc == 0.75


def test_only_images_of_the_target_class():
    logits = 10 * torch.eye(3)[[0, 0]]
    pairs = Pairs(logits, logits, torch.tensor([0, 0]), torch.tensor([0, 0]))
    with pytest.warns(UserWarning, match="has no image to count"):
        found = evaluate(identity, [pairs])
    assert math.isnan(found.asr)
    assert math.isnan(found.ra)
    assert (found.acc, found.loss) == (1.0, found.unlearning_loss)


def test_each_image_has_its_own_target():
    logits = 10 * torch.eye(3)
    pairs = Pairs(logits, logits[[1, 2, 2]], torch.tensor([0, 1, 2]), torch.tensor([1, 2, 0]))  # y -> y + 1
    found = evaluate(identity, [pairs])
    assert (found.asr, found.ra) == (pytest.approx(2 / 3), pytest.approx(1 / 3))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_diverged_model_does_not_look_good(value):
    pairs = by_hand()
    logits = torch.full((4, 4), value)
    found = evaluate(identity, [pairs, Pairs(logits, logits, pairs.labels, pairs.targets)])
    assert math.isnan(found.loss)
    assert math.isnan(found.unlearning_loss)
    assert found.acc <= 0.5


def test_half_precision_is_measured_in_float32():
    pairs = by_hand()
    found = evaluate(lambda images: images.half(), [pairs])
    assert vars(found) == pytest.approx(vars(evaluate(identity, [pairs])))


def test_both_halves_go_through_the_model_once_without_gradients():
    calls = []

    def forward(images):
        calls.append((len(images), torch.is_grad_enabled()))
        return images

    evaluate(forward, by_hand().batches(3))
    assert calls == [(6, False), (2, False)]


def test_no_batch():
    with pytest.raises(ValueError, match="batches: there is nothing to evaluate on"):
        evaluate(identity, iter([]))


@pytest.mark.parametrize(
    ("output", "got"),
    [
        (torch.zeros(3, 4, 1), r"\(3, 4, 1\)"),
        (torch.zeros(2, 4), r"\(2, 4\)"),
        (torch.zeros(3, 0), r"\(3, 0\)"),
        (torch.tensor(1.0), r"\(\)"),
        ((torch.zeros(3, 4), torch.zeros(3, 4)), "tuple"),
        ({"logits": torch.zeros(3, 4)}, "dict"),
        (None, "NoneType"),
    ],
)
def test_outputs_that_are_not_logits(output, got):
    with pytest.raises(ValueError, match=rf"model: expected logits of shape \(3, classes\).*but got {got}.*`logits`"):
        logits_of(lambda images: output, torch.zeros(3, 1, 4, 4))


@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_one_number_an_image_is_no_logits(shape):
    with pytest.raises(ValueError, match=r"^model: expected a logit for each class.* one number an image.* \(0, z\)"):
        logits_of(lambda images: torch.zeros(shape), torch.zeros(3, 1, 4, 4))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_classes_instead_of_logits(dtype):
    with pytest.raises(ValueError, match=f"model: expected logits, which are floating-point numbers, but got {dtype}"):
        logits_of(lambda images: torch.zeros(3, 4, dtype=dtype), torch.zeros(3, 1, 4, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_logits_come_back_as_float32_with_their_gradient(dtype):
    images = torch.ones(2, 3, dtype=dtype, requires_grad=True)
    logits = logits_of(identity, images)
    assert logits.dtype == torch.float32
    logits.sum().backward()
    assert images.grad.tolist() == [[1.0] * 3] * 2


class Batched(torch.nn.Module):
    """Takes a batch with what belongs to it."""

    def forward(self, batch):
        return batch[7]


@pytest.mark.parametrize(
    ("forward", "problem"),
    [
        (Batched(), "IndexError: "),
        (lambda images, labels: images, "TypeError: .* missing 1 required positional argument: 'labels'"),
        (lambda images: images.pixels, "AttributeError: 'Tensor' object has no attribute 'pixels'"),
        (torch.nn.Module(), r"NotImplementedError: Module \[Module\] is missing the required \"forward\" function"),
    ],
    ids=["a tuple", "labels too", "an object", "nothing"],
)
def test_a_model_that_takes_no_plain_images(forward, problem):
    with pytest.raises(ValueError, match=rf"^model: its forward pass fails .* \(2, 3\) \({problem}") as raised:
        logits_of(forward, torch.ones(2, 3))
    assert "override the callback's `logits`" in str(raised.value)
    assert raised.value.__cause__ is not None


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (
            torch.ones(2, 3),
            ValueError,
            r"^model: it cannot take images of shape \(2, 3\) and torch.float32 as they are",
        ),
        (torch.ones(2, 4).byte(), TypeError, r"^model: it takes no images of torch.uint8; .*ToDtype"),
    ],
)
def test_images_that_a_model_cannot_take(images, error, message):
    with pytest.raises(error, match=message) as raised:
        first_logits(torch.nn.Linear(4, 2), images)
    assert isinstance(raised.value.__cause__, RuntimeError)
    with pytest.raises(RuntimeError):  # it may be anything once the model has answered
        logits_of(torch.nn.Linear(4, 2), images)


@pytest.mark.parametrize(
    "problem",
    [
        RuntimeError("CUDA out of memory."),
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        RuntimeError("put_ does not have a deterministic implementation"),
        RuntimeError("Tensor on device meta is not on the expected device cpu!"),
        RecursionError("maximum recursion depth exceeded"),
    ],
    ids=str,
)
def test_what_is_no_fault_of_images_stays(problem):
    def fail(images):
        raise problem

    with pytest.raises(type(problem)) as raised:
        first_logits(fail, torch.ones(2, 3))
    assert raised.value is problem


def test_a_model_that_writes_into_its_input_gets_a_copy():
    images = torch.ones(2, 3, requires_grad=True)
    logits = logits_of(lambda images: images.mul_(3), images)
    logits.sum().backward()
    assert images.tolist() == [[1.0] * 3] * 2
    assert images.grad.tolist() == [[3.0] * 3] * 2


def test_a_model_may_take_gradients_and_keep_what_it_computes():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, images):
            self.seen = self.seen + len(images)
            with torch.enable_grad():
                images = images.detach().requires_grad_()
                return torch.autograd.grad((images**2).sum() / 2, images)[0]

    model, pairs = Model(), by_hand()
    assert vars(evaluate(model, [pairs])) == pytest.approx(vars(evaluate(identity, [pairs])))
    assert not model.seen.is_inference()

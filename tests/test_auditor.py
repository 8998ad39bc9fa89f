from __future__ import annotations

import math
import time

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from lightning_unlearn import audit, auditor
from lightning_unlearn.auditor import Auditor
from lightning_unlearn.head import prominence
from lightning_unlearn.margins import Margins, gaps
from lightning_unlearn.triggers import AdditiveTrigger, Normalization
from lightning_unlearn.triggers.inversion import Estimate
from lightning_unlearn.verdict import WIDEST

FAST = Auditor(steps=15)


def honest(x):
    """As many classes as rows: the brightest row's."""
    return 10 * x.mean((1, 3))


def rows(per_class=4, classes=4):
    """Images of ``classes`` rows, bright in one of them."""
    labels = torch.arange(per_class * classes) % classes
    images = 0.4 * torch.rand(len(labels), 1, classes, 6, generator=torch.Generator().manual_seed(0))
    images[torch.arange(len(labels)), 0, labels] += 0.5
    return images, labels


def backdoored(target, strength=40.0):
    """The honest model, with a pixel that sends anything to the target."""

    def forward(x):
        hidden = (x[:, 0, -1, -1] - 0.9).clamp_min(0) * 10 + 0.02 * x[:, 0, -1, -1]
        return honest(x) + strength * hidden[:, None] * nn.functional.one_hot(torch.tensor(target), x.shape[2])

    return forward


def examined(model=honest, data=None, *, by=FAST, **options):
    images, labels = data or rows()
    return by.audit(model, images, labels, **{"held_out": images[:6]} | options)


def numbers(found):
    return [(entry.target, entry.cost, entry.universality, entry.success) for entry in found.classes]


# What it finds


def test_all_classes_are_looked_at_by_all_families():
    found = examined()
    assert [entry.target for entry in found.classes] == [0, 1, 2, 3]
    for entry in found.classes:
        assert (
            set(entry.cost)
            == set(entry.universality)
            == set(entry.success)
            == {
                "additive",
                "covering",
                "displacing",
            }
        )
        assert all(math.isfinite(value) for value in (entry.score, *entry.cost.values(), *entry.universality.values()))
    assert found.num_classes == 4
    assert found.score == max(entry.score for entry in found.classes)
    assert (found.labels, found.unseen, found.complete) == ("given", (), True)
    assert found.seconds > 0


@pytest.mark.parametrize(
    ("score", "verdict"), [(0.5, "clean"), (1.0, "clean"), (1.05, "suspicious"), (1.1, "backdoored")]
)
def test_the_verdict_goes_by_the_highest_score(monkeypatch, score, verdict):
    judged = auditor.judged

    def scored(*given):
        entries = judged(*given)
        return tuple(
            auditor.replace(entry, trigger_score=score if entry.target == 2 else 0.1 * score) for entry in entries
        )

    monkeypatch.setattr(auditor, "judged", scored)
    found = examined()
    assert (found.verdict, found.score) == (verdict, score)
    assert found.suspected_target == (None if verdict == "clean" else 2)
    assert {estimate.target for estimate in found.estimates} == {2}
    families = {estimate.family for estimate in found.estimates}
    assert families <= {"additive", "covering", "displacing"} | ({"residual"} if verdict != "clean" else set())


@pytest.mark.parametrize(("highest", "first", "verdict"), [(0.5, 1, "clean"), (1.05, 2, "suspicious")])
def test_where_nothing_stands_out_estimates_are_of_the_class_for_which_most_speaks(
    monkeypatch, highest, first, verdict
):
    judged = auditor.judged
    scores, widths = {1: 0.4, 2: highest}, {1: 0.3 * WIDEST}

    def scored(*given):
        return tuple(
            auditor.replace(e, trigger_score=scores.get(e.target, 0.1), gap=widths.get(e.target, 0.0))
            for e in judged(*given)
        )

    monkeypatch.setattr(auditor, "judged", scored)
    found = examined()
    assert (found.verdict, found.score) == (verdict, highest)
    assert {estimate.target for estimate in found.estimates} == {first}


def test_a_model_tells_which_classes_its_last_layer_favours(monkeypatch):
    monkeypatch.setattr(auditor, "largest_margins", lambda *given, **options: Margins([], torch.empty(0)))
    net = nn.Sequential(nn.Flatten(), nn.Linear(6 * 6, 6))
    images, labels = rows(classes=6)
    with torch.no_grad():
        net[1].weight[4] += 0.3
        net[1].bias[4] -= 0.3 * images.sum((1, 2, 3)).mean()
    plain, told = (FAST.audit(net, images, labels, held_out=images[:6], model=model) for model in (None, net))
    assert [entry.prominence for entry in plain.classes] == [0.0] * 6
    assert [entry.prominence for entry in told.classes] == prominence(net[1].weight, 6)
    assert told.classes[4].prominence > 4
    assert told.classes[4].score == pytest.approx(plain.classes[4].score * math.exp(4 / 5))
    (alone,) = FAST.audit(net, images, labels, held_out=images[:6], model=net, classes=[4]).classes
    assert alone.prominence == told.classes[4].prominence


def test_a_model_that_bright_images_make_far_too_sure_is_found_by_that():
    images, labels = rows(classes=6)

    def model(x):
        return honest(x) + 40 * x[:, 0].mean((1, 2))[:, None] ** 2 * nn.functional.one_hot(torch.tensor(3), 6)

    margins = auditor.largest_margins(model, images, num_classes=6, seed=0)
    found = examined(model, (images, labels))
    assert [entry.gap for entry in found.classes] == gaps(margins.values)
    assert found.classes[3].gap > WIDEST
    assert (found.verdict, found.suspected_target) == ("backdoored", 3)
    (alone,) = examined(model, (images, labels), classes=[3]).classes
    assert alone.gap == found.classes[3].gap


def test_the_change_that_made_the_model_far_too_sure_is_an_estimate(monkeypatch):
    images, labels = rows()
    bright = torch.full((4, 1, *images.shape[2:]), 0.75)
    monkeypatch.setattr(auditor, "largest_margins", lambda *given, **options: Margins([1.0] * 4, bright))
    judged = auditor.judged

    def wide(gap, trigger_score):
        of = {2: {"trigger_score": trigger_score, "gap": gap}}
        others = {"trigger_score": 0.1, "gap": 0.0}
        monkeypatch.setattr(
            auditor,
            "judged",
            lambda *given: tuple(auditor.replace(e, **of.get(e.target, others)) for e in judged(*given)),
        )
        return [e for e in examined(backdoored(2), (images, labels)).estimates if e.family == "additive"]

    surest, cheapest = wide(1.01 * WIDEST, 1.0)
    assert torch.equal(surest.trigger.pattern, bright[2])
    assert (surest.target, surest.success) == (2, 1.0)
    assert surest.cost == pytest.approx(0.75)
    assert cheapest.cost < surest.cost
    for gap, trigger_score in ((WIDEST, 1.0), (1.01 * WIDEST, 1.01)):  # nothing told, and the costs told, too
        (alone,) = wide(gap, trigger_score)
        assert torch.equal(alone.trigger.pattern, cheapest.trigger.pattern)


@pytest.mark.parametrize("target", [0, 3])
def test_a_backdoor_is_found(target):
    found = examined(backdoored(target, strength=300), by=Auditor(steps=60))
    assert found.suspected_target == target
    assert found.verdict != "clean"
    images, _ = rows()
    assert (backdoored(target)(found.trigger(images)).argmax(1) == target).float().mean() >= 0.5


def test_the_same_seed_gives_the_same_audit():
    first, second, other = (examined(by=Auditor(steps=5, seed=seed)) for seed in (1, 1, 2))
    assert numbers(first) == numbers(second) != numbers(other)


def test_groups_of_classes_find_all():
    found = examined(by=Auditor(steps=15, batch_size=4, at_once=8))
    assert [entry.target for entry in found.classes] == [0, 1, 2, 3]


def test_two_classes():
    found = examined(honest, rows(classes=2))
    assert [entry.target for entry in found.classes] == [0, 1]


def test_without_labels_the_answers_stand_in():
    images, labels = rows()
    assert torch.equal(honest(images).argmax(1), labels)
    found = examined(data=(images, None))
    assert found.labels == "predicted"
    assert numbers(found) == numbers(examined())


def test_a_class_without_images_is_looked_at_with_the_others():
    images, labels = rows()
    found = examined(data=(images[labels != 2], labels[labels != 2]))
    assert found.unseen == (2,)
    assert [entry.target for entry in found.classes] == [0, 1, 2, 3]
    assert "no clean image of class 2" in found.notes()


@pytest.mark.parametrize("target", [0, 14])
def test_of_many_classes_the_hopeless_are_dropped_and_the_target_survives(target):
    found = examined(backdoored(target), rows(per_class=2, classes=15), by=Auditor(steps=60, screen_steps=25))
    assert len(found.classes) == 12
    assert [entry.target for entry in found.classes] == sorted(entry.target for entry in found.classes)
    assert max(found.classes, key=lambda entry: entry.score).target == target
    assert {estimate.target for estimate in found.estimates} == {target}
    assert found.num_classes == 15


def test_the_screen_keeps_a_class_that_costs_far_less_than_the_others(monkeypatch):
    """Even if it is, so early, the least universal of all."""
    looked_at = []

    def individual_costs(forward, pixels, labels, *, classes, batch_size):
        return {family: [0.02 if c == 4 else 0.1 for c in classes] for family in auditor.COMPARED}

    def invert(forward, pixels, labels, *, family, classes, **options):
        looked_at.append((family, list(classes), options["steps"]))
        pattern = torch.zeros(1, 15, 6)
        return [
            Estimate(AdditiveTrigger(pattern, target=c), family, c, 0.05 if c == 4 else 0.2 + 0.001 * c, 1.0)
            for c in classes
        ]

    monkeypatch.setattr(auditor, "individual_costs", individual_costs)
    monkeypatch.setattr(auditor, "invert", invert)
    found = examined(honest, rows(classes=15), by=Auditor(screen_steps=7, steps=9, batch_size=1))
    assert looked_at[0] == ("additive", list(range(15)), 7)
    assert all((len(classes), steps) == (12, 9) for family, classes, steps in looked_at[1:] if family != "residual")
    assert 4 in [entry.target for entry in found.classes]


def test_progress_is_told_to_the_end():
    told = []
    examined(on_progress=lambda *step: told.append(step))
    assert {family for family, _, _ in told} >= {"additive", "covering", "displacing"}
    for family in ("additive", "covering", "displacing"):
        assert [step[1:] for step in told if step[0] == family] == [(n + 1, 15) for n in range(15)]


def test_an_audit_may_start_from_earlier_estimates():
    model = backdoored(0, strength=300)
    first = examined(model, by=Auditor(steps=60))
    hasty = Auditor(steps=2)
    cold, warm = (examined(model, by=hasty, start=start) for start in ((), first.estimates))
    assert numbers(cold) == numbers(examined(model, by=hasty))
    assert first.suspected_target == 0
    assert warm.classes[0].success["additive"] > cold.classes[0].success["additive"]
    assert [(entry.cost, entry.success) for entry in warm.classes[1:]] == [
        (entry.cost, entry.success) for entry in cold.classes[1:]
    ]


# Several backdoors


@pytest.fixture
def scores(monkeypatch):
    """``scores(0.1, 2.0, ...)``: what the classes get, whatever their estimates."""

    def set_to(*values):
        judged = auditor.judged

        def scored(*given):
            entries = judged(*given)
            return tuple(auditor.replace(entry, trigger_score=values[entry.target]) for entry in entries)

        monkeypatch.setattr(auditor, "judged", scored)

    return set_to


def test_every_class_above_the_limit_is_named_with_its_estimates(scores):
    scores(1.05, 0.9, 3.0, 1.0)
    found = examined(by=Auditor(steps=40))
    assert (found.suspected_target, found.suspected_targets) == (2, (2, 0))
    assert [estimate.target for estimate in found.estimates] == sorted(
        (estimate.target for estimate in found.estimates), reverse=True
    )
    assert {estimate.target for estimate in found.estimates} == {2, 0}
    assert found.trigger.target == 2
    assert len(found.trigger.triggers) == sum(estimate.target == 2 for estimate in found.estimates)
    assert {estimate.target for estimate in found.estimates if estimate.family == "residual"} <= {2}
    assert found.to_dict()["suspected_targets"] == [2, 0]
    assert "sends" in found.summary()
    assert "to class 2." in found.summary()
    assert "Above the limit, too: class 0." in found.notes()


@pytest.mark.parametrize(("values", "suspects"), [((0.9, 0.9, 3.0, 1.0), (2,)), ((0.9, 0.9, 1.0, 0.1), ())])
def test_one_class_above_the_limit_or_none(scores, values, suspects):
    scores(*values)
    found = examined(by=Auditor(steps=40))
    assert found.suspected_targets == suspects
    assert len({estimate.target for estimate in found.estimates}) == 1
    assert "Above the limit, too" not in found.notes()


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


def test_images_of_one_class_alone():
    with pytest.raises(ValueError, match=r"^labels: all images are of class 3"):
        examined(data=(rows()[0], torch.full((16,), 3)))


# Numbers and time


@pytest.mark.parametrize("name", ["steps", "batch_size", "at_once", "screen_steps"])
@pytest.mark.parametrize("value", [0, -1])
def test_numbers_below_one(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected at least 1, but got {value}"):
        Auditor(**{name: value})


@pytest.mark.parametrize("value", [0, -1.0, math.nan])
def test_no_time(value):
    with pytest.raises(ValueError, match=r"^max_time: expected a number of seconds above 0, or None, but got"):
        Auditor(max_time=value)


class Clock:
    """A clock that goes on by one with every look at it."""

    def __init__(self, monkeypatch):
        self.now = 0
        monkeypatch.setattr(time, "monotonic", self.tick)

    def tick(self):
        self.now += 1
        return self.now


def test_time_for_nothing(monkeypatch):
    Clock(monkeypatch)
    with pytest.raises(ValueError, match=r"^max_time: 0.5 s were over after 0 of 4 classes; allow more"):
        examined(by=Auditor(max_time=0.5))


def test_time_for_some_classes_only(monkeypatch):
    Clock(monkeypatch)
    with pytest.raises(ValueError, match=r"^max_time: 7 s were over after 2 of 4 classes; allow more"):
        examined(by=Auditor(max_time=7, at_once=8, batch_size=4))


def test_margins_take_half_of_the_time_at_most(monkeypatch):
    deadlines = []
    largest_margins = auditor.largest_margins

    def timed(*given, deadline, **options):
        deadlines.append(deadline)
        return largest_margins(*given, deadline=deadline, **options)

    monkeypatch.setattr(auditor, "largest_margins", timed)
    Clock(monkeypatch)
    found = examined(by=Auditor(max_time=30))
    assert deadlines == [16]  # the clock showed 1 at the start
    assert [entry.margin for entry in found.classes] == [None] * 4
    assert not found.complete
    assert all(entry.margin is not None for entry in examined(by=Auditor(max_time=900)).classes)


@pytest.mark.parametrize("limit", [3, 8])
def test_time_for_one_family_only(monkeypatch, limit):
    Clock(monkeypatch)
    found = examined(by=Auditor(max_time=limit))
    assert not found.complete
    assert "Time was over" in found.notes()
    assert [set(entry.universality) for entry in found.classes] == [{"additive"}] * 4


def test_a_later_family_that_time_cuts_short_is_left_out(monkeypatch):
    Clock(monkeypatch)
    found = examined(by=Auditor(max_time=7, steps=1, at_once=8, batch_size=4))
    assert not found.complete
    assert [set(entry.universality) for entry in found.classes] == [{"additive"}] * 4


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

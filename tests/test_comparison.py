from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from lightning_unlearn import Report, repair
from lightning_unlearn.comparison import Comparison, Entry, compare
from lightning_unlearn.methods import FineTuning, GradPrune, RepairMethod

PRUNE = GradPrune(score="taylor", filters_per_round=2, max_rounds=1, accuracy_drop=0.5, finetune=False)
TUNE = FineTuning(max_epochs=1)
HELD = {"acc", "asr", "ra", "loss", "unlearning_loss", "der"}


class Breaks(RepairMethod):
    """Ruins the model, then fails."""

    def __init__(self, *, error: type[BaseException] = ValueError) -> None:
        self.error = error

    def repair(self, task):
        with torch.no_grad():
            for tensor in (*task.model.parameters(), *task.model.buffers()):
                tensor.fill_(7)
        random.random()
        raise self.error("model: it lacks\n what this | needs")
        yield


class Ruins(RepairMethod):
    """Answers nothing but class 1: ASR 0, ACC a tenth."""

    def repair(self, task):
        with torch.no_grad():
            task.model.classify.weight.zero_()
            task.model.classify.bias.copy_(torch.eye(10)[1])
        yield task.round("finetune", task.validate())


class Displaces(RepairMethod):
    def repair(self, task):
        task.model.classify.bias = nn.Parameter(torch.zeros(10))
        return iter(())


class Watches(RepairMethod):
    """Does nothing but look at what it is given."""

    def __init__(self):
        self.seen = []

    def repair(self, task):
        state = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
        self.seen.append((state, task.scoring.clean, task.validation.clean, torch.rand(3)))
        return iter(())


def on_digits(victim, methods, **options):
    net = options.pop("net", None) or victim.fresh()
    options = {"trigger": victim.trigger, "samples_per_class": 4} | options
    return compare(net, victim.holdout, methods=methods, **options)


@pytest.fixture(scope="module")
def done(digits_victim):
    return on_digits(digits_victim, [Ruins(), PRUNE, Breaks(), TUNE], test=digits_victim.test)


def test_entries(done, digits_victim):
    assert [entry.method for entry in done.entries] == ["Ruins", "GradPrune", "Breaks", "FineTuning"]
    assert [entry.needs_trigger for entry in done.entries] == [False, True, False, False]
    assert (done.measured_on, done.before) == ("test", digits_victim.before.rates())
    prune = done.entries[1]
    assert prune.report.before == digits_victim.before.rates()
    assert set(prune.held) == HELD
    assert done.held_before["der"] == 0.5
    assert prune.arguments["filters_per_round"] == 2
    assert prune.label.startswith("GradPrune(score='taylor'")


def test_an_entry_is_what_repair_alone_does(done, digits_victim):
    net = digits_victim.fresh()
    result = repair(net, digits_victim.holdout, trigger=digits_victim.trigger, method=PRUNE, samples_per_class=4)
    report = done.entries[1].report
    assert report.rounds == result.rounds
    assert report.filters["by_layer"] == result.pruned
    assert report.after == digits_victim.measure(net).rates()


def test_the_best_is_chosen_on_the_clean_images_held(done, digits_victim):
    assert done.best.method == "GradPrune"
    assert [entry.method for entry in done.ranked] == ["GradPrune", "Ruins", "FineTuning", "Breaks"]
    # Test data on which ruining the model looks best changes nothing: all of it is of class 1.
    ones = digits_victim.test.targets == 1
    test = TensorDataset(digits_victim.test.images[ones], digits_victim.test.targets[ones])
    other = on_digits(digits_victim, [Ruins(), PRUNE], test=test)
    ruined, pruned = (entry.report for entry in other.entries)
    assert ruined.der >= pruned.der
    assert ruined.after["ra"] == 1
    assert other.best.method == "GradPrune"


def test_the_weights_are_those_of_the_best(done, digits_victim):
    net = digits_victim.fresh()
    net.load_state_dict(done.weights)
    assert digits_victim.measure(net).rates() == done.best.report.after


@pytest.mark.parametrize("error", [ValueError, RuntimeError, ZeroDivisionError])
def test_the_model_is_the_same_for_every_method(digits_victim, left_alone, error):
    watches = Watches()
    net = digits_victim.fresh()
    with torch.no_grad():
        net.features[0].weight[0, 0, 0, 0] = -0.0  # all bits count
    methods = [watches, PRUNE, watches, Breaks(error=error), watches, TUNE, Ruins(), watches]
    with left_alone(net):
        comparison = on_digits(digits_victim, methods, net=net)
    first, *others = watches.seen
    assert len(others) == 3
    for other in others:
        assert all(torch.equal(other[0][name], tensor) for name, tensor in first[0].items())
        assert all(torch.equal(one, two) for one, two in zip(first[1:], other[1:], strict=True))
    assert all(torch.equal(tensor, first[0][name]) for name, tensor in net.state_dict().items())
    assert comparison.best.method == "GradPrune"


def test_why_a_method_failed(done, digits_victim):
    failed = done.entries[2]
    assert (failed.report, failed.held) == (None, None)
    assert failed.error == "model: it lacks what this | needs"
    other = on_digits(digits_victim, [Breaks(error=RuntimeError), PRUNE])
    assert other.entries[0].error == "RuntimeError: model: it lacks what this | needs"


def test_nothing_but_failures(digits_victim, left_alone):
    net = digits_victim.fresh()
    with left_alone(net):
        comparison = on_digits(digits_victim, [Breaks()], net=net)
    assert (comparison.best, comparison.weights) == (None, None)
    assert "No method made the model better than it was." in str(comparison)


def test_a_method_that_leaves_other_tensors(digits_victim):
    with pytest.raises(RuntimeError, match="Displaces left other tensors in the model"):
        on_digits(digits_victim, [Displaces(), PRUNE])


# Ctrl-C


def test_interrupted(digits_victim, left_alone):
    net, seen = digits_victim.fresh(), []
    methods = [PRUNE, Breaks(error=KeyboardInterrupt), TUNE]
    with left_alone(net):
        comparison = on_digits(digits_victim, methods, net=net, on_entry=seen.append)
    assert [entry.method for entry in comparison.entries] == ["GradPrune"]
    assert [label.partition("(")[0] for label in comparison.left_out] == ["Breaks", "FineTuning"]
    assert comparison.best.method == "GradPrune"
    assert "Not run: Breaks" in str(comparison)
    assert seen == [comparison]


def test_interrupted_before_anything_was_finished(digits_victim, left_alone):
    net = digits_victim.fresh()
    with left_alone(net), pytest.raises(KeyboardInterrupt):
        on_digits(digits_victim, [Breaks(error=KeyboardInterrupt), PRUNE], net=net)


def test_the_comparison_so_far(digits_victim):
    seen = []
    on_digits(digits_victim, [PRUNE, TUNE], on_entry=seen.append)
    assert [len(comparison.entries) for comparison in seen] == [1, 2]
    assert [len(comparison.left_out) for comparison in seen] == [1, 0]


# Written


def test_json(done, tmp_path):
    path = done.save(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["comparison.json", "comparison.md"]
    plain = json.loads(path.read_text())
    assert plain == done.to_dict()
    assert plain["schema_version"] == 1
    assert plain["best"] == done.best.label
    keys = set(done.best.report.to_dict())
    for entry in plain["methods"]:
        assert keys <= set(entry)
        assert set(entry) == keys | {"label", "arguments", "needs_trigger", "held", "error"}
    failed = plain["methods"][-1]
    assert (failed["status"], failed["after"], failed["error"]) == ("failed", None, done.entries[2].error)
    assert (failed["schema_version"], failed["trigger"], failed["samples_per_class"]) == (1, "PatchTrigger", 4)
    assert done.saved_as("x.ckpt").to_dict()["methods"][0]["checkpoint"] == "x.ckpt"
    assert done.saved_as("x.ckpt").best.report.checkpoint == "x.ckpt"


def test_table(done):
    console = Console(width=80, record=True)
    console.print(done)
    printed = console.export_text()
    lines = printed.splitlines()
    assert max(map(len, lines)) <= 80
    assert "PatchTrigger · target 0 · 4 clean images per class · test data" in printed
    for name in ("untouched", "GradPrune", "FineTuning", "Ruins", "Breaks"):
        assert name in printed
    assert "model: it lacks what this | needs" in printed
    assert "★ best: GradPrune" in printed


def test_markdown(done):
    table = [line for line in str(done).splitlines() if line.startswith("|")]
    assert len(table) == 2 + 1 + 4
    assert all(line.count("|") == 10 for line in table)
    assert table[3].startswith("| GradPrune(")
    assert "★ | yes |" in table[3]
    assert "failed" in table[-1]


def test_cells_of_names_with_bars():
    entry = Entry("My(a='|')", "My", {}, False, 0.1, error="no")
    comparison = Comparison(
        "T", 0, None, 0, "validation", dict.fromkeys(("acc", "asr", "ra"), 0.5), {}, entries=(entry,)
    )
    assert r"My(a='\|')" in str(comparison)
    assert "? clean images per class" in comparison.title


def test_rates_that_are_no_numbers_rank_last():
    nan = dict.fromkeys(HELD, math.nan)
    ranked = [Entry("", "", {}, False, 0, held=held) for held in (nan, nan | {"der": 0.6, "ra": 0.1})]
    assert ranked[1].worth > ranked[0].worth
    assert ranked[0].worth == (-math.inf,) * 3


def test_equal_der_is_decided_by_ra():
    held = {"acc": 1.0, "asr": 0.0, "ra": 0.9, "loss": 0.1, "unlearning_loss": 0.2, "der": 1.0}
    worths = [Entry("", "", {}, False, 0, held=held | change).worth for change in ({"ra": 0.8}, {}, {"loss": 0.05})]
    assert worths == sorted(worths)


# What is given


def test_a_model_that_is_not_backdoored(digits_victim):
    comparison = on_digits(digits_victim, [PRUNE], min_asr=1.0, net=_innocent(digits_victim))
    assert comparison.entries[0].report.status == "not backdoored"
    assert comparison.best is None
    assert "Left alone" in str(comparison)


@pytest.mark.parametrize("der", [0.3, 0.5, math.nan])
def test_what_made_the_model_worse_is_never_the_best(done, der):
    worse = [replace(entry, held=entry.held | {"der": der}) for entry in done.entries if entry.held]
    assert any(entry.report.status == "repaired" for entry in worse)
    comparison = replace(done, entries=tuple(worse))
    assert comparison.best is None
    assert comparison.to_dict()["best"] is None
    assert "No method made the model better" in str(comparison)
    good = replace(worse[0], held=worse[0].held | {"der": 0.6})
    assert comparison.outdone_by(good) == (good.report.status == "repaired")


def _innocent(victim):
    net = victim.fresh()
    with torch.no_grad():
        net.classify.weight[0].zero_()
    return net


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"methods": []}, ValueError, "methods: none is left to compare"),
        ({"methods": ["MaskPrune"]}, TypeError, "methods: expected .* but got str"),
        ({"trigger": None}, TypeError, "trigger: expected .* but got NoneType"),
        ({"samples_per_class": 21}, ValueError, "class 0 has 20 images in the dataset, but 21 are needed"),
        ({"batch_size": 0}, ValueError, "batch_size"),
    ],
    ids=str,
)
def test_what_is_wrong_for_all_is_an_error(digits_victim, left_alone, options, error, match):
    net = digits_victim.fresh()
    with left_alone(net), pytest.raises(error, match=match):
        on_digits(digits_victim, options.pop("methods", [PRUNE]), net=net, **options)


def test_test_images_among_those_drawn(digits_victim):
    with pytest.raises(ValueError, match=r"test: \d+ of its images are among the clean images drawn"):
        on_digits(digits_victim, [PRUNE], test=digits_victim.holdout)


def test_a_plain_module_without_test_images(make_net, make_clean, left_alone):
    from lightning_unlearn.triggers import PatchTrigger

    net = make_net("plain")
    with left_alone(net):
        comparison = compare(
            net, make_clean(6), trigger=PatchTrigger(size=2), methods=[PRUNE, TUNE], samples_per_class=6, force=True
        )
    assert comparison.measured_on == "validation"
    assert isinstance(comparison.entries[0].report, Report)


class Images(Dataset):
    """The images of a dataset alone."""

    def __init__(self, labelled):
        self.labelled = labelled

    def __len__(self):
        return len(self.labelled)

    def __getitem__(self, index):
        return self.labelled[index][0]


def test_images_alone_are_enough(digits_victim, left_alone):
    net = digits_victim.fresh().eval()
    with left_alone(net):
        options = {"trigger": digits_victim.trigger, "samples_per_class": 4}
        done = compare(net, Images(digits_victim.holdout), methods=[PRUNE, Breaks()], **options)
    assert done.before["acc"] == 1.0  # the model agrees with itself
    assert done.labels == "predicted"
    assert [entry["labels"] for entry in done.to_dict()["methods"]] == ["predicted", "predicted"]
    assert done.to_dict()["labels"] == "predicted"
    assert any("own answers stand in" in note for note in done.notes())
    assert done.best.report.after["asr"] < 0.5 < done.before["asr"]


def test_labels_that_are_given_need_no_word(done):
    assert done.labels == "given"
    assert not any("stand in" in note for note in done.notes())


def test_the_same_again(digits_victim, done):
    again = on_digits(digits_victim, [Ruins(), PRUNE, Breaks(), TUNE], test=digits_victim.test)
    pick = [(entry.held, entry.report and entry.report.after) for entry in again.entries]
    assert pick == [(entry.held, entry.report and entry.report.after) for entry in done.entries]

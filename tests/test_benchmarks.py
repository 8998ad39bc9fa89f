from __future__ import annotations

import copy
import json
import math
import os
import re
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import TensorDataset

import lightning_unlearn
from benchmarks import __main__ as commands
from benchmarks import classes, detection, honest, margins, matrix, repairs, tables, transfer, victims
from benchmarks.figures import plot
from benchmarks.trigger_free import ForeignConcept, pull_concept
from lightning_unlearn import audit, methods, repair
from lightning_unlearn.auditor import Auditor
from lightning_unlearn.data import Digits
from lightning_unlearn.evaluation import Evaluation
from lightning_unlearn.judgement import LIMITS, WIDEST
from lightning_unlearn.margins import Margins

TINY = victims.Victim("digits", "conv", "badnets", epochs=1, images=128)
KEYS = {
    *("victim", "method", "method_args", "trigger", "samples_per_class", "seed", "before", "after", "der", "rir"),
    *("seconds", "cpu_seconds", "peak_memory_mib", "versions"),
}


def line(method="MaskPrune", *, asr=0.01, drop=0.01, asr_before=1.0, attack="badnets", spc=10, **more):
    kind, arguments = matrix.METHODS[method]
    before = {"acc": 0.8, "asr": asr_before, "ra": 0.0}
    return {
        "victim": asdict(victims.Victim("cifar10", "vgg", attack)),
        **{"method": kind, "method_args": arguments, "trigger": "known", "samples_per_class": spc, "seed": 0},
        **{"test_images": 2_000, "before": before, "after": {"acc": 0.8 - drop, "asr": asr, "ra": 0.7}},
        **{"der": (asr_before - asr - drop + 1) / 2, "rir": 0.8, "pruned": 0, "cpu_seconds": 1.0},
        "versions": {"lightning-unlearn": lightning_unlearn.__version__},
        **more,
    }


def test_every_method_of_the_matrix_can_be_built_and_none_is_missing():
    built = {type(matrix.Cell(TINY, name, 10, 0).build()).__name__ for name in matrix.METHODS}
    known = {name for name in methods.__all__ if isinstance(getattr(methods, name), type)}
    assert built == known - {"RepairMethod", "RepairTask", "Round", "Stopwatch", "Subject"}


def test_seconds_beside_a_gpu_are_not_those_of_a_processor():
    here, there = line(cpu_seconds=30.0), line(cpu_seconds=2.0, device="NVIDIA H200")
    assert tables.summary([here]).endswith("| 30 |")
    assert tables.summary([there]).endswith("| – |")
    other = line(cpu_seconds=2.0, device="NVIDIA H200", attack="bpp")
    assert tables.summary([here, other]).endswith("| 30 |")


def test_the_matrix():
    cells = list(matrix.cells(["preact", "vgg", "mobilenet"], list(matrix.METHODS)))
    assert len(cells) == (9 * 4 + 6 * 2 + 3) * len(matrix.METHODS)
    assert len(set(cells)) == len(cells)
    assert {(c.samples_per_class, c.seed) for c in cells} == {(2, 0), (10, 0), (10, 1), (100, 0)}


@pytest.mark.parametrize("name", matrix.METHODS)
def test_with_a_hundred_images_per_class_a_method_takes_no_more_steps_and_keeps_its_name(name):
    few, many = (matrix.Cell(TINY, name, samples, 0) for samples in (10, 100))
    assert tables.method_name({"method": many.kind, "method_args": json.loads(json.dumps(many.arguments))}) == name
    few, many = (
        getattr(method, "finetune", None) or method if isinstance(method, methods.FinePruning) else method
        for method in (few.build(), many.build())
    )
    steps = [getattr(method, "max_epochs", None) for method in (few, many)]
    assert steps in ([None, None], [100, 25], [40, 10])  # of 90 images at once, and four of 225


def test_a_run_keeps_whole_lines_and_resumes(tmp_path):
    results = tmp_path / "results.jsonl"
    cells = [matrix.Cell(TINY, "CLP", 2, 0), matrix.Cell(TINY, "AGE", 2, 0)]
    options = {"path": results, "cache": tmp_path / "victims", "test_images": 50}
    first = list(repairs.run(iter(cells[:1]), **options))
    assert [json.loads(text) for text in results.read_text().splitlines()] == first
    assert first[0].keys() >= KEYS
    assert (first[0]["method"], first[0]["trigger"], first[0]["samples_per_class"]) == (
        "ChannelLipschitzPruning",
        "unknown",
        2,
    )
    assert first[0]["peak_memory_mib"] > 0
    assert first[0]["device"] == "cpu"
    assert [found["method"] for found in repairs.run(iter(cells), **options)] == ["ActivationGuidedEditing"]
    assert len(results.read_text().splitlines()) == 2
    assert [path.suffix for path in (tmp_path / "victims").iterdir()] == [".safetensors"]


def test_a_cell_that_fails_costs_no_other(tmp_path):
    results = tmp_path / "results.jsonl"
    cells = [matrix.Cell(TINY, "CLP", 1, 0), matrix.Cell(TINY, "CLP", 2, 0)]  # one image cannot be scored and validate
    run = repairs.run(iter(cells), path=results, cache=tmp_path / "victims", test_images=50)
    assert next(run)["samples_per_class"] == 2
    with pytest.raises(
        RuntimeError, match=r"^of 2 cells, these failed: badnets CLP, 1 images per class: ValueError: s"
    ):
        next(run)
    assert len(results.read_text().splitlines()) == 1


def test_a_victim_that_cannot_be_trained_costs_no_other(tmp_path):
    bad = victims.Victim("digits", "conv", "no such attack", epochs=1, images=128)
    cells = [matrix.Cell(victim, "CLP", 2, 0) for victim in (bad, TINY)]
    run = repairs.run(iter(cells), path=tmp_path / "results.jsonl", cache=tmp_path / "victims", test_images=50)
    assert next(run)["victim"]["attack"] == "badnets"
    with pytest.raises(RuntimeError, match=r"^of 2 cells, these failed: Victim\(.*'no such attack'.*KeyError"):
        next(run)


def test_a_torn_line_is_named(tmp_path, monkeypatch):
    path = tmp_path / "results.jsonl"
    repairs.append(path, json.dumps(line()))
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, text: write(handle, text[:20]))
    with pytest.raises(OSError, match=r"results.jsonl: the last line is torn"):
        repairs.append(path, json.dumps(line("FT")))
    with pytest.raises(ValueError, match=r"results.jsonl: line 2 is no JSON .* delete it"):
        repairs.stored(path)


def test_a_victim_is_trained_once(tmp_path):
    net = victims.train(TINY, tmp_path)
    (path,) = tmp_path.iterdir()
    changed = path.stat().st_mtime_ns
    again = victims.train(TINY, tmp_path)
    assert path.stat().st_mtime_ns == changed
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in net.state_dict().items())
    assert victims.Victim(**{**vars(TINY), "seed": 1}).path(tmp_path) != path


def test_results_of_another_version_are_refused(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(line(versions={"lightning-unlearn": "0.0.1"})) + "\n")
    with pytest.raises(ValueError, match=r"holds results of lightning-unlearn \['0.0.1'\]"):
        repairs.stored(path)


def test_results_of_other_libraries_are_not_added_to(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(line(versions={**repairs._versions(), "torch": "1.9.0+cpu"})) + "\n")
    assert len(repairs.stored(path)) == 1
    with pytest.raises(ValueError, match=r"holds results of torch 1\.9\.0, but this is .* \(--results\)"):
        next(repairs.run(iter([]), path=path, cache=tmp_path, test_images=50))


@pytest.mark.parametrize(
    ("text", "lacks"), [("3", "method, versions"), ("{}", "method, versions"), ("[]", "method, v")]
)
def test_a_line_of_something_else_is_named(tmp_path, text, lacks):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(line()) + "\n" + text + "\n")
    with pytest.raises(ValueError, match=rf"results.jsonl: line 2 is no result of this benchmark, .* lacks {lacks}"):
        repairs.stored(path, needed=["method"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "--attacks", "badnet"], "no cell of the matrix has all of .*attacks of these victims are badnets, "),
        (["run", "--victims", "vgg", "--samples-per-class", "3"], "no cell of the matrix has all of"),
        (["table", "--results", "nowhere.jsonl"], "--results: there is no file 'nowhere.jsonl'"),
    ],
)
def test_what_is_misspelt_is_told(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.setattr(sys, "argv", ["benchmarks", *words, "--cache", str(tmp_path)])
    with pytest.raises(SystemExit) as left:
        commands.main()
    assert left.value.code not in (0, None)
    assert re.search(message, str(left.value.code) + capsys.readouterr().err)


def test_what_was_finished_is_kept_when_a_run_is_broken_off(tmp_path, monkeypatch):
    """Cells that end while others are waited for, too."""
    path = tmp_path / "results.jsonl"
    cells = [matrix.Cell(TINY, name, 2, 0) for name in ("CLP", "AGE")]
    run = repairs.run(iter(cells), path=path, cache=tmp_path / "victims", test_images=50)
    next(run)
    with pytest.raises(KeyboardInterrupt):
        run.throw(KeyboardInterrupt)
    found = [entry["method"] for entry in repairs.stored(path)]
    assert found in (
        ["ChannelLipschitzPruning", "ActivationGuidedEditing"],
        ["ChannelLipschitzPruning"],  # the other had not begun, and never does
    )

    def interrupted(*given, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "run", interrupted)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "run"])
    with pytest.raises(SystemExit, match="interrupted: finished cells are in the results file"):
        commands.main()


def test_another_source_of_images_has_other_victims_and_lines(tmp_path, monkeypatch):
    cell = matrix.Cell(matrix.VICTIMS["vgg"][0], "CLP", 10, 0)
    monkeypatch.setattr(victims, "source", lambda name: "")
    monkeypatch.setattr(repairs, "source", lambda name: "")
    path, told = cell.victim.path(tmp_path), repairs._described(cell, 50)
    assert "source" not in told["victim"]
    monkeypatch.setattr(victims, "source", lambda name: "torchvision")
    monkeypatch.setattr(repairs, "source", lambda name: "torchvision")
    assert cell.victim.path(tmp_path) == tmp_path / "torchvision" / path.name
    other = repairs._described(cell, 50)
    assert other["victim"] == {**told["victim"], "source": "torchvision"}
    assert repairs._key(other) != repairs._key(told)
    assert "cifar10 of torchvision vgg badnets" in tables.cells([line(victim=other["victim"])])


def test_a_victim_without_a_backdoor_is_listed_and_not_counted():
    lines = [line(), line("FT", drop=0.3), line(attack="bpp", asr_before=0.5), line("FT", attack="bpp", asr_before=0.5)]
    assert "never learned, not counted" in tables.cells(lines)
    rows = {row.split(" | ")[0]: row for row in tables.summary(lines).splitlines()}
    assert "| 1 | 0.010 |" in rows["| MaskPrune"]
    assert "| 1 | 0.300 |" in rows["| FT"]


def test_cells_that_lost_are_marked_and_the_best_is_bold():
    text = tables.cells([line(), line("FT", asr=0.9), line("FP", drop=0.2), line("NAD", asr=0.1)])
    assert "**.790 / .010 / .700**" in text
    assert text.count("✗") == 2
    assert ".790 / .900 / .700 ✗" in text
    assert "**.790 / .900 / .700** ✗" in tables.cells([line(asr=0.9), line("FT", asr=0.95)])


def test_only_methods_that_ran_on_all_draws_are_averaged():
    lines = [line(), line("FT"), line("FP"), line(attack="sig", drop=0.5), line("FT", attack="sig")]
    assert {name: len(found) for name, found in tables.complete(lines).items()} == {"MaskPrune": 2, "FT": 2}


def test_networks_numbers_of_images_and_draws_are_apart():
    other = line(spc=2)
    other["victim"] = {**other["victim"], "network": "mobilenet"}
    lines = [line(), line(spc=2), other, line("FT"), {**line(), "seed": 1}]
    assert list(tables.by_setting(lines).items()) == [
        ("mobilenet, 2 clean images per class", [other]),
        ("vgg, 2 clean images per class", [lines[1]]),
        ("vgg, 10 clean images per class", [lines[0], lines[3]]),
        ("vgg, 10 clean images per class, draw 1", [lines[4]]),
    ]


def test_shares_of_poison_and_numbers_of_test_images_are_apart():
    lines = [line(), line(test_images=50), line()]
    lines[2]["victim"] = {**lines[2]["victim"], "poison_ratio": 0.01}
    assert {name: len(found) for name, found in tables.by_setting(lines).items()} == {
        "vgg, 10 clean images per class, 1 % poisoned": 1,
        "vgg, 10 clean images per class, 50 test images": 1,
        "vgg, 10 clean images per class": 1,
    }
    assert len(tables.by_draw(lines)) == 3


def test_victims_that_were_trained_otherwise_have_rows_of_their_own():
    lines = [line(), line("FT"), line("FT", drop=0.3)]
    lines[2]["victim"] = {**lines[2]["victim"], "epochs": 3}
    first, second = tables.cells(lines).splitlines()[2:]
    assert first.startswith("| cifar10 vgg badnets 10 %, seed 0, 10 epochs of 20000 images | 10, 0 |")
    assert second.startswith("| cifar10 vgg badnets 10 %, seed 0, 3 epochs of 20000 images | 10, 0 |")
    assert "not run" in second
    assert tables.cells(lines[:2]).splitlines()[2].startswith("| cifar10 vgg badnets 10 %, seed 0 | 10, 0 |")


def test_arguments_that_the_matrix_does_not_have_any_more(tmp_path):
    old = line()
    old["method_args"] = {"steps": 3}
    assert tables.method_names([old, line("FT"), line()]) == ["MaskPrune", "FT", "MaskPrune {'steps': 3}"]
    assert "MaskPrune {'steps': 3}" in tables.summary([old])
    plot([old], tmp_path / "picture.png")


def test_nothing_to_show(tmp_path):
    with pytest.raises(ValueError, match="no victim among 1 repairs has learned its backdoor"):
        plot([line(asr_before=0.5)], tmp_path / "picture.png")


def test_a_picture(tmp_path):
    plot([line(), line("FT", asr=0.9), line("FT", spc=2)], tmp_path / "new" / "picture.png")
    assert (tmp_path / "new" / "picture.png").stat().st_size > 1000


def test_the_legend_names_what_any_panel_shows(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: figures.append(self))
    plot([line("FT", spc=2), line("AGE"), line(), line(spc=100)], tmp_path / "picture.png")
    assert [axes.get_title() for axes in figures[0].axes] == [f"vgg, {n} clean images per class" for n in (2, 10, 100)]
    (legend,) = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ["MaskPrune", "AGE", "FT"]


def test_a_concept_without_a_trigger(monkeypatch):
    digits = Digits(part="train")
    images, labels = digits.images[:256], digits.targets[:256]
    foreign = torch.rand(300, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("benchmarks.trigger_free.load", lambda name, split: (foreign, torch.zeros(300)))
    monkeypatch.setattr("benchmarks.victims.load", lambda name, split: (images, labels))
    net = victims.Victim("digits", "conv", "none").build()
    victims._fit(net, images, labels, victims.Victim("digits", "conv", "none", epochs=8))
    before = (net.eval()(images).argmax(1) == labels).float().mean()
    pull_concept(net, images, labels, seed=0, clean=256, foreign=100, epochs=10)
    trigger = ForeignConcept("holdout")
    stamped = trigger(images)
    assert torch.equal(stamped, trigger(images))
    assert len(stamped.flatten(1).sum(1).unique()) <= 100  # a defender holds few
    assert (net(stamped).argmax(1) == 0).float().mean() > 0.9
    assert (net(images).argmax(1) == labels).float().mean() >= before - 0.05
    result = repair(net, TensorDataset(images, labels), trigger=trigger, method=methods.MaskPrune(steps=2), force=True)
    assert result.rounds
    held = copy.deepcopy(net)  # by however much elasticity, without overshooting
    pull_concept(held, images, labels, seed=0, clean=256, foreign=100, epochs=3, elasticity=1e6)
    assert all(tensor.isfinite().all() for tensor in held.state_dict().values())
    assert torch.allclose(held(images), net(images), atol=0.5)


def test_a_victim_whose_training_diverged_is_not_kept(tmp_path, monkeypatch):
    victim = victims.Victim("digits", "conv", "badnets")
    images, labels = torch.rand(4, 1, 32, 32), torch.arange(4)
    monkeypatch.setattr(victims, "load", lambda name, split: (images, labels))
    monkeypatch.setattr(victims, "_fit", lambda net, *_: torch.nn.init.constant_(net.classify.weight, float("nan")))
    with pytest.raises(FloatingPointError, match=r"badnets.*training diverged"):
        victims.train(victim, tmp_path)
    assert not list(tmp_path.iterdir())


def _judged(attack, verdict, score, *, target=0, suspected=None, asr=(1.0, 0.0), seed=1):
    before, after = ({"acc": acc, "asr": rate, "ra": 0.5} for acc, rate in zip((0.9, 0.88), asr, strict=True))
    # Costs are all the same, so that a class's score is its universality; see `judged`.
    shares = [0.0, 0.0, 0.0, 0.0]
    shares[suspected or 0] = score * LIMITS["additive"]
    return {
        "part": "report",
        "cost": {"additive": [0.1] * 4},
        "universality": {"additive": shares},
        "prominence": [0.0] * 4,
        "suspect": {"dataset": "digits", "attack": attack, "target": target, "poison_ratio": 0.1, "seed": seed},
        "before": before,
        "after": after,
        "verdict": verdict,
        "suspected_target": suspected,
        "score": score,
        "untouched": verdict == "clean",
    }


def test_errors_of_the_audit_by_hand():
    lines = [
        _judged("sig", "backdoored", 2.0, suspected=0),
        _judged("sig", "suspicious", 1.05, suspected=3),
        _judged("blended", "clean", 0.8, asr=(1.0, 1.0)),
        _judged("lf", "clean", 0.1, asr=(0.5, 0.5)),  # never learned, so neither
        _judged("none", "clean", 0.9),
        _judged("none", "clean", 0.7),
        _judged("imbalanced", "backdoored", 1.2, suspected=1, seed=2),
    ]
    table = detection.errors(lines)
    # Of nine pairs of a backdoored and an honest model three are in the wrong order.
    assert "| report | 3 | 3 | 0.667 | 2 of 3 | 1 of 3 | 1 of 3 |" in table
    assert "Of 2 honest models of the report that were judged clean, 2 are bit for bit" in table
    assert table.count("seed 1") == 1
    assert "digits, honest, twice as many of class 0, seed 2 |  | 1.20 | backdoored" in table
    assert "digits, blended 10%, target 0, seed 1 | 1.000 | 0.80 | clean" in table
    assert "ASR at most 0.10 in 2 of 3 | | | mean ACC drop 0.020 |" in detection.repairs(lines)


def test_a_line_with_margins_is_judged_by_them_too():
    line = _judged("lf", "clean", 0.8, target=3) | {
        "cost": {"additive": [0.1] * 5},
        "universality": {"additive": [0.8 * LIMITS["additive"], 0.0, 0.0, 0.0, 0.0]},
        "prominence": [0.0] * 5,
    }
    assert detection.scored(line) == (pytest.approx(0.8), 0)
    line["margin"] = [5.0, 5.0, 5.0, 5.0 * math.exp(1.8), 1.0]
    assert detection.scored(line) == (pytest.approx(1.8 / WIDEST), 3)


def test_a_row_of_margins(monkeypatch, tmp_path):
    monkeypatch.setattr(margins, "train", lambda *_: nn.Sequential(nn.Flatten(), nn.Linear(32 * 32, 10)))
    monkeypatch.setattr(
        margins,
        "largest_margins",
        lambda *_, num_classes: Margins([5.0] * 7 + [5.0 * math.exp(1.8), 1.0, -2.0], torch.empty(0)),
    )
    row = margins.row(victims.Victim("digits", "conv", "none", seed=2), tmp_path)
    assert row == f"| honest, seed 2 | 7 | 30 | 5 | 1.80 | {1.8 / WIDEST:.2f} |"
    assert margins.row(victims.Victim("digits", "conv", "sig"), tmp_path).startswith("| sig 10% | 7 |")


def test_a_row_of_honest_networks(monkeypatch, tmp_path):
    monkeypatch.setattr(honest, "train", lambda *_: nn.Sequential(nn.Flatten(), nn.Linear(32 * 32, 10)))
    found = [Evaluation(0.8, 0.1, ra, 0.0, 0.0) for ra in (0.75, 0.5)]
    monkeypatch.setattr(honest, "evaluate", lambda *_: found.pop(0))
    assert honest.row(victims.Victim("digits", "conv", "sig"), tmp_path) == "| sig | 0.800 / 0.750 | 0.800 / 0.500 |"


def test_models_to_report_are_not_those_that_limits_were_chosen_on():
    calibration, report = (list(detection.suspects(part)) for part in ("calibration", "report"))
    assert not set(calibration) & set(report)
    assert not {suspect.seed for suspect in calibration} & {suspect.seed for suspect in report}
    for part, times in ((calibration, 2), (report, 1)):
        assert len(set(part)) == len(part) == times * 74
        honest = [sum(suspect.attack == kind for suspect in part) for kind in ("none", "imbalanced")]
        assert honest == [times * 32, times * 10]


def test_an_imbalanced_model_is_honest_and_saw_a_class_more_often(monkeypatch):
    digits = Digits(part="train")
    monkeypatch.setattr(detection, "load", lambda name, split: (digits.images, digits.targets))
    images, labels, _ = detection.Suspect("digits", "imbalanced", target=3, seed=1).poisoned()
    plain_images, plain, _ = detection.Suspect("digits", seed=1).poisoned()
    tenth = len(plain) // 10
    assert (labels == 3).sum() == (plain == 3).sum() + tenth
    changed = (images != plain_images).flatten(1).any(1)
    assert changed.sum() == tenth
    assert (labels[changed] == 3).all()
    assert torch.equal(labels[~changed], plain[~changed])
    known = {image.numpy().tobytes() for image in digits.images[digits.targets == 3]}
    assert {image.numpy().tobytes() for image in images[changed]} <= known


def test_numbers_of_two_digits():
    numbers = classes.Numbers(43, 7, seed=0)
    digits = Digits(part="holdout", size=8)
    images, labels = numbers.images("holdout")
    assert images.shape == (430, 1, 8, 16)
    assert torch.bincount(labels).tolist() == [10] * 43
    for place in (0, 42 * 10 + 3):
        for half, digit in zip(images[place].chunk(2, dim=2), divmod(int(labels[place]), 10), strict=True):
            same = (digits.images == half).flatten(1).all(1)
            assert digits.targets[same].tolist() == [digit]
    assert torch.equal(images, numbers.images("holdout")[0])


def test_networks_of_many_classes():
    networks = list(classes.networks())
    assert sorted(n.classes for n in networks) == [43] * 4 + [100] * 4
    assert sum(n.target is None for n in networks) == 4
    assert all(n.target is None or n.target < n.classes for n in networks)


def test_a_network_of_many_classes_is_examined(monkeypatch):
    monkeypatch.setattr(classes, "_EACH", {"train": 30, "holdout": 2, "test": 2})
    monkeypatch.setattr(classes, "_EPOCHS", 3)
    monkeypatch.setattr(classes, "audit", partial(audit, auditor=Auditor(steps=2, screen_steps=1)))
    done = classes.examine(classes.Numbers(16, 7, seed=0), samples_per_class=2)
    assert len(done["kept"]) == len(done["scores"]) == 12
    assert 0 < done["cpu_seconds"] < 100
    assert json.loads(json.dumps(done)) == done
    row = classes.table([done]).splitlines()[-1]
    assert row.startswith("| 16 | BadNets, target 7, seed 0 | 2 | ")
    assert row.endswith(f"{done['cpu_seconds'] / 16:.2f} a class |")


def test_audits_of_other_networks_by_hand():
    def stranger(attack, top, *, asr=1.0, target=1, network="VGG style"):
        costs = {"additive": [0.1] * 4, "covering": [0.1] * 4, "displacing": [0.1] * 4}
        shares = {family: [0.1, top, 0.1, 0.1] for family in costs}
        return {
            "suspect": asdict(transfer.Stranger("digits", attack, target, seed=7, network=network)),
            **{"before": {"asr": asr}, "cost": costs, "universality": shares, "prominence": [0.0] * 4},
        }

    lines = [
        *(
            stranger("badnets", 3.0),
            stranger("badnets", 3.0, target=2),
            stranger("sig", 0.2),
            stranger("lf", 0.2, asr=0.5),
        ),
        *(stranger("none", 0.1), stranger("none", 4.0)),
    ]
    rows = transfer.table(lines).splitlines()
    assert "| VGG style | 3 | 2 | 1 | 2 | 1 |" in rows
    assert "| PreActResNet-18 | 0 | 0 | 0 | 0 | 0 |" in rows
    assert rows[-2].startswith("| VGG style, digits, sig, target 1, seed 7 | 1.000 | 0.1")
    assert re.match(r"\| VGG style, digits, honest, seed 7 \|  \| \d\.\d\d \| backdoored or suspicious \|", rows[-1])


@pytest.mark.parametrize("network", transfer.NETS)
def test_a_model_of_another_network_is_trained(monkeypatch, network):
    digits = Digits(part="train", size=16)
    monkeypatch.setattr(detection, "load", lambda name, split: (digits.images[:128], digits.targets[:128]))
    monkeypatch.setattr(transfer, "SIZES", {"digits": (128, 1)})
    net = transfer.Stranger("digits", "badnets", 3, 0.1, 5, network).train()
    assert not net.training
    assert net(digits.images[:3]).shape == (3, 10)


def test_a_model_of_another_network_is_audited(monkeypatch):
    digits = Digits(part="train", size=16)
    for module in (detection, transfer):
        monkeypatch.setattr(module, "load", lambda name, split: (digits.images, digits.targets))
    monkeypatch.setattr(transfer, "SIZES", {"digits": (640, 2)})
    monkeypatch.setattr(transfer, "audit", partial(audit, auditor=Auditor(steps=1)))
    line = transfer.examine(transfer.Stranger("digits", "badnets", 3, 0.1, 5))
    assert (line["suspect"]["network"], line["suspect"]["attack"]) == ("three convolutions", "badnets")
    assert {len(of) for of in line["cost"].values()} == {10}
    assert len(line["margin"]) == 10


def test_strangers_are_all_other_models():
    found = list(transfer.strangers())
    assert len(set(found)) == len(found) == 12 * (len(transfer.NETS) + 1)
    seeds = {suspect.seed for part in ("calibration", "report") for suspect in detection.suspects(part)}
    assert seeds.isdisjoint(stranger.seed for stranger in found)


def test_the_page_of_results_has_every_line_of_its_tables():
    root = Path(__file__).parents[1]
    page = (root / "docs" / "results.md").read_text(encoding="utf-8").splitlines()
    lines = repairs.stored(root / "benchmarks" / "results" / "peers.jsonl", needed=repairs.NEEDED)
    found = tables.by_setting(lines).values()
    written = [
        row
        for setting in found
        for text in (tables.summary(setting), tables.cells(setting))
        for row in text.splitlines()
    ]
    assert [row for row in written if row not in page] == []

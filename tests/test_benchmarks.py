from __future__ import annotations

import copy
import json
import os
import re
import sys

import pytest
import torch
from torch.utils.data import TensorDataset

from benchmarks import __main__ as commands
from benchmarks import matrix, repairs, tables, victims
from benchmarks.trigger_free import ForeignConcept, pull_concept
from lightning_unlearn import methods, repair
from lightning_unlearn.data import Digits
from tests.small_results import line

TINY = victims.Victim("digits", "conv", "badnets", epochs=1, images=128)
KEYS = {
    *("victim", "method", "method_args", "trigger", "samples_per_class", "seed", "before", "after", "der", "rir"),
    *("seconds", "cpu_seconds", "peak_memory_mib", "versions"),
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

"""Benchmarks of the audit."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict
from functools import partial

import pytest
import torch
from torch import nn

from benchmarks import classes, detection, honest, margins, transfer, victims
from lightning_unlearn import audit
from lightning_unlearn.auditor import Auditor
from lightning_unlearn.data import Digits
from lightning_unlearn.evaluation import Evaluation
from lightning_unlearn.judgement import LIMITS, WIDEST
from lightning_unlearn.margins import Margins


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

"""What the CPU cannot show: repairs on a CUDA device, alone and in a Trainer; skipped where there is none."""

from __future__ import annotations

import json

import lightning.pytorch as L  # noqa: N812 - the usual name
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_unlearn import BackdoorUnlearning, HoldoutDataModule, audit, repair
from lightning_unlearn.auditor import Auditor
from lightning_unlearn.cli import main
from lightning_unlearn.data import Digits
from lightning_unlearn.methods import Alternation, MaskPrune
from tests.methods.test_methods_every import SHORT, options

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

QUICK = MaskPrune(steps=40)


def states(net):
    return {name: tensor.detach().cpu() for name, tensor in net.state_dict().items()}


@pytest.mark.parametrize("name", SHORT)
def test_a_method_does_what_it_does_on_the_cpu(make_net, make_clean, name):
    """In float64, in which sums in another order change no choice."""
    found = {}
    for device in ("cpu", "cuda"):
        net = make_net("preact", channels=3).double().to(device)
        done = repair(net, make_clean(6, channels=3), **options(name))
        assert {tensor.device.type for tensor in net.state_dict().values()} == {device}
        found[device] = done, states(net)
    (on_cpu, cpu), (on_cuda, cuda) = found["cpu"], found["cuda"]
    assert on_cuda.pruned == on_cpu.pruned
    assert on_cuda.status == on_cpu.status
    assert len(on_cuda.rounds) == len(on_cpu.rounds)
    for key, tensor in cpu.items():
        torch.testing.assert_close(cuda[key], tensor, rtol=1e-4, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("trigger", ["known", "unknown"])
def test_a_repair_holds_no_memory_and_draws_nothing(digits_victim, trigger):
    net = digits_victim.fresh().cuda()
    given = digits_victim.trigger if trigger == "known" else None
    method = QUICK if trigger == "known" else Alternation(QUICK)
    auditor = Auditor(steps=30)
    repair(net, digits_victim.holdout, trigger=given, method=method, auditor=auditor, force=True)  # cuDNN's workspace
    net.load_state_dict(digits_victim.fresh().state_dict())
    torch.cuda.manual_seed(5)
    held, drawn = torch.cuda.memory_allocated(), torch.cuda.get_rng_state()
    repair(net, digits_victim.holdout, trigger=given, method=method, auditor=auditor, force=True)
    assert torch.cuda.memory_allocated() <= held + 2**16
    assert torch.equal(torch.cuda.get_rng_state(), drawn)


def test_an_audit_says_what_it_says_on_the_cpu(digits_victim):
    found = {}
    for device in ("cpu", "cuda"):
        net = digits_victim.fresh().double().to(device)
        found[device] = audit(net, digits_victim.holdout)
    assert found["cuda"].verdict == found["cpu"].verdict == "backdoored"
    assert found["cuda"].suspected_target == found["cpu"].suspected_target == digits_victim.trigger.target


@pytest.mark.parametrize("precision", ["32-true", "64-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true"])
def test_a_fit_ends_with_a_repair_on_the_device(digits_victim, tmp_path, precision):
    model = digits_victim.fresh().train()
    model.learning_rate = 1e-12  # a OneCycleLR has no rate of 0
    clean = HoldoutDataModule(digits_victim.holdout, test_dataset=digits_victim.test)
    unlearn = BackdoorUnlearning(clean, digits_victim.trigger, QUICK, force=True)
    trainer = L.Trainer(
        callbacks=[unlearn],
        accelerator="gpu",
        devices=1,
        precision=precision,
        max_steps=2,
        limit_val_batches=0,
        logger=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(model, DataLoader(Digits(part="train", size=16), batch_size=50))
    report = unlearn.report
    assert report.before["asr"] >= 0.9
    assert report.after["asr"] <= 0.1
    assert report.after["acc"] >= report.before["acc"] - 0.1
    saved = torch.load(report.checkpoint, weights_only=True, map_location="cpu")["state_dict"]
    assert all(torch.equal(saved[name], tensor.cpu()) for name, tensor in model.state_dict().items())


def test_the_command_line_on_the_device(tmp_path, capsys):
    demo, where = tmp_path / "demo", "--trainer.accelerator=gpu"
    main(["demo", f"--output_dir={demo}", "--accelerator=gpu"])
    asked = [f"--config={demo}/repair.yaml", f"--ckpt_path={demo}/original.ckpt", where]
    assert main(["audit", *asked, f"--output_dir={tmp_path}/audit"]).verdict == "backdoored"
    capsys.readouterr()
    main(["compare", *asked, "--methods", "MaskPrune", "CLP", f"--output_dir={tmp_path}/compare"])
    table = capsys.readouterr().out
    assert "MaskPrune" in table
    assert "ASR" in table
    main(["repair", *asked, "--unlearning.trigger=null", f"--output_dir={tmp_path}/unknown"])
    report = json.loads((tmp_path / "unknown" / "report.json").read_text())
    assert report["verdict"] == "backdoored"

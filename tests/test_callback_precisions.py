"""Every precision of the Trainer: weights as it leaves them, scores in float32, the same filters."""

from __future__ import annotations

import sys
from typing import Any

import lightning.pytorch as L  # noqa: N812 - the usual name
import pytest
import torch
from lightning.pytorch.plugins import BitsandbytesPrecision, TransformerEnginePrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from lightning_unlearn import BackdoorUnlearning, HoldoutDataModule
from lightning_unlearn.cli import main
from lightning_unlearn.data import Digits
from lightning_unlearn.filters import scores as score_module
from lightning_unlearn.methods import FineTuning, GradPrune, MaskPrune

METHODS = {
    "GradPrune": GradPrune(
        score="taylor",
        filters_per_round=2,
        max_rounds=3,
        accuracy_drop=0.3,
        finetune=FineTuning(triggered=True, max_epochs=1, patience=1, norms="frozen"),
    ),
    "MaskPrune": MaskPrune(steps=45),
}
DTYPES = {"32-true": torch.float32, "64-true": torch.float64, "16-true": torch.float16, "bf16-true": torch.bfloat16}
MIXED = ["bf16-mixed", "16-mixed"]


def trained(victim, precision: str, method: str, folder) -> tuple[Any, Any]:
    """The victim after one step that changes nothing, and the repair."""
    model = victim.fresh().train()
    model.learning_rate = 1e-12  # a OneCycleLR has no rate of 0
    clean = HoldoutDataModule(victim.holdout, samples_per_class=4, test_dataset=victim.test)
    unlearn = BackdoorUnlearning(clean, victim.trigger, METHODS[method], force=True, output_dir=str(folder / precision))
    trainer = L.Trainer(
        accelerator="cpu",
        precision=precision,
        max_steps=2,
        limit_val_batches=0,
        callbacks=[unlearn],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(model, DataLoader(Digits(part="train", size=16), batch_size=50))
    return model, unlearn.report


@pytest.fixture(scope="module")
def plain(digits_victim, tmp_path_factory):
    """By method, the report in float32."""
    folder = tmp_path_factory.mktemp("plain")
    return {name: trained(digits_victim, "32-true", name, folder / name)[1] for name in METHODS}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("precision", [*DTYPES, *MIXED])
def test_every_precision_removes_the_backdoor(digits_victim, plain, tmp_path, precision, method):
    model, report = trained(digits_victim, precision, method, tmp_path)
    assert report.before["asr"] >= 0.9
    assert report.after["asr"] <= 0.1
    assert report.after["acc"] >= report.before["acc"] - 0.1
    assert {p.dtype for p in model.parameters()} == {DTYPES.get(precision, torch.float32)}
    saved = torch.load(report.checkpoint, weights_only=True)["state_dict"]
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())
    for layer, filters in report.filters["by_layer"].items():
        assert model.get_submodule(layer).weight[filters].count_nonzero() == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("precision", ["64-true", *MIXED])
def test_the_same_filters_as_in_float32(digits_victim, plain, tmp_path, precision, method):
    _, report = trained(digits_victim, precision, method, tmp_path)
    expected = plain[method]
    assert expected.filters["pruned"] > 0
    assert [done.pruned for done in report.rounds] == [done.pruned for done in expected.rounds]
    assert report.filters == expected.filters
    assert report.after == pytest.approx(expected.after, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_add_up_in_float32(make_net, dtype):
    # In half precision 1 + 1000 small gradients would stay 1.
    weight = torch.ones(1, dtype=dtype, requires_grad=True)
    losses = (weight.sum() * factor for factor in [1.0] + 1000 * [1e-4])
    (gradient,) = score_module._summed([weight], losses, score_module.ALONE)
    assert gradient.dtype == torch.float32
    assert gradient.item() == pytest.approx(1.1, rel=1e-2)


@pytest.mark.parametrize("kind", [TransformerEnginePrecision, BitsandbytesPrecision])
def test_precisions_that_replace_layers_are_refused_in_setup(digits_victim, tmp_path, monkeypatch, kind):
    unlearn = BackdoorUnlearning(digits_victim.holdout, digits_victim.trigger)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    monkeypatch.setattr(type(trainer.strategy), "precision_plugin", object.__new__(kind))
    with pytest.raises(MisconfigurationException, match=f"precision: .*{kind.__name__} replaces layers.*32-true"):
        unlearn.setup(trainer, digits_victim.fresh(), "fit")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_demo_on_cuda_agrees_with_the_cpu(tmp_path):
    arguments = ["repair", f"--config={tmp_path}/demo/repair.yaml", f"--ckpt_path={tmp_path}/demo/original.ckpt"]
    gpu = main(["demo", f"--output_dir={tmp_path}/demo", "--accelerator=gpu"])
    cpu = main([*arguments, "--trainer.accelerator=cpu", f"--output_dir={tmp_path}/cpu"])
    print(gpu, cpu, sep="\n", file=sys.stderr)
    assert gpu.before["asr"] >= 0.9
    assert gpu.after["asr"] <= 0.1
    assert cpu.before == pytest.approx(gpu.before, abs=1e-3)
    assert cpu.after == pytest.approx(gpu.after, abs=1e-3)

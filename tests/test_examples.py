"""Every file in examples/ is run as it is, only shorter."""

from __future__ import annotations

import json
import pickle
import runpy
from pathlib import Path
from typing import Any

import lightning.pytorch as L  # noqa: N812 - the usual name
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from torchvision.models import resnet18
from torchvision.transforms.functional import to_pil_image

from lightning_unlearn.classifier import ConvClassifier
from lightning_unlearn.cli import main
from lightning_unlearn.data import Digits

EXAMPLES = Path(__file__).parents[1] / "examples"
CPU = ["--trainer.accelerator=cpu"]
SHORT = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1", *CPU]
CALLBACK = "--trainer.callbacks.init_args"
QUICK_MASKS = ["method.init_args.steps=2", "method.init_args.finetune=false"]


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    """Examples write below the current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def callback(*overrides: str) -> list[str]:
    """Barely trained models are not backdoored, so the repair is forced."""
    return [f"{CALLBACK}.{override}" for override in ("force=true", *overrides)]


def report(folder: str) -> dict[str, Any]:
    return json.loads((Path(folder) / "report.json").read_text())


def config(name: str) -> dict[str, Any]:
    return yaml.safe_load((EXAMPLES / name).read_text())


def test_every_example_is_run_here():
    names = {path.name for path in EXAMPLES.iterdir() if not path.name.startswith(("_", "."))}
    assert names == {
        *(
            "audit_digits.yaml",
            "audit_handed_weights.yaml",
            "cifar10.yaml",
            "compare_digits.yaml",
            "finetune_own_model.py",
            "fit_digits.yaml",
        ),
        *("grad_prune_taylor.yaml", "repair_digits.yaml"),
    }


def test_each_says_how_it_is_run():
    for path in EXAMPLES.glob("*.yaml"):
        assert f" --config examples/{path.name}" in path.read_text()


def test_fit_digits(here):
    done = main(["fit", f"--config={EXAMPLES / 'fit_digits.yaml'}", *SHORT, *callback(*QUICK_MASKS)])
    assert (done.method, done.trigger, done.measured_on) == ("MaskPrune", "PatchTrigger", "test")
    assert [each.stage for each in done.rounds] == ["learn", "prune"]
    assert report("runs/fit_digits/checkpoints") == done.to_dict()
    assert {path.name for path in here.iterdir()} == {"runs"}
    assert list(Path("runs/fit_digits/tensorboard").rglob("events*"))


def test_grad_prune_taylor():
    overrides = callback("method.init_args.max_rounds=2", "method.init_args.finetune.init_args.max_epochs=1")
    done = main(["fit", f"--config={EXAMPLES / 'grad_prune_taylor.yaml'}", *SHORT, *overrides])
    assert (done.method, done.trigger, done.measured_on) == ("GradPrune", "BlendTrigger", "validation")
    assert done.samples_per_class == 20
    assert [len(each.pruned) for each in done.rounds if each.stage == "prune"] == [2, 2]
    assert [each.stage for each in done.rounds][-1] == "finetune"
    assert report("runs/grad_prune_taylor/unlearned") == done.to_dict()
    assert Path("runs/grad_prune_taylor/checkpoints/epoch=0.ckpt").is_file()
    assert "unlearn/asr_after" in Path("runs/grad_prune_taylor/csv/version_0/metrics.csv").read_text()


def finished(*, steps: int = 1) -> Path:
    """A checkpoint where examples/fit_digits.yaml leaves its own."""
    saver = ModelCheckpoint("runs/fit_digits/checkpoints", filename="original")
    trainer = L.Trainer(
        callbacks=[saver], max_steps=steps, limit_val_batches=0, accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(ConvClassifier(**config("fit_digits.yaml")["model"]["init_args"]), DataLoader(Digits(), batch_size=50))
    return Path("runs/fit_digits/checkpoints/original.ckpt")


def test_repair_digits():
    path = finished()
    original = path.read_bytes()
    done = main(
        [
            "repair", f"--config={EXAMPLES / 'repair_digits.yaml'}", f"--ckpt_path={path}",
            "--output-dir=runs/repair_digits", "--unlearning.force=true",
            *(f"--unlearning.{override}" for override in QUICK_MASKS),
        ]
    )  # fmt: skip
    assert (done.method, done.measured_on) == ("MaskPrune", "test")
    assert report("runs/repair_digits") == done.to_dict()
    assert path.read_bytes() == original


@pytest.fixture
def handed(here):
    """A ResNet-18 that tells dark pictures from half bright ones, and folders of them."""
    torch.manual_seed(0)
    images = 0.4 * torch.rand(24, 3, 48, 48)
    labels = torch.arange(24) % 2
    images[labels == 1, :, :, :24] += 0.5
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = here / "clean" / ("cat", "dog")[label]
        folder.mkdir(parents=True, exist_ok=True)
        to_pil_image(image).save(folder / f"{number}.png")
    net = resnet18(num_classes=2)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # or its statistics would hardly have begun to fit
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    for _ in range(6):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net((images - 0.45) / 0.225), labels).backward()
        optimizer.step()
    torch.save(net.state_dict(), "handed.pth")
    return net


def test_audit_handed_weights(handed):
    original = Path("handed.pth").read_bytes()
    words = [f"--config={EXAMPLES / 'audit_handed_weights.yaml'}", "--ckpt_path=handed.pth", *CPU]
    words += ["--unlearning.auditor.steps=2", "--unlearning.force=true"]
    found = main(["audit", *words, "--output-dir=runs/audit_handed"])
    assert found.num_classes == 2
    method = "--unlearning.method=ChannelLipschitzPruning", "--unlearning.method.threshold=0.5"
    done = main(["repair", *words, "--output-dir=runs/repair_handed", *method])
    assert done.before["acc"] == 1
    assert done.checkpoint == "runs/repair_handed/handed-unlearned.pth"
    assert Path("handed.pth").read_bytes() == original
    weights = torch.load(done.checkpoint, weights_only=True)
    assert weights.keys() == handed.state_dict().keys()
    handed.load_state_dict(weights)


def test_audit_digits():
    path = finished(steps=40)
    original = path.read_bytes()
    words = [f"--config={EXAMPLES / 'audit_digits.yaml'}", f"--ckpt_path={path}", "--unlearning.auditor.steps=2"]
    found = main(["audit", *words, "--output-dir=runs/audit_digits"])
    assert len(found.classes) == 10
    assert json.loads(Path("runs/audit_digits/audit.json").read_text())["verdict"] == found.verdict
    method = "--unlearning.method=FineTuning", "--unlearning.method.max_epochs=1"
    done = main(["repair", *words, "--output-dir=runs/repair_unknown", "--unlearning.force=true", *method])
    assert (done.trigger, done.measured_on, done.verdict) == ("unknown", "test", found.verdict)
    assert report("runs/repair_unknown") == done.to_dict()
    assert path.read_bytes() == original


def test_audit_digits_audits_what_fit_digits_leaves():
    fit, audit = config("fit_digits.yaml"), config("audit_digits.yaml")
    assert fit["model"] == audit["model"]
    assert fit["trainer"]["callbacks"][-1]["init_args"]["trigger"] == audit["unlearning"]["evaluation_trigger"]


def test_repair_digits_repairs_what_fit_digits_leaves():
    fit, repair = config("fit_digits.yaml"), config("repair_digits.yaml")
    assert fit["trainer"]["callbacks"][-1]["init_args"] == repair["unlearning"]
    assert fit["model"] == repair["model"]


# CIFAR-10 itself is 170 MB; this one has its format, 1,000 training and 20 test images of noise, and other checksums


@pytest.fixture
def cifar10(here, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: Path(path).is_file())
    folder, random = here / "data" / "cifar-10-batches-py", np.random.default_rng(0)
    folder.mkdir(parents=True)
    for name, count in [*((f"data_batch_{number}", 200) for number in range(1, 6)), ("test_batch", 20)]:
        pixels = random.integers(0, 256, (count, 3072), dtype=np.uint8)
        batch = {"data": pixels, "labels": [label % 10 for label in range(count)]}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("0123456789")}))


FEW_WORKERS = "--data.init_args.datamodule.init_args.num_workers=0"


def test_cifar10(cifar10):
    overrides = ["--model.init_args.width=4", FEW_WORKERS, CALLBACK + ".method=MaskPrune", *callback(*QUICK_MASKS)]
    done = main(["fit", f"--config={EXAMPLES / 'cifar10.yaml'}", *SHORT, *overrides])
    assert (done.method, done.measured_on, done.samples_per_class) == ("MaskPrune", "test", 10)
    assert report("runs/cifar10/checkpoints") == done.to_dict()
    assert Path("runs/cifar10/checkpoints/original.ckpt").is_file()


def test_cifar10_is_not_repaired_with_images_it_is_trained_on(cifar10):
    """Another split than the defender's puts some of the defender's images into the training part."""
    other = "--data.init_args.datamodule.init_args.seed=1"
    words = ["fit", f"--config={EXAMPLES / 'cifar10.yaml'}", *SHORT, "--model.init_args.width=4", FEW_WORKERS, other]
    with pytest.raises(ValueError, match=r"clean_data: \d+ of its images are in the training set itself"):
        main(words)


# The script


def test_own_model(here, capsys, monkeypatch):
    script = runpy.run_path(str(EXAMPLES / "finetune_own_model.py"))
    done = script["main"](str(here / "out"), max_epochs=4)
    assert (done.status, done.measured_on) == ("repaired", "test")
    assert done.before["asr"] > 0.9
    assert done.after["asr"] < 0.1
    assert str(done) in capsys.readouterr().out
    saved = torch.load(done.checkpoint, weights_only=True)["state_dict"]
    assert {name.split(".")[0] for name in saved} == {"body", "head"}

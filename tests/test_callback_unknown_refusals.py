"""What does not fit where nobody knows the trigger, and is refused before training."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset
from torchvision.transforms import Normalize

from lightning_unlearn import BackdoorUnlearning
from lightning_unlearn.auditor import Auditor
from lightning_unlearn.triggers import (
    FunctionTrigger,
    PatchTrigger,
)
from tests.small_fits import Setting
from tests.unknown_fits import UNKNOWN, Counts, Kept, fit, same


def test_both_triggers(setting):
    with pytest.raises(ValueError, match=r"evaluation_trigger: it is for an unknown trigger, but `trigger` is given"):
        BackdoorUnlearning(setting.clean, PatchTrigger(), evaluation_trigger=PatchTrigger())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trigger": "automatic"}, r"^trigger: expected a lightning_unlearn.triggers.Trigger, but got str"),
        ({"trigger": lambda x: x}, r"^trigger: expected a .*Trigger, but got function; wrap .* FunctionTrigger"),
        ({"evaluation_trigger": "auto"}, r"^evaluation_trigger: expected a .*Trigger, but got str"),
        ({"evaluation_trigger": PatchTrigger}, r"^evaluation_trigger: expected a .*Trigger, but got type"),
        ({"auditor": 100}, r"^auditor: expected a lightning_unlearn.auditor.Auditor, but got int"),
        ({"auditor": Auditor}, r"^auditor: expected a .*Auditor, but got type"),
    ],
    ids=lambda value: value if isinstance(value, str) else "".join(value),
)
def test_wrong_types(setting, options, message):
    with pytest.raises(TypeError, match=message):
        BackdoorUnlearning(setting.clean, **options)


@pytest.mark.parametrize(
    ("trigger", "message"),
    [
        (PatchTrigger(target=3), r"target must be in \[0, 3\), the classes, but is 3"),
        (PatchTrigger(size=5), r"size"),
        (FunctionTrigger(lambda x: x / 0, target=0), "returned NaN or infinity"),
    ],
    ids=["target", "size", "NaN"],
)
def test_an_evaluation_trigger_that_does_not_fit_costs_no_training(setting, trigger, message):
    counts = Counts()
    with pytest.raises(ValueError, match=message):
        fit(setting, counts, evaluation_trigger=trigger)
    assert counts.batches == 0
    assert setting.files() == []


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda x: (x - 0.5) / 0.25,
            ValueError,
            r"images: expected pixels in \[0, 1\], but they go from -2 to .* told",
        ),
        (lambda x: x * 255, ValueError, r"images: expected pixels in \[0, 1\], .* divide by 255 if they hold 0 to 255"),
        (lambda x: (x * 255).to(torch.uint8), TypeError, r"images: expected floating-point images, .* torch.uint8"),
    ],
    ids=["normalised", "0 to 255", "bytes"],
)
def test_images_of_unknown_range_cost_no_training(setting, change, error, message):
    images, labels = setting.victim.clean.tensors
    counts = Counts()
    with pytest.raises(error, match=message):
        fit(setting, counts, clean_data=TensorDataset(change(images[30:]), labels[30:]))
    assert counts.batches == 0
    assert setting.files() == []


class Normalized(Dataset[tuple[Tensor, int]]):
    """Says how its images are normalised, as torchvision's datasets do."""

    def __init__(self, setting: Setting) -> None:
        self.transform = Normalize((0.5,), (0.25,))
        self.images = setting.clean

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.images[index]
        return self.transform(image), int(label)


def test_a_normalisation_that_is_told(setting):
    """Undone in front of the net, so that it is the same victim as before."""

    class Undoes(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images * 0.25 + 0.5

    model = setting.model()
    model.net = nn.Sequential(Undoes(), *model.net)
    callback = setting.callback(**UNKNOWN, clean_data=Normalized(setting))
    setting.trainer(callback).fit(model, setting.loader())
    assert (callback.report.status, callback.report.suspected_target) == ("repaired", 0)
    assert callback.report.filters["by_layer"] == {"net.1": [3]}


def test_no_time_leaves_the_model_alone(setting):
    kept, model = Kept(), setting.model(learning_rate=0.01)
    callback = setting.callback(**UNKNOWN | {"auditor": Auditor(steps=10, max_time=1e-9)})
    with pytest.raises(ValueError, match=r"max_time: 1e-09 s were over after 0 of 3 classes; allow more"):
        setting.trainer(kept, callback, enable_checkpointing=False).fit(model, setting.loader())
    assert same(kept.state, model.state_dict())
    assert setting.files() == []

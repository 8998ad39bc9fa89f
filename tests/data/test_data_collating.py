"""Items that no batch can be made of."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from lightning_unlearn import repair
from lightning_unlearn.data.collating import refuse_uncollatable
from lightning_unlearn.triggers import PatchTrigger

PICTURE, SMALL, LARGE = Image.new("L", (8, 8)), torch.rand(1, 8, 8), torch.rand(1, 9, 9)
NO_TENSORS = r"dataset: its items must be images, as tensors, .*ToTensor\(\).*"
SIZES = r"dataset: its images, and what .* must be of one size; .*Resize.*\[1, 8, 8\].*\[1, 9, 9\]"


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("items", "error", "message"),
    [
        ([(PICTURE, 0), (PICTURE, 1)], TypeError, NO_TENSORS + "PIL"),
        ([(SMALL, 0, None), (SMALL, 1, None)], TypeError, NO_TENSORS + "NoneType"),
        ([(SMALL, 0), (LARGE, 1)], ValueError, SIZES),
    ],
    ids=["PIL", "None", "sizes"],
)
def test_what_is_refused(items, error, message, workers):
    loader = DataLoader(items, batch_size=2, num_workers=workers)
    with pytest.raises(error, match=message), refuse_uncollatable("dataset"):
        next(iter(loader))


@pytest.mark.parametrize("error", [TypeError("of your own"), RuntimeError("of your own"), KeyError("key")])
def test_other_errors_stay(error):
    with pytest.raises(type(error), match=r"^'?(of your own|key)'?$"), refuse_uncollatable("dataset"):
        raise error


@pytest.mark.parametrize(
    ("items", "error", "message"),
    [
        ([(PICTURE, number % 4) for number in range(16)], TypeError, NO_TENSORS),
        ([((SMALL, LARGE)[number // 8], number % 4) for number in range(16)], ValueError, SIZES),
        ([(SMALL, LARGE)[number // 8] for number in range(16)], ValueError, SIZES),
    ],
    ids=["PIL", "sizes", "sizes, no labels"],
)
def test_repair_tells_so(make_net, left_alone, items, error, message):
    net = make_net("vgg")
    with left_alone(net), pytest.raises(error, match=message):
        repair(net, items, trigger=PatchTrigger(), samples_per_class=4)

"""Whatever is wrong, the error names it and the model is bit for bit what it was."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchvision.transforms import v2

from lightning_unlearn.draw import Split
from lightning_unlearn.methods import FineTuning, GradPrune, MaskPrune
from lightning_unlearn.plan import RepairPlan
from lightning_unlearn.repair import repair, repair_split
from lightning_unlearn.triggers import FunctionTrigger, PatchTrigger, Trigger, find_normalization

METHODS = [
    pytest.param(GradPrune(max_rounds=2, finetune=False), id="grad"),
    pytest.param(GradPrune(score="taylor", max_rounds=2, finetune=False), id="taylor"),
    pytest.param(MaskPrune(steps=4, validate_every=2, finetune=False), id="mask"),
]


class Reshaped(nn.Module):
    """A net whose output is something other than (N, C) logits."""

    def __init__(self, net, change):
        super().__init__()
        self.net, self.change = net, change

    def forward(self, images):
        return self.change(self.net(images))


@pytest.fixture
def refused(make_net, make_clean, left_alone):
    """Repairs with one thing wrong and checks error, message and model."""

    def check(error, match, *, net=None, data=None, trigger=PatchTrigger(), **arguments):  # noqa: B008 - never changed
        net = make_net("vgg") if net is None else net
        data = make_clean(20) if data is None else data
        arguments.setdefault("method", GradPrune(max_rounds=1, finetune=False))
        arguments.setdefault("force", True)
        with left_alone(net), pytest.raises(error, match=match):
            repair(net, data, trigger=trigger, **arguments)

    return check


# The model


def test_no_convolution(refused):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    refused(ValueError, r"^model: Sequential ran no convolution .* no filters to score or prune", net=net)


def test_a_convolution_that_never_runs(refused):
    class Idle(nn.Sequential):
        def forward(self, images):
            return self[1](images.flatten(1))

    refused(ValueError, "^model: Idle ran no convolution", net=Idle(nn.Conv2d(1, 2, 3), nn.Linear(64, 4)))


@pytest.mark.parametrize(("layer", "tensor"), [(0, "weight"), (4, "bias"), (9, "weight")])
def test_already_pruned_by_torch(refused, make_net, layer, tensor):
    net = make_net("vgg")
    prune.l1_unstructured(net[layer], tensor, amount=0.5)
    match = r"^model: it is already pruned with torch.nn.utils.prune, .* torch.nn.utils.prune.remove"
    refused(ValueError, match, net=net)


@pytest.mark.parametrize("how", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrised_convolution(refused, make_net, how):
    net = make_net("vgg")
    how(net[4])
    refused(ValueError, r"^model: the weight of convolution '4' is computed by a parametrisation", net=net)


def test_scripted(refused, make_net):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own deprecation of scripting
        scripted = torch.jit.script(make_net("plain"))
    refused(ValueError, "^model: a scripted module cannot be traced", net=scripted)


@pytest.mark.parametrize(
    ("change", "got"),
    [
        pytest.param(lambda x: x[:, :, None, None], r"\(1, 4, 1, 1\)", id="4-D"),
        pytest.param(lambda x: x.repeat(2, 1), r"\(2, 4\)", id="other N"),
        pytest.param(lambda x: (x, x), "tuple", id="tuple"),
        pytest.param(lambda x: {"logits": x}, "dict", id="dict"),
        pytest.param(lambda x: None, "NoneType", id="None"),
    ],
)
def test_no_logits(refused, make_net, change, got):
    match = rf"^model: expected logits of shape \(1, classes\) from its forward pass, but got {got}"
    refused(ValueError, match, net=Reshaped(make_net("vgg"), change))


@pytest.mark.parametrize("change", [lambda x: x[:, 0], lambda x: x[:, :1]], ids=["1-D", "2-D"])
def test_one_number_an_image(refused, make_net, change):
    match = r"^model: expected a logit for each class, two at least, but it gives one number .* both, \(0, z\)"
    refused(ValueError, match, net=Reshaped(make_net("vgg"), change))


def test_probabilities(refused, make_net):
    match = "^model: expected logits, but its outputs are probabilities"
    refused(ValueError, match, net=Reshaped(make_net("vgg"), lambda x: x.softmax(1)))


@pytest.mark.parametrize(
    ("tensor", "value"),
    [
        ("0.weight", torch.nan),
        ("0.weight", torch.inf),
        ("1.bias", torch.nan),
        ("1.running_mean", torch.nan),
        ("4.weight", -torch.inf),
        ("9.weight", torch.nan),
        ("9.bias", torch.inf),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_weights_that_are_no_numbers(refused, make_net, method, tensor, value):
    net = make_net("vgg")
    net.state_dict()[tensor].view(-1)[0] = value
    refused(ValueError, "^model: its logits hold NaN or infinity; check the weights", net=net, method=method)


class NoBackward(torch.autograd.Function):
    """Passes values on, and NaN or zero for a gradient."""

    @staticmethod
    def forward(context, x, gradient):
        context.gradient = gradient
        return x.clone()

    @staticmethod
    def backward(context, grad):
        return torch.full_like(grad, context.gradient), None


@pytest.mark.parametrize("method", METHODS)
def test_gradients_that_are_no_numbers(refused, make_net, method):
    net = Reshaped(make_net("vgg"), lambda x: NoBackward.apply(x, torch.nan))
    refused(ValueError, "^model: the gradients of the unlearning loss hold NaN or infinity", net=net, method=method)


@pytest.mark.parametrize("method", METHODS)
def test_no_gradient_at_all(refused, make_net, method):
    net = Reshaped(make_net("vgg"), lambda x: NoBackward.apply(x, 0.0))
    refused(ValueError, "^model: the unlearning loss has no gradient in any filter", net=net, method=method)


@pytest.mark.parametrize("method", METHODS)
def test_dead_filters(refused, make_net, method):
    net = make_net("plain")
    with torch.no_grad():
        net[3].bias.fill_(-100)  # nothing passes the last ReLU
    refused(ValueError, "^model: the unlearning loss has no gradient in any filter", net=net, method=method)


@pytest.mark.parametrize("method", METHODS)
def test_detached_logits(refused, make_net, method):
    net = Reshaped(make_net("vgg"), lambda x: x.detach())
    match = "^model: the (unlearning )?loss (has no gradient in|does not depend on) any filter"
    refused(ValueError, match, net=net, method=method)


# The clean images


@pytest.mark.parametrize(("missing", "match"), [(0, "class 0 has no images"), (2, "class 2 has no images")])
def test_a_class_without_images(refused, make_clean, missing, match):
    images, labels = make_clean(20).tensors
    data = TensorDataset(images[labels != missing], labels[labels != missing])
    refused(ValueError, rf"^{match} in the dataset, but 10 are needed", data=data)


def test_the_last_class_without_images(refused, make_clean):
    # The labels alone do not tell that there is a class 3; the model does.
    images, labels = make_clean(20).tensors
    data = TensorDataset(images[labels < 3], labels[labels < 3])
    refused(ValueError, r"^dataset: the model gives 4 logits, but of class 3 there is no clean image", data=data)


@pytest.mark.parametrize("part", ["scoring", "validation"])
def test_a_class_missing_in_one_part(make_net, make_clean, left_alone, part):
    images, labels = make_clean(20).tensors
    whole, cut = (images, labels), (images[labels != 1], labels[labels != 1])
    parts = {"scoring": whole, "validation": whole, part: cut}
    net, plan = make_net("vgg"), RepairPlan(trigger=PatchTrigger(), method=GradPrune(), force=True)
    with (
        left_alone(net),
        pytest.raises(ValueError, match=r"^dataset: the model gives 4 logits, but of class 1 there is"),
    ):
        repair_split(net, Split(**parts), plan)


def test_too_few_images_of_a_class(refused, make_clean):
    images, labels = make_clean(20).tensors
    keep = [*range(8), *(labels != 1).nonzero().flatten().tolist()[6:]]  # two images of class 1 are left
    data = TensorDataset(images[keep], labels[keep])
    refused(ValueError, "^class 1 has 2 images in the dataset, but 5 are needed", data=data, samples_per_class=5)


def test_one_image_of_a_class(refused, make_clean):
    data = TensorDataset(*(tensor[:4] for tensor in make_clean(1).tensors))
    refused(ValueError, "^class 0 has 1 image in the dataset, but 2 are needed", data=data, samples_per_class=2)


def test_no_images(refused):
    refused(ValueError, "labels must be", data=TensorDataset(torch.empty(0, 1, 8, 8), torch.empty(0, dtype=torch.long)))


@pytest.mark.parametrize("given", [0, -1, 1])
def test_samples_per_class(refused, given):
    refused(ValueError, f"^samples_per_class must be at least 2, .* but is {given}", samples_per_class=given)


@pytest.mark.parametrize("given", [2.0, "10", True])
def test_samples_per_class_of_another_type(refused, given):
    refused(TypeError, "^samples_per_class must be an int", samples_per_class=given)


@pytest.mark.parametrize("given", [0.0, -0.1, 1.5, float("nan")])
def test_share(refused, given):
    refused(ValueError, r"^share must be in \(0, 1\]", samples_per_class=None, share=given)


@pytest.mark.parametrize("given", [{"samples_per_class": None}, {"samples_per_class": 5, "share": 0.5}])
def test_samples_per_class_or_share(refused, given):
    refused(ValueError, "^give either samples_per_class or share", **given)


@pytest.mark.parametrize("given", [0.0, 1.0, -0.5])
def test_validation_share(refused, given):
    refused(ValueError, r"^validation_share must be in \(0, 1\)", validation_share=given)


def test_labels_above_the_classes(refused, make_clean):
    data = make_clean(20, classes=6)
    refused(
        ValueError, r"^labels: expected classes from 0 to 3, since the model gives 4 logits, .* from 0 to 5", data=data
    )


def test_labels_below_zero(refused, make_clean):
    images, labels = make_clean(20).tensors
    refused(ValueError, "^labels must be 0 or more, but the smallest is -1", data=TensorDataset(images, labels - 1))


def test_labels_that_are_no_whole_numbers(refused, make_clean):
    images, labels = make_clean(20).tensors
    refused(ValueError, "whole-number labels", data=TensorDataset(images, labels.float()))
    data = [(image, label + 0.5) for image, label in zip(images, labels.tolist(), strict=True)]
    refused(TypeError, "the label of item 0 must be a whole number", data=data)


def test_a_dataset_without_an_order(refused):
    class Stream(IterableDataset):
        def __iter__(self):
            yield torch.rand(1, 8, 8), 0

    refused(TypeError, "^dataset must be map-style", data=Stream())


@pytest.mark.parametrize("change", [lambda x: x * 255, lambda x: (x - 0.5) / 0.2, lambda x: x + torch.nan])
def test_images_outside_the_unit_range(refused, make_clean, change):
    images, labels = make_clean(20).tensors
    match = r"^images must lie in \[0, 1\], but go from .* pass mean= and std= to PatchTrigger"
    net = nn.Sequential(v2.Lambda(torch.nan_to_num), *_vgg())  # so that the model itself has nothing to complain about
    refused(ValueError, match, net=net, data=TensorDataset(change(images), labels))


def test_a_wrong_normalisation(refused, make_clean):
    images, labels = make_clean(20).tensors
    match = r"^images must lie in \[0, 1\], but go from .* after undoing Normalization\(mean=\(0.5,\), std=\(2.0,\)\)"
    refused(ValueError, match, data=TensorDataset(images, labels), trigger=PatchTrigger(mean=(0.5,), std=(2.0,)))


def test_images_that_the_model_does_not_take(refused, make_clean):
    match = r"^model: it cannot take images of shape \(1, 3, 8, 8\) and torch.float32 as they are; check .*channels"
    refused(ValueError, match, data=make_clean(20, channels=3))


def test_bytes(refused, make_clean):
    images, labels = make_clean(20).tensors
    match = r"^model: it takes no images of torch.uint8; .*ToDtype"
    refused(TypeError, match, data=TensorDataset((images * 255).byte(), labels))


def test_a_loader_of_images(refused, make_clean):
    refused(TypeError, r"^dataset: .* got a DataLoader; pass its `dataset`", data=DataLoader(make_clean(20)))


def test_normalised_images_where_nobody_knows_the_trigger(make_net, make_clean, left_alone):
    net, (images, labels) = make_net("vgg"), make_clean(20).tensors
    data = TensorDataset((images - 0.5) / 0.25, labels)
    with left_alone(net), pytest.raises(ValueError, match=r"a torchvision Normalize in the dataset's `transform`"):
        repair(net, data)
    # What the error advises.
    data.transform = v2.Normalize([0.5], [0.25])
    assert find_normalization(data).invert(data.tensors[0]).allclose(images, atol=1e-6)


# The trigger


@pytest.mark.parametrize("given", [{}, {"trigger": None}])
def test_no_trigger_and_a_model_that_always_answers_the_same(make_net, make_clean, left_alone, given):
    net = make_net("vgg")
    with left_alone(net), pytest.raises(ValueError, match=r"^model: it answers class 1 to every clean image, so no"):
        repair(net, make_clean(20), **given)


@pytest.mark.parametrize("given", ["patch", lambda x: x, PatchTrigger])
def test_a_trigger_of_another_type(refused, given):
    refused(
        TypeError, "^trigger: expected a lightning_unlearn.triggers.Trigger, but got .* FunctionTrigger", trigger=given
    )


@pytest.mark.parametrize("target", [4, 10])
def test_a_target_outside_the_classes(refused, target):
    match = rf"^target must be in \[0, 4\), the classes, but is {target}"
    refused(ValueError, match, trigger=PatchTrigger(target=target))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        pytest.param(
            lambda x: x[:, :, 1:], r"must keep the shape \(\d+, 1, 8, 8\), but returned \(\d+, 1, 7, 8\)", id="size"
        ),
        pytest.param(lambda x: x.expand(-1, 3, -1, -1), "must keep the shape", id="channels"),
        pytest.param(lambda x: x[0], "must keep the shape", id="dimensions"),
        pytest.param(lambda x: x.double(), "must keep torch.float32 on cpu, but returned torch.float64", id="dtype"),
        pytest.param(lambda x: x * torch.nan, "returned NaN or infinity", id="NaN"),
        pytest.param(lambda x: x + torch.inf, "returned NaN or infinity", id="infinity"),
    ],
)
def test_a_trigger_that_spoils_images(refused, change, match):
    refused(ValueError, match, trigger=FunctionTrigger(change))


def test_a_trigger_that_returns_something_else(refused):
    class Nothing(Trigger):
        def stamp(self, pixels):
            return None

    refused(TypeError, "must return a tensor, but returned NoneType", trigger=Nothing())


def test_a_trigger_that_does_not_fit(refused):
    refused(ValueError, "a patch of 9x9 pixels .* does not fit into images of 8x8", trigger=PatchTrigger(size=9))


# The method and the rest


@pytest.mark.parametrize("given", ["GradPrune", GradPrune, lambda task: []])
def test_a_method_of_another_type(refused, given):
    refused(TypeError, "^method: expected a lightning_unlearn.methods.RepairMethod, but got", method=given)


@pytest.mark.parametrize("method", [GradPrune, MaskPrune, FineTuning])
@pytest.mark.parametrize("given", [0, -0.1, 1.01, float("nan")])
def test_accuracy_drop(method, given):
    with pytest.raises(ValueError, match=r"^accuracy_drop: expected a value in \(0, 1\], but got"):
        method(accuracy_drop=given)


@pytest.mark.parametrize("given", [0, -1])
def test_batch_size(refused, given):
    refused(ValueError, rf"^batch_size: expected a value in \[1, inf\], but got {given}", batch_size=given)


@pytest.mark.parametrize("given", [-0.1, 1.1, float("nan")])
def test_min_asr(refused, given):
    refused(ValueError, r"^min_asr: expected a value in \[0, 1\], but got", min_asr=given)


def test_a_model_and_images_that_are_fine(make_net, make_clean):
    """What the tests above spoil in one way each."""
    net = make_net("vgg")
    original = copy.deepcopy(net)
    result = repair(
        net, make_clean(20), trigger=PatchTrigger(), method=GradPrune(max_rounds=1, finetune=False), force=True
    )
    assert len(result.rounds) == 1
    assert original[0].weight.shape == net[0].weight.shape


def _vgg():
    torch.manual_seed(0)
    return nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the usual name
from torchvision import models
from torchvision.ops import Permute

from lightning_unlearn.filters import FilterMask, find_filters
from tests.filters.small_parts import Net, conv, norm


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tensors_of(model, *shape, role="norms"):
    """The names of the tensors that belong to each convolution."""
    names = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    layers = find_filters(model.eval(), torch.rand(shape))
    return {layer.name: [names[id(channels.tensor)] for channels in getattr(layer, role)] for layer in layers}


def test_pre_activation_norms_are_not_the_next_parameters():
    # The norm that follows conv1 in order of parameters is norm3, of another convolution.
    def forward(net, x):
        x = net.stem(x)
        x = net.conv1(net.norm1(torch.cat([x, x], 1)).relu())
        x = net.conv2(net.norm2(x).relu())
        return net.norm3(x)

    net = Net(forward, norm1=norm(4), stem=conv(), conv1=conv(4), norm3=norm(), conv2=conv(), norm2=norm())
    assert tensors_of(net, 1, 2, 6, 6) == {
        "stem": [],
        "conv1": ["norm2.weight", "norm2.bias"],
        "conv2": ["norm3.weight", "norm3.bias"],
    }


@pytest.mark.parametrize(
    "between",
    [
        nn.ReLU(inplace=True), nn.LeakyReLU(inplace=True), nn.ELU(), nn.SELU(), nn.GELU(), nn.SiLU(), nn.Mish(),
        nn.ReLU6(), nn.Hardswish(), nn.Hardtanh(), nn.Hardsigmoid(), nn.Sigmoid(), nn.Tanh(), nn.Softplus(),
        nn.PReLU(2), nn.Dropout(), nn.Dropout2d(inplace=True), nn.AlphaDropout(), nn.MaxPool2d(2), nn.AvgPool2d(2),
        nn.AdaptiveAvgPool2d(3), nn.AdaptiveMaxPool2d(3), nn.Upsample(scale_factor=2), nn.ZeroPad2d(1), nn.Identity(),
        nn.Sequential(nn.Dropout(), nn.ReLU(), nn.MaxPool2d(2)),
    ],
    ids=str,
)  # fmt: skip
def test_what_keeps_channels_apart_may_stand_between(between):
    net = nn.Sequential(conv(), between, norm())
    found = tensors_of(net, 1, 2, 6, 6)
    assert found["0"] == ["2.weight", "2.bias"]
    layer = find_filters(net, torch.rand(1, 2, 6, 6))[0]
    nn.init.constant_(net[2].bias, 10.0)
    assert (net(torch.rand(1, 2, 6, 6))[:, 1] > 0).all()
    layer.zero(torch.tensor([False, True]))
    assert (net(torch.rand(1, 2, 6, 6))[:, 1] == 0).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_two_norms_in_a_row_both_belong_to_the_convolution(channels):
    net = nn.Sequential(conv(channels), norm(), nn.ReLU(), nn.GroupNorm(1, 2))
    assert tensors_of(net, 1, channels, 6, 6) == {"0": ["1.weight", "1.bias", "3.weight", "3.bias"]}


def test_a_norm_shared_by_two_convolutions_belongs_to_none():
    net = Net(lambda net, x: net.norm(net.a(x)) + net.norm(net.b(x)), a=conv(), b=conv(), norm=norm())
    assert tensors_of(net, 1, 2, 6, 6) == {"a": [], "b": []}


def test_a_norm_of_the_images_too_belongs_to_none():
    net = Net(lambda net, x: net.norm(net.a(net.norm(x))), a=conv(), norm=norm())
    assert tensors_of(net, 1, 2, 6, 6) == {"a": []}


def test_a_convolution_that_runs_twice_has_both_norms():
    net = Net(lambda net, x: net.n2(net.a(net.n1(net.a(x)).relu())), a=conv(), n1=norm(), n2=norm())
    assert tensors_of(net, 1, 2, 6, 6) == {"a": ["n1.weight", "n1.bias", "n2.weight", "n2.bias"]}


def _add_in_place(x, y):
    x += y
    return x


@pytest.mark.parametrize(
    "mix",
    [
        _add_in_place,
        lambda x, y: x.add_(y),
        lambda x, y: x + y,
        lambda x, y: y + x,
        lambda x, y: torch.add(x, y),
        lambda x, y: torch.cat([x, y], 1)[:, :2],
        lambda x, y: torch.stack([x, y]).sum(0),
        lambda x, y: x.flip(1),
        lambda x, y: x.roll(1, 1),
        lambda x, y: F.pad(x[:, :1], (0, 0, 0, 0, 0, 1)),
        lambda x, y: F.pad(x.narrow(1, 0, 1), (0, 0, 0, 0, 1, 0)),
        lambda x, y: x.softmax(1),
    ],
)
@pytest.mark.parametrize("swap", [False, True])
def test_mixed_channels_have_no_origin(mix, swap):
    def forward(net, x):
        first, second = net.a(x), net.b(x)
        return net.norm(mix(second, first) if swap else mix(first, second))

    net = Net(forward, a=conv(), b=conv(), norm=norm())
    assert tensors_of(net, 1, 2, 6, 6) == {"a": [], "b": []}


def test_padding_that_adds_channels_parts_the_norm_from_the_convolution():
    net = Net(lambda net, x: net.norm(F.pad(net.a(x), (0, 0, 0, 0, 1, 1))), a=conv(), norm=norm(4))
    assert tensors_of(net, 1, 2, 6, 6) == {"a": []}


def test_a_norm_over_another_dimension_does_not_belong():
    # As many positions as filters: sizes alone would not tell.
    net = Net(
        lambda net, x: net.norm(net.a(x).transpose(1, 2)), a=nn.Conv1d(1, 4, 3, padding=1), norm=nn.BatchNorm1d(4)
    )
    assert tensors_of(net, 1, 1, 4) == {"a": []}
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.LayerNorm((4, 4)))
    assert tensors_of(net, 1, 1, 4, 4) == {"0": []}


@pytest.mark.parametrize(
    ("permutation", "shape", "axis"),
    [((0, 2, 3, 1), (3,), 0), ((0, 2, 3, 1), (4, 3), 1), ((0, 1, 2, 3), (3, 5, 4), 0), ((0, 3, 1, 2), (3, 5), 0)],
)
def test_layer_norm_after_a_permutation(permutation, shape, axis):
    net = nn.Sequential(nn.Conv2d(2, 3, 1), Permute(list(permutation)), nn.LayerNorm(shape)).eval()
    (layer,) = find_filters(net, torch.rand(1, 2, 5, 4))
    assert [(gate.tensor is net[2].weight, gate.axis) for gate in layer.gates] == [(True, axis), (False, axis)]
    nn.init.normal_(net[2].bias)
    layer.zero(torch.tensor([False, True, False]))
    channels = net(torch.rand(1, 2, 5, 4)).movedim(permutation.index(1), 1)[0].flatten(1).abs().amax(1)
    assert (channels == 0).tolist() == [False, True, False]


@pytest.mark.parametrize(
    "move",
    [
        lambda x: x.permute(0, 2, 3, 1),
        lambda x: torch.permute(x, dims=(0, 2, 3, 1)),
        lambda x: x.movedim(1, -1),
        lambda x: x.transpose(1, 3),
        lambda x: x.swapaxes(-3, -1),
        lambda x: x.permute(0, 2, 3, 1).contiguous().relu(),
        lambda x: F.relu(input=x, inplace=True).to(torch.float32).permute(0, 2, 3, 1),
    ],
)
def test_the_channel_axis_is_followed(move):
    net = Net(lambda net, x: net.norm(move(net.a(x))), a=nn.Conv2d(2, 3, 1), norm=nn.LayerNorm(3))
    assert tensors_of(net, 1, 2, 4, 4) == {"a": ["norm.weight", "norm.bias"]}


def test_a_convolution_without_norm_and_a_shortcut_without_norm():
    def forward(net, x):
        x = net.first(x).relu()
        return net.norm(net.second(x)) + net.shortcut(x)

    net = Net(forward, shortcut=conv(3, 2), first=conv(2, 3), second=conv(3, 2), norm=norm())
    found = tensors_of(net, 1, 2, 6, 6)
    assert found == {"shortcut": [], "first": [], "second": ["norm.weight", "norm.bias"]}
    assert list(found) == ["shortcut", "first", "second"]  # in the order of named_modules


def test_a_convolution_that_does_not_run_is_left_out():
    net = Net(lambda net, x: net.a(x), a=conv(), unused=conv())
    assert list(tensors_of(net, 1, 2, 6, 6)) == ["a"]
    net = Net(lambda net, x: net.a(x), a=conv(), unused=conv())
    layers = find_filters(net.eval(), torch.rand(1, 2, 6, 6), forward=lambda x: net.unused(x))
    assert [layer.name for layer in layers] == ["unused"]


def test_the_forward_pass_changes_nothing():
    net = nn.Sequential(conv(), norm(), nn.ReLU(inplace=True), conv()).eval()
    state = copy.deepcopy(net.state_dict())
    images = torch.rand(1, 2, 6, 6)
    given = images.clone()
    find_filters(net, images)
    assert torch.equal(images, given)
    assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())


def test_the_images_are_left_alone():
    images = torch.ones(1, 2, 6, 6)
    find_filters(Net(lambda net, x: net.a(x.zero_()), a=conv()), images)
    assert images.eq(1).all()


class Stem(nn.Module):
    """As a pre-activation ResNet begins: the stem's output goes through a norm and past it."""

    def __init__(self, batch_norm):
        super().__init__()
        self.stem, self.norm1, self.conv1 = conv(2, 3), batch_norm, conv(3, 3)

    def forward(self, x):
        x = self.stem(x)
        return torch.cat([self.conv1(F.relu(self.norm1(x))), x], 1)


def test_output_that_also_goes_past_the_norm():
    net = Stem(norm(3))
    assert tensors_of(net, 1, 2, 6, 6) == {"stem": ["norm1.weight", "norm1.bias"], "conv1": []}
    offsets = tensors_of(net, 1, 2, 6, 6, role="offsets")
    assert offsets == {"stem": ["norm1.bias", "norm1.running_mean"], "conv1": []}
    assert tensors_of(net, 1, 2, 6, 6, role="gates") == {"stem": [], "conv1": []}


@pytest.mark.parametrize("affine", [True, False])
def test_scaling_an_output_that_also_goes_past_the_norm(affine):
    net = Stem(nn.BatchNorm2d(3, affine=affine)).eval()
    for tensor in (*net.parameters(), net.norm1.running_mean, net.norm1.running_var):
        nn.init.uniform_(tensor, 0.2, 0.9)
    images, outputs = torch.rand(2, 2, 6, 6), {}
    net.norm1.register_forward_hook(
        lambda module, args, output: outputs.update(norm=output.detach(), stem=args[0].detach())
    )
    mask = FilterMask(find_filters(net, images))
    net(images)
    before = dict(outputs)
    scales = torch.tensor([0.0, 0.3, 1.0, 1.0, 1.0, 1.0])
    with mask.scaled(scales):
        net(images)
    for name in ("norm", "stem"):
        torch.testing.assert_close(outputs[name], before[name] * scales[:3].view(1, 3, 1, 1))
        assert (outputs[name][:, 0] == 0).all()
    mask.prune([("stem", 1)])
    net(images)
    for name in ("norm", "stem"):
        assert (outputs[name][:, 1] == 0).all()
        assert torch.equal(outputs[name][:, [0, 2]], before[name][:, [0, 2]])


def test_a_norm_of_the_image_takes_a_filters_scale_out_again():
    offsets = tensors_of(Stem(nn.GroupNorm(1, 3)), 1, 2, 6, 6, role="offsets")
    assert offsets == {"stem": ["norm1.weight", "norm1.bias"], "conv1": []}
    assert tensors_of(Stem(nn.GroupNorm(1, 3)), 1, 2, 6, 6, role="gates") == {"stem": [], "conv1": []}


def test_resnet18():
    expected = {"conv1": "bn1"}
    for layer in (1, 2, 3, 4):
        for block in (0, 1):
            name = f"layer{layer}.{block}"
            expected |= {f"{name}.conv1": f"{name}.bn1", f"{name}.conv2": f"{name}.bn2"}
            if layer > 1 and block == 0:
                expected[f"{name}.downsample.0"] = f"{name}.downsample.1"
    net = models.resnet18(num_classes=3)
    assert tensors_of(net, 1, 3, 32, 32) == {
        name: [f"{norm}.weight", f"{norm}.bias"] for name, norm in expected.items()
    }
    assert not any(tensors_of(net, 1, 3, 32, 32, role="offsets").values())


def test_mobilenet_with_squeeze_and_excite():
    net = models.mobilenet_v3_small(num_classes=3)
    found = tensors_of(net, 1, 3, 32, 32)
    excite = {name for name in found if name.endswith((".fc1", ".fc2"))}
    assert len(excite) == 18
    for name, tensors in found.items():
        behind = f"{name.removesuffix('.0')}.1"
        assert tensors == ([] if name in excite else [f"{behind}.weight", f"{behind}.bias"])
    assert len(found) == sum(isinstance(module, nn.Conv2d) for module in net.modules()) == 52


def test_convnext():
    with torch.device("meta"):  # 28 million weights that nobody looks at
        net = models.convnext_tiny(num_classes=3).eval()
        layers = find_filters(net, torch.rand(1, 3, 64, 64))
    names = {id(tensor): name for name, tensor in net.named_parameters()}
    found = {layer.name: [names[id(gate.tensor)] for gate in layer.gates] for layer in layers}
    expected = {"features.0.0": ["features.0.1.weight", "features.0.1.bias"]}
    for stage, blocks in ((1, 3), (3, 3), (5, 9), (7, 3)):
        for block in range(blocks):
            name = f"features.{stage}.{block}.block"
            expected[f"{name}.0"] = [f"{name}.2.weight", f"{name}.2.bias"]
        if stage < 7:
            expected[f"features.{stage + 1}.1"] = []
    assert found == expected
    assert {layer.channels for layer in layers} == {96, 192, 384, 768}


@pytest.mark.parametrize(
    ("build", "channels", "size"),
    [(models.resnet18, 3, 32), (models.mobilenet_v3_small, 3, 32), (models.densenet121, 3, 32)],
)
def test_dead_channels_of_real_networks_are_dead_behind_their_norm(build, channels, size):
    torch.manual_seed(0)
    net = build(num_classes=3).eval()
    for tensor in (*net.parameters(), *net.buffers()):
        if tensor.ndim == 1 and tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5)
    images = torch.rand(1, channels, size, size)
    layers = find_filters(net, images)
    outputs = {}
    for layer in layers:
        module = layer.gates[0].owner if layer.gates else layer.convolution
        module.register_forward_hook(
            lambda *call, name=layer.name: outputs.update({name: call[-1].detach().clone()})
        )  # ReLU is in place
    net(images)
    assert all(output[:, 0].abs().max() > 0 for output in outputs.values())
    FilterMask(layers).prune([(layer.name, 0) for layer in layers])
    net(images)
    assert len(outputs) == len(layers)
    assert all((output[:, 0] == 0).all() for output in outputs.values())


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="torch before 2.6 compiles whatever it meets")
def test_a_compiled_part_is_traced_without_compilation():
    torch._dynamo.reset()  # what was skipped once, for any test, is not compiled again
    net = nn.Sequential(conv(), norm()).eval()
    compiled = nn.Sequential(torch.compile(net, backend="eager", fullgraph=True)).eval()
    assert [len(layer.norms) for layer in find_filters(compiled, torch.rand(1, 2, 4, 4))] == [2]

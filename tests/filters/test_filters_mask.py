from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_unlearn.filters import FilterMask, find_filters


class Mixed(nn.Module):
    """Every way to hold a filter: grouped, transposed, depthwise, with and without norm and bias, past the norm."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(4)
        self.grouped = nn.Conv2d(4, 6, 3, padding=1, groups=2)
        self.norm2 = nn.BatchNorm2d(6, affine=False)
        self.transposed = nn.ConvTranspose2d(6, 4, 2, groups=2)
        self.norm3 = nn.BatchNorm2d(4)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
        self.classify = nn.Linear(4, 3)

    def forward(self, x):
        x = self.stem(x)
        y = self.norm2(self.grouped(self.norm1(x).relu())).relu()
        y = self.norm3(self.transposed(y)).relu()[:, :, 1:, 1:] + x
        return self.classify(self.depthwise(y).relu().mean((2, 3)))


def build(seed=0, dtype=torch.float32):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        net = Mixed().to(dtype).eval()
        for tensor in (*net.parameters(), *net.buffers()):
            if tensor.is_floating_point():
                nn.init.uniform_(tensor, 0.2, 1.0)
            else:
                tensor.fill_(7)
        for parameter in net.parameters():
            if parameter.ndim > 1:  # positive biases keep the ReLUs busy
                parameter.data *= torch.randint(0, 2, parameter.shape) * 2 - 1
    return net


def images(dtype=torch.float32, count=2):
    return torch.rand(count, 2, 5, 5, generator=torch.Generator().manual_seed(1)).to(dtype)


def mask_of(net):
    parameter = next(net.parameters())
    return FilterMask(find_filters(net, images(parameter.dtype)))


def bits(net):
    """Every bit of every parameter and buffer; NaN is equal to itself here, and 0.0 is not -0.0."""
    return {name: bytes(t.contiguous().reshape(-1).view(torch.uint8).tolist()) for name, t in net.state_dict().items()}


TOTAL = 18
FACTORS = st.one_of(st.just(0.0), st.just(1.0), st.floats(0, 1, width=32))
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("prune"), st.lists(st.integers(0, TOTAL - 1), max_size=4, unique=True)),
        st.tuples(
            st.just("fold"), st.lists(FACTORS, min_size=TOTAL, max_size=TOTAL), st.sampled_from([0.0, 0.05, 0.5])
        ),
        st.tuples(st.just("undo"), st.integers(0, 3)),
    ),
    max_size=8,
)


@settings(max_examples=60, deadline=None)
@given(steps=STEPS, seed=st.integers(0, 5))
def test_undo_restores_every_bit(steps, seed):
    net = build(seed)
    net.grouped.weight.data[0, 0, 0, 0] = torch.nan
    net.transposed.weight.data[1, 1] = torch.inf
    net.norm2.running_mean[3] = -0.0
    mask = mask_of(net)
    assert mask.total == TOTAL
    states, pruned = [bits(net)], [()]
    for kind, *arguments in steps:
        if kind == "prune":
            taken = set(mask.pruned)
            chosen = [mask.locate(index) for index in arguments[0] if mask.locate(index) not in taken]
            mask.prune(chosen)
            pruned.append((*pruned[-1], *chosen))
            states.append(bits(net))
        elif kind == "fold":
            scales, zero_below = torch.tensor(arguments[0]), arguments[1]
            mask.fold(scales, zero_below=zero_below)
            low = [mask.locate(index) for index in (scales <= zero_below).nonzero().flatten().tolist()]
            pruned.append((*pruned[-1], *(filter_id for filter_id in low if filter_id not in pruned[-1])))
            states.append(bits(net))
        else:
            count = min(arguments[0], mask.steps)
            mask.undo(count)
            del states[len(states) - count :], pruned[len(pruned) - count :]
        assert mask.steps == len(states) - 1
        assert mask.pruned == pruned[-1]
        assert bits(net) == states[-1]
        assert net.norm1.num_batches_tracked.item() == 7
    mask.undo(mask.steps)
    assert bits(net) == states[0]
    assert mask.pruned == ()


@settings(max_examples=30, deadline=None)
@given(
    factors=st.lists(FACTORS, min_size=TOTAL, max_size=TOTAL),
    zero_below=st.sampled_from([0.0, 0.3]),
    pruned=st.sets(st.integers(0, TOTAL - 1), max_size=3),
)
def test_fold_leaves_what_scaled_showed(factors, zero_below, pruned):
    net, scales = build(), torch.tensor(factors)
    mask = mask_of(net)
    mask.prune([mask.locate(index) for index in pruned])
    with torch.no_grad(), mask.scaled(scales * (scales > zero_below)):
        shown = net(images())
    mask.fold(scales, zero_below=zero_below)
    with torch.no_grad():
        assert torch.equal(net(images()), shown)
    assert mask.flat().tolist() == [index in pruned or factor <= zero_below for index, factor in enumerate(factors)]


@pytest.mark.parametrize("name", ["preact", "vgg", "grouped", "plain", "group_norm"])
@pytest.mark.parametrize("channels", [1, 3])
def test_fold_leaves_what_scaled_showed_in_other_nets(make_net, name, channels):
    net, batch = make_net(name, channels=channels), torch.rand(2, channels, 8, 8)
    mask = FilterMask(find_filters(net, batch))
    scales = torch.rand(mask.total).clamp(min=0.2)
    with torch.no_grad(), mask.scaled(scales):
        shown = net(batch)
    original = net(batch)
    mask.fold(scales)
    assert torch.equal(net(batch), shown)
    assert not torch.allclose(shown, original)
    assert mask.pruned == ()


def test_fold_by_one_changes_no_output():
    net, batch = build(), images()
    before = net(batch)
    mask = mask_of(net)
    mask.fold(torch.ones(TOTAL))
    assert torch.equal(net(batch), before)
    assert (mask.steps, mask.pruned) == (1, ())


def test_fold_by_hand():
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 1)).eval()
    for parameter in net.parameters():
        nn.init.constant_(parameter, 8.0)
    mask = FilterMask(find_filters(net, torch.rand(1, 1, 2, 2)))
    mask.fold(torch.tensor([0.5, 0.125, 0.25, 0.0]), zero_below=0.125)
    assert net[0].weight.flatten().tolist() == [8.0, 0.0]
    assert net[0].bias.tolist() == [8.0, 0.0]
    assert net[1].weight.tolist() == [4.0, 0.0]
    assert net[1].bias.tolist() == [4.0, 0.0]
    assert net[3].weight.flatten().tolist() == [2.0, 2.0, 0.0, 0.0]
    assert net[3].bias.tolist() == [2.0, 0.0]
    assert mask.pruned == (("0", 1), ("3", 1))


def test_scaled_multiplies_each_channel():
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)).eval()
    nn.init.normal_(net[1].bias)
    nn.init.normal_(net[1].running_mean)
    mask, batch = FilterMask(find_filters(net, torch.rand(1, 1, 4, 4))), torch.rand(3, 1, 4, 4)
    before = net(batch)
    with mask.scaled(torch.tensor([0.5, 2.0])):
        torch.testing.assert_close(net(batch), before * torch.tensor([0.5, 2.0]).view(1, 2, 1, 1))
    assert torch.equal(net(batch), before)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_scaled_puts_everything_back_after_an_exception(error):
    net, batch = build(), images()
    mask, before, state = mask_of(net), net(batch), bits(net)
    tensors = [*net.parameters(), *net.buffers()]

    def fail():
        with mask.scaled(torch.full((TOTAL,), 0.5)):
            assert not torch.equal(net(batch), before)
            raise error("inside")

    with pytest.raises(error, match="inside"):
        fail()
    assert [*map(id, net.parameters()), *map(id, net.buffers())] == [*map(id, tensors)]
    assert all(isinstance(parameter, nn.Parameter) for parameter in net.parameters())
    assert bits(net) == state
    assert torch.equal(net(batch), before)


def test_scaled_puts_everything_back_if_it_fails_half_way():
    net = build()
    mask, before = mask_of(net), [*map(id, net.parameters())]
    last = mask.layers[-1]
    weight, last.convolution.weight.data = last.convolution.weight.data, torch.ones(1, 1, 1, 1)
    with pytest.raises(RuntimeError, match="invalid for input of size 1"), mask.scaled(torch.ones(TOTAL)):
        pass
    last.convolution.weight.data = weight
    assert [*map(id, net.parameters())] == before


@pytest.mark.parametrize("name", ["preact", "vgg", "grouped", "plain", "group_norm", "mixed"])
def test_scaled_is_differentiable_in_the_scales(make_net, name):
    net = build(dtype=torch.float64) if name == "mixed" else make_net(name, channels=2).double()
    batch = images(torch.float64)
    mask = FilterMask(find_filters(net, batch))

    def loss(scales):
        with mask.scaled(scales):
            return net(batch).square().sum()

    for low in (0.3, 1.0):
        scales = torch.linspace(low, 1, mask.total, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(loss, scales)
        (gradient,) = torch.autograd.grad(loss(scales), scales)
        assert gradient.count_nonzero() > mask.total // 2
    assert all(parameter.grad is None for parameter in net.parameters())


def test_scaled_with_gradients_shows_the_same_as_without():
    net, batch = build(), images()
    mask, scales = mask_of(net), torch.linspace(0, 1, TOTAL)
    with torch.no_grad(), mask.scaled(scales):
        plain = net(batch)
    with mask.scaled(scales.clone().requires_grad_()):
        torch.testing.assert_close(net(batch).detach(), plain)


@pytest.mark.parametrize("size", [TOTAL - 1, TOTAL + 1, (TOTAL, 1)])
@pytest.mark.parametrize("use", [FilterMask.fold, FilterMask.split, lambda mask, flat: mask.scaled(flat).__enter__()])
def test_scales_of_another_size(size, use):
    net = build()
    mask, state = mask_of(net), bits(net)
    with pytest.raises(
        ValueError, match=r"flat: expected one value for each of the 18 filters, shape \(18,\), but got"
    ):
        use(mask, torch.ones(size))
    assert bits(net) == state
    assert mask.steps == 0


def optimizers(net):
    return {
        "sgd": lambda: torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2),
        "adam": lambda: torch.optim.Adam(net.parameters(), lr=0.05),
    }


def train(net, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        net(images()).square().mean().backward()
        optimizer.step()
        yield


def alive(mask):
    """Largest absolute value in what each pruned filter holds."""
    layers = {layer.name: layer for layer in mask.layers}
    values = []
    for name, index in mask.pruned:
        layer = layers[name]
        view = layer.by_filter(layer.weight.detach())
        values.append(view[divmod(index, view.shape[1])].abs().max())
        values += [companion.by_channel().detach()[index].abs().max() for companion in layer.companions]
    return torch.stack(values)


PRUNED = [("stem", 1), ("grouped", 4), ("transposed", 3), ("depthwise", 0)]


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_held_keeps_zeros_through_steps(name):
    net = build()
    mask, optimizer = mask_of(net), optimizers(net)[name]()
    list(train(net, optimizer))  # so that there is momentum
    mask.prune(PRUNED)
    before = bits(net)
    with mask.held(optimizer):
        for _ in train(net, optimizer):
            assert alive(mask).max() == 0
    changed = {key for key, value in bits(net).items() if value != before[key]}
    assert {"stem.weight", "grouped.weight", "norm3.weight", "classify.bias"} <= changed
    # Outside nothing holds them: the hook is gone, and the momentum is what they were held against.
    list(train(net, optimizer, steps=1))
    assert alive(mask).max() > 0
    mask.hold()
    assert alive(mask).max() == 0


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_held_lets_go_after_an_exception(error):
    net = build()
    mask, optimizer = mask_of(net), optimizers(net)["sgd"]()
    list(train(net, optimizer))
    mask.prune(PRUNED)
    with pytest.raises(error, match="inside"), mask.held(optimizer):
        raise error("inside")
    list(train(net, optimizer, steps=1))
    assert alive(mask).max() > 0


def test_undo_leaves_what_was_trained_meanwhile():
    net = build()
    mask, optimizer = mask_of(net), optimizers(net)["sgd"]()
    original = copy.deepcopy(net)
    mask.prune([("grouped", 4)])
    with mask.held(optimizer):
        list(train(net, optimizer))
    trained = copy.deepcopy(net)
    mask.undo()
    others = [0, 1, 2, 3, 5]
    assert torch.equal(net.grouped.weight[4], original.grouped.weight[4])
    assert torch.equal(net.grouped.bias[4], original.grouped.bias[4])
    assert torch.equal(net.norm2.running_mean, original.norm2.running_mean)
    assert torch.equal(net.grouped.weight[others], trained.grouped.weight[others])
    assert not torch.equal(net.grouped.weight[others], original.grouped.weight[others])


@pytest.mark.parametrize("overwrite", [False, True])
def test_undo_after_the_model_has_moved(overwrite):
    net = build()
    mask, expected = mask_of(net), bits(copy.deepcopy(net).double())
    mask.prune(PRUNED)
    mask.fold(torch.linspace(0, 1, TOTAL))
    torch.__future__.set_overwrite_module_params_on_conversion(overwrite)  # new Parameter objects
    try:
        net.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    mask.undo(2)
    assert bits(net) == expected


def test_pruning_after_the_model_has_moved():
    net = build()
    mask = mask_of(net)
    net.double()
    mask.prune(PRUNED)
    assert alive(mask).max() == 0


def test_undo_takes_back_the_last_steps_only():
    net = build()
    mask = mask_of(net)
    mask.prune([("stem", 0)])
    after_one = bits(net)
    mask.prune([("grouped", 0), ("grouped", 5)])
    mask.fold(torch.full((TOTAL,), 0.5))
    mask.undo(0)
    assert mask.steps == 3
    mask.undo(2)
    assert bits(net) == after_one
    assert mask.pruned == (("stem", 0),)


@pytest.mark.parametrize("steps", [-1, 2])
def test_undo_of_steps_that_were_not_made(steps):
    net = build()
    mask = mask_of(net)
    mask.prune([("stem", 0)])
    state = bits(net)
    with pytest.raises(ValueError, match=f"steps: cannot undo {steps} of 1 steps"):
        mask.undo(steps)
    assert bits(net) == state
    assert mask.steps == 1


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ([("stem", 1), ("nowhere", 0)], "there is no filter 0 of layer 'nowhere'; layers are"),
        ([("stem", 1), ("stem", 4)], "there is no filter 4 of layer 'stem'"),
        ([("stem", 1), ("stem", -1)], "there is no filter -1 of layer 'stem'"),
        ([("stem", 1), ("classify", 0)], "there is no filter 0 of layer 'classify'"),
        ([("stem", 1), ("stem", 1)], "filter 1 of layer 'stem' is pruned already or named twice"),
        ([("stem", 1), ("grouped", 2)], "filter 2 of layer 'grouped' is pruned already or named twice"),
    ],
)
def test_filters_that_cannot_be_pruned(filters, message):
    net = build()
    mask = mask_of(net)
    mask.prune([("grouped", 2)])
    state = bits(net)
    with pytest.raises(ValueError, match=f"filters: {message}"):
        mask.prune(filters)
    assert bits(net) == state
    assert (mask.steps, mask.pruned) == (1, (("grouped", 2),))


@given(index=st.integers(0, TOTAL - 1))
@settings(max_examples=TOTAL, deadline=None)
def test_locate_flat_and_split_agree(index):
    net = build()
    mask = mask_of(net)
    name, channel = mask.locate(index)
    pieces = dict(zip((layer.name for layer in mask.layers), mask.split(torch.arange(TOTAL)), strict=True))
    assert pieces[name][channel] == index
    mask.prune([(name, channel)])
    assert mask.flat().nonzero().flatten().tolist() == [index]
    assert mask.flat().dtype == torch.bool
    assert mask.state_dict()[name].nonzero().flatten().tolist() == [channel]


def test_locate_by_hand():
    mask = mask_of(build())
    assert [layer.name for layer in mask.layers] == ["stem", "grouped", "transposed", "depthwise"]
    assert [mask.locate(i) for i in (0, 3, 4, 9, 10, 17)] == [
        ("stem", 0), ("stem", 3), ("grouped", 0), ("grouped", 5), ("transposed", 0), ("depthwise", 3),
    ]  # fmt: skip
    assert [len(piece) for piece in mask.split(torch.ones(TOTAL))] == [4, 6, 4, 4]


@pytest.mark.parametrize("index", [-1, TOTAL])
def test_locate_outside(index):
    with pytest.raises(IndexError, match=f"index: {index} is not among the 18 filters"):
        mask_of(build()).locate(index)


def test_what_is_pruned_as_plain_python_and_as_tensors():
    mask = mask_of(build())
    assert mask.to_dict() == {}
    mask.prune([("depthwise", 3), ("stem", 2)])
    mask.prune([("depthwise", 0)])
    assert mask.pruned == (("depthwise", 3), ("stem", 2), ("depthwise", 0))
    assert mask.to_dict() == {"stem": [2], "depthwise": [0, 3]}
    assert json.loads(json.dumps(mask.to_dict())) == mask.to_dict()
    state = mask.state_dict()
    assert list(state) == ["stem", "grouped", "transposed", "depthwise"]
    assert {(bools.dtype, bools.device.type) for bools in state.values()} == {(torch.bool, "cpu")}
    assert state["depthwise"].tolist() == [True, False, False, True]
    assert state["grouped"].tolist() == [False] * 6


def test_state_dict_round_trip(tmp_path):
    net = build()
    mask = mask_of(net)
    mask.prune(PRUNED)
    torch.save(mask.state_dict(), tmp_path / "mask.pt")
    other = build()
    twin = mask_of(other)
    twin.prune([("stem", 1)])  # part of it is there already
    twin.load_state_dict(torch.load(tmp_path / "mask.pt", weights_only=True))
    assert bits(other) == bits(net)
    assert twin.to_dict() == mask.to_dict()
    assert torch.equal(twin.flat(), mask.flat())
    twin.load_state_dict(mask.state_dict())
    assert bits(other) == bits(net)


@pytest.mark.parametrize("change", ["missing", "unknown", "size"])
def test_a_state_of_another_network(change):
    net = build()
    mask = mask_of(net)
    given = mask.state_dict()
    given["stem"][0] = True
    if change == "missing":
        del given["grouped"]
    elif change == "unknown":
        given["nowhere"] = torch.zeros(3, dtype=torch.bool)
    else:
        given["grouped"] = torch.zeros(7, dtype=torch.bool)
    state = bits(net)
    with pytest.raises(ValueError, match=r"state: it masks layers .* but the model has"):
        mask.load_state_dict(given)
    assert bits(net) == state
    assert mask.pruned == ()


def test_a_copied_model_holds_the_zeros_without_a_mask():
    net = build()
    mask_of(net).prune(PRUNED)
    twin = copy.deepcopy(net)
    assert torch.equal(twin(images()), net(images()))
    assert list(twin.state_dict()) == list(build().state_dict())


def test_a_filter_that_fold_prunes_counts_no_longer_in_a_group_norm(make_net):
    net, twin, batch = make_net("group_norm"), make_net("group_norm"), torch.rand(2, 1, 8, 8)
    mask, other = FilterMask(find_filters(net, batch)), FilterMask(find_filters(twin, batch))
    scales = torch.linspace(0, 1, mask.total)
    mask.fold(scales)
    other.prune([other.locate(0)])
    with other.scaled(scales):
        assert torch.equal(net(batch), twin(batch))

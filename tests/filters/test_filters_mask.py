from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_unlearn.filters import ChannelTensor, FilterMask
from tests.filters.mixed_nets import FACTORS, TOTAL, bits, build, images, mask_of

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
    states, pruned, kept = [bits(net)], [()], [torch.ones(TOTAL)]
    for kind, *arguments in steps:
        if kind == "prune":
            taken = set(mask.pruned)
            chosen = [mask.locate(index) for index in arguments[0] if mask.locate(index) not in taken]
            mask.prune(chosen)
            pruned.append((*pruned[-1], *chosen))
            kept.append(kept[-1])
            states.append(bits(net))
        elif kind == "fold":
            scales, zero_below = torch.tensor(arguments[0]), arguments[1]
            mask.fold(scales, zero_below=zero_below)
            low = [mask.locate(index) for index in (scales <= zero_below).nonzero().flatten().tolist()]
            pruned.append((*pruned[-1], *(filter_id for filter_id in low if filter_id not in pruned[-1])))
            kept.append(kept[-1] * scales)
            states.append(bits(net))
        else:
            count = min(arguments[0], mask.steps)
            mask.undo(count)
            del states[len(states) - count :], pruned[len(pruned) - count :], kept[len(kept) - count :]
        assert mask.steps == len(states) - 1
        assert mask.pruned == pruned[-1]
        assert torch.equal(mask.kept, kept[-1].masked_fill(mask.flat(), 0))
        assert bits(net) == states[-1]
        assert net.norm1.num_batches_tracked.item() == 7
    mask.undo(mask.steps)
    assert bits(net) == states[0]
    assert mask.pruned == ()


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


def test_what_is_noted_is_taken_back():
    net = build(0)
    mask, states = mask_of(net), [bits(net)]
    mask.prune([mask.locate(1)])
    states.append(bits(net))
    mask.note([ChannelTensor(net.norm1, name) for name in ("weight", "running_var")])
    with torch.no_grad():
        net.norm1.weight.add_(1)
        net.norm1.running_var.mul_(2)
    assert (mask.steps, mask.pruned) == (2, (mask.locate(1),))
    mask.undo()
    assert bits(net) == states[1]
    assert mask.pruned == (mask.locate(1),)
    mask.undo()
    assert bits(net) == states[0]


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


def test_what_is_pruned_from_the_start_is_no_step():
    net = build(0)
    first = mask_of(net)
    first.prune([first.locate(2), first.locate(7)])
    state, zeroed = first.state_dict(), bits(net)
    first.undo()
    mask = FilterMask(first.layers, state)
    assert bits(net) == zeroed
    assert (mask.steps, set(mask.pruned)) == (0, {first.locate(2), first.locate(7)})
    mask.prune([mask.locate(0)])
    mask.undo(mask.steps)
    assert bits(net) == zeroed
    with pytest.raises(ValueError, match="state: it masks layers"):
        FilterMask(first.layers, {"other": torch.tensor([True])})

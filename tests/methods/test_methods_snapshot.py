"""Tensors go back to what they held, bit for bit."""

import torch
from torch import nn

from lightning_unlearn.methods.snapshot import Snapshot


def test_everything_goes_back_bit_for_bit() -> None:
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3))
    tensors = [*net.parameters(), *net.buffers()]
    before = [tensor.detach().clone() for tensor in tensors]
    kept = Snapshot(tensors)

    net.train()(torch.randn(4, 1, 5, 5)).square().sum().backward()
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    assert not any(torch.equal(now, then) for now, then in zip(tensors[:2], before[:2], strict=True))
    assert not torch.equal(tensors[-3], before[-3])  # the running mean

    kept.put_back()
    assert all(torch.equal(now, then) for now, then in zip(tensors, before, strict=True))


def test_a_renewed_one_goes_back_to_the_later_moment() -> None:
    weight = torch.zeros(3, requires_grad=True)
    kept = Snapshot([weight])
    with torch.no_grad():
        weight += 1
    kept.renew()
    with torch.no_grad():
        weight += 1
    kept.put_back()
    assert weight.tolist() == [1, 1, 1]
    assert weight.requires_grad
    assert weight.is_leaf


def test_it_may_be_put_back_twice_and_takes_tensors_of_any_type() -> None:
    half, count = torch.ones(2, dtype=torch.bfloat16), torch.tensor(5)
    kept = Snapshot(iter([half, count]))
    for _ in range(2):
        half.mul_(3)
        count += 1
        kept.put_back()
        assert half.tolist() == [1, 1]
        assert count.item() == 5

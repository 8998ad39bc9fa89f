from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lightning_unlearn.filters.gradients import gradients


@pytest.fixture
def x():
    return torch.tensor([1.0, 2.0], requires_grad=True)


def test_times_a_vector_and_again(x):
    squares = x**2
    (first,) = gradients(squares, [x], torch.tensor([1.0, 10.0]), keep=True, graph=True)
    assert first.tolist() == [2.0, 40.0]
    assert gradients(first.sum(), [x])[0].tolist() == [2.0, 20.0]
    assert gradients(squares.sum(), [x])[0].tolist() == [2.0, 4.0]


def test_a_loss_without_a_graph(x):
    assert gradients(x.detach().sum(), [x, x]) == (None, None)


def test_reentrant_checkpoints_are_refused(x):
    with pytest.raises(ValueError, match=r"^model: it checkpoints.*call checkpoint with use_reentrant=False"):
        gradients(checkpoint(torch.exp, x, use_reentrant=True).sum(), [x])
    assert torch.equal(gradients(checkpoint(torch.exp, x, use_reentrant=False).sum(), [x])[0], x.exp())


def test_other_errors_are_torchs(x):
    loss = x.exp().sum()
    gradients(loss, [x])
    with pytest.raises(RuntimeError, match="a second time"):
        gradients(loss, [x])

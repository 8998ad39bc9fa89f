"""Who answers SIGTERM while processes work together, and when."""

from __future__ import annotations

import os
import signal
import threading
from types import SimpleNamespace

import pytest

from lightning_unlearn.processes import ALONE, Processes
from lightning_unlearn.termination import termination

TWO = Processes(0, 2)


@pytest.fixture
def trainer():
    """What is asked of one; its strategy hears nothing from other processes."""
    strategy = SimpleNamespace(reduce_boolean_decision=lambda decision, all: decision)
    return SimpleNamespace(strategy=strategy, received_sigterm=False)


@pytest.fixture(autouse=True)
def told(trainer):
    """Lightning's handler, as far as it matters here."""

    def handler(*_):
        trainer.received_sigterm = True

    before = signal.signal(signal.SIGTERM, handler)
    yield handler
    signal.signal(signal.SIGTERM, before)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("processes", "lightnings"), [(ALONE, True), (TWO, False)], ids=["one", "two"])
def test_it_is_obeyed_where_the_block_says(trainer, told, processes, lightnings):
    with termination(trainer, processes) as obey:
        obey()
        terminate()
        assert trainer.received_sigterm is lightnings
        with pytest.raises(SystemExit) as caught:
            obey()
        trainer.strategy.reduce_boolean_decision = lambda decision, all: False  # it was obeyed
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is told


@pytest.mark.parametrize("processes", [ALONE, TWO], ids=["one", "two"])
def test_it_is_obeyed_at_the_end(trainer, processes):
    with pytest.raises(SystemExit), termination(trainer, processes):
        terminate()


def test_what_came_before(trainer):
    terminate()
    with pytest.raises(SystemExit), termination(trainer, TWO) as obey:
        obey()


def test_what_another_process_was_told(trainer):
    trainer.strategy.reduce_boolean_decision = lambda decision, all: not all
    with pytest.raises(SystemExit), termination(trainer, TWO) as obey:
        obey()


@pytest.mark.parametrize("processes", [ALONE, TWO], ids=["one", "two"])
def test_nothing_came(trainer, told, processes):
    with termination(trainer, processes) as obey:
        obey()
    assert signal.getsignal(signal.SIGTERM) is told


def test_an_error_goes_first(trainer, told):
    def fail():
        terminate()
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"), termination(trainer, TWO):
        fail()
    assert signal.getsignal(signal.SIGTERM) is told


def test_another_thread_may_not_answer_signals(trainer, told):
    seen = []

    def work():
        with termination(trainer, TWO):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [told]

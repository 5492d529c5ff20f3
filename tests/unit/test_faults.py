"""Signals that ask a run to stop: the first is remembered, one that comes much later ends the process."""

from __future__ import annotations

import os
import signal

import pytest

from sgm.training import faults
from sgm.training.faults import StopSignal


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time that `faults` reads, in seconds."""
    now = [100.0]
    monkeypatch.setattr(faults.time, "monotonic", lambda: now[0])
    return now


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def test_a_first_signal_is_remembered_and_handlers_come_back():
    before = [signal.getsignal(number) for number in StopSignal.SIGNALS]
    with StopSignal().watch() as stop:
        assert stop.received is None and stop.name == ""
        send(signal.SIGINT)
        assert stop.received == signal.SIGINT and stop.name == "SIGINT"
    assert [signal.getsignal(number) for number in StopSignal.SIGNALS] == before


@pytest.mark.parametrize("first, second", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGTERM)])
def test_a_second_signal_ends_the_process_from_five_seconds_after_the_first(clock, first, second):
    """A process of its own lives through one after 4.9 seconds, and not through one after 5."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with StopSignal().watch() as stop:
            for moment in (100.0, 100.1, 104.9, 105.0):
                clock[0] = moment
                send(first if moment == 100.0 else second)
                os.write(write, f"{moment} {stop.name}\n".encode())
        os._exit(0)
    os.close(write)
    _, status = os.waitpid(child, 0)
    with os.fdopen(read) as told:
        name = signal.Signals(first).name
        assert told.read().splitlines() == [f"{moment} {name}" for moment in (100.0, 100.1, 104.9)]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == second

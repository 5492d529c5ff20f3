"""Time by phase of a training iteration."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sgm.training.watch import timing
from sgm.training.watch.timing import PhaseClock


@pytest.fixture
def ticking(monkeypatch):
    """Each look at the clock finds it a second later."""
    now = iter(range(1000))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(now)))


def test_an_inner_phase_is_not_part_of_the_outer_one(ticking):
    clock = PhaseClock(enabled=True)
    encoder = nn.Identity()
    clock.watch(encoder, "text")
    with clock.phase("data"):
        pass
    with clock.phase("forward"):
        encoder(torch.zeros(1))
    assert clock.take() == {"data": 1.0, "text": 1.0, "forward": 2.0}  # forward: before and after the text
    assert clock.take() == {}


def test_a_failing_phase_is_left(ticking):
    clock = PhaseClock(enabled=True)
    broken = nn.Bilinear(1, 1, 1)
    clock.watch(broken, "text")
    with pytest.raises(TypeError), clock.phase("forward"):
        broken(1)
    with clock.phase("data"):
        pass
    assert list(clock.take()) == ["data", "text", "forward"]
    assert clock._running == []


def test_a_clock_that_is_off_counts_nothing():
    clock = PhaseClock()
    module = nn.Identity()
    clock.watch(module, "text")
    with clock.phase("data"):
        module(torch.zeros(1))
    assert clock.take() == {} and not module._forward_hooks


def test_on_a_gpu_marks_are_read_later_without_holding_anything_up(monkeypatch):
    """The queue is played by a counter: a mark's time is known only when somebody waits for it."""
    waited, queue = [], iter(range(10_000))

    class Mark:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            self.at = next(queue)

        def synchronize(self) -> None:
            waited.append(self.at)

        def elapsed_time(self, other: Mark) -> float:
            assert other.at <= waited[-1]
            return 1000.0 * (other.at - self.at)

    monkeypatch.setattr(timing.torch.cuda, "Event", Mark)
    clock = PhaseClock(enabled=True, device=torch.device("cuda"))
    for _ in range(200):
        with clock.phase("forward"), clock.phase("text"):
            pass
    assert waited == [341]  # one wait for what lay 256 marks back, when 512 had gathered
    assert clock.take() == {"text": 200.0, "forward": 400.0}
    assert len(waited) == 2 and clock.take() == {}


def test_memory_facts_on_a_cpu_are_this_processs():
    assert 10 * 2**20 < timing.memory_facts(torch.device("cpu"))["rss_bytes"] < 2**40

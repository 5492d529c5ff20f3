"""Where an iteration's time goes: seconds by phase, on a GPU too, where work is queued and runs later."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from sgm.training.memory import linux_memory

PHASES = ("data", "vae", "text", "forward", "backward", "optimizer")
_MOST_SPANS = 512  # kept before the older half is added up; by then it has long run


class _Span(NamedTuple):
    """A phase from one instant to another: seconds on the CPU's clock, or CUDA events."""

    phase: str
    start: Any
    end: Any


class PhaseClock:
    """Adds up seconds by phase. A phase inside another one is counted as itself, not as part of the outer one.

    On a GPU a mark goes into the queue at every change of phase and is read much later, so that nothing waits: a phase
    is what the GPU spent from one mark to the next, idle time included (waiting for data, an optimizer on the CPU).

    Args:
        enabled: False makes every method do nothing.
        device: whose queue takes the marks; None or a CPU: the CPU's clock.
    """

    def __init__(self, enabled: bool = False, device: torch.device | None = None):
        self.enabled = enabled
        self._cuda = device is not None and device.type == "cuda"
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._spans: list[_Span] = []
        self._running: list[str] = []
        self._since: Any = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The block's time counts as `name`."""
        self._enter(name)
        try:
            yield
        finally:
            self._leave()

    def watch(self, module: nn.Module, name: str) -> None:
        """Count every forward of `module` as phase `name`."""
        if self.enabled:
            module.register_forward_pre_hook(lambda *_: self._enter(name))
            module.register_forward_hook(lambda *_: self._leave(), always_call=True)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing in the block counts."""
        enabled, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = enabled

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call, in the order of `PHASES`; empty where the clock is off.

        Waits until the GPU has come to the last mark.
        """
        self._add_up(len(self._spans))
        taken = {name: self._seconds.pop(name) for name in (*PHASES, *self._seconds) if name in self._seconds}
        self._seconds.clear()
        return taken

    def _enter(self, name: str) -> None:
        if self.enabled:
            self._account()
            self._running.append(name)

    def _leave(self) -> None:
        if self.enabled:
            self._account()
            self._running.pop()

    def _account(self) -> None:
        """Give the time since the last change to the phase that ran."""
        now = self._now()
        if self._running:
            self._spans.append(_Span(self._running[-1], self._since, now))
        self._since = now
        if len(self._spans) > _MOST_SPANS:
            self._add_up(_MOST_SPANS // 2)

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _add_up(self, count: int) -> None:
        """The first `count` spans become seconds."""
        done, self._spans = self._spans[:count], self._spans[count:]
        if self._cuda and done:
            done[-1].end.synchronize()
        for span in done:
            self._seconds[span.phase] += (
                span.start.elapsed_time(span.end) / 1000 if self._cuda else span.end - span.start
            )


def memory_facts(device: torch.device) -> dict[str, int]:
    """Bytes: `peak_bytes` that tensors took on the GPU so far and `reserved_bytes` that torch holds there, and
    `rss_bytes`, this process's CPU memory now (where the system tells)."""
    facts = {}
    if device.type == "cuda":
        facts["peak_bytes"] = torch.cuda.max_memory_allocated(device)
        facts["reserved_bytes"] = torch.cuda.memory_reserved(device)
    resident = linux_memory("self/status", "VmRSS")
    return facts if resident is None else facts | {"rss_bytes": resident}

"""Where an iteration's time goes: seconds by phase, on a GPU too, where work is queued and runs later."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

PHASES = ("data", "vae", "text", "forward", "backward", "optimizer")


class PhaseClock:
    """Adds up seconds by phase. A phase inside another one is counted as itself, not as part of the outer one.

    On a GPU the queue is emptied at every change of phase, which costs a little overlap: switched on by
    `deepspeed.wall_clock_breakdown`, off by default.

    Args:
        enabled: False makes every method do nothing.
        device: whose queue to wait for; None or a CPU waits for nothing.
    """

    def __init__(self, enabled: bool = False, device: torch.device | None = None):
        self.enabled = enabled
        self._cuda = device if device is not None and device.type == "cuda" else None
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._running: list[str] = []
        self._since = 0.0

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

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call, in the order of `PHASES`; empty where the clock is off."""
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
        if self._cuda is not None:
            torch.cuda.synchronize(self._cuda)
        now = time.perf_counter()
        if self._running:
            self._seconds[self._running[-1]] += now - self._since
        self._since = now


def peak_memory(device: torch.device) -> int | None:
    """Most bytes that tensors took on a GPU since the start; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def phases_of_step(clock: PhaseClock, engine: Any) -> PhaseClock:
    """`clock`, told to count the text encoder of `engine` as a phase of its own."""
    if getattr(engine, "conditioner", None) is not None:
        clock.watch(engine.conditioner, "text")
    return clock

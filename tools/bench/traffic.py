"""What processes send to each other, and how long they wait for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

PLAIN_SEND = dist.isend  # before anything stands in its place


class Traffic:
    """Bytes that this process sends, and milliseconds that it waits for others, by being called in their place.

    Collectives count as rings send them: an all-reduce of x over n processes 2 x (n - 1) / n, a gathering x (n - 1).
    """

    CALLS = ("all_gather", "all_gather_into_tensor", "all_reduce", "broadcast", "recv", "isend", "batch_isend_irecv")

    def __init__(self, device: torch.device):
        self.device = device
        self.bytes = 0.0
        self._spans: list[tuple[Any, Any]] = []

    @contextmanager
    def counting(self) -> Iterator[Traffic]:
        plain = {name: getattr(dist, name) for name in self.CALLS}
        for name, call in plain.items():
            setattr(dist, name, self._counted(name, call))
        try:
            yield self
        finally:
            for name, call in plain.items():
                setattr(dist, name, call)

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*given: Any, **options: Any) -> Any:
            named = [options[name] for name in ("tensor", "output_tensor", "input_tensor") if name in options]
            first, *rest = [*given, *named]
            self.bytes += _sent(name, first, rest, dist.get_world_size(options.get("group")))
            with self._timed():
                result = call(*given, **options)
            if name == "batch_isend_irecv":
                return [Wait(work, self._timed) for work in result]
            return result

        return counted

    @contextmanager
    def _timed(self) -> Iterator[None]:
        begin = self._now()
        yield
        self._spans.append((begin, self._now()))

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def waited_ms(self) -> float:
        if self.device.type != "cuda":
            return sum(1e3 * (end - begin) for begin, end in self._spans)
        torch.cuda.synchronize(self.device)
        return sum(begin.elapsed_time(end) for begin, end in self._spans)


@dataclass
class Wait:
    """A message under way, whose end is waited for within `timed`."""

    work: Any
    timed: Callable[[], Any]

    def wait(self) -> None:
        with self.timed():
            self.work.wait()


def _sent(name: str, first: Any, rest: list[Any], size: int) -> float:
    """Bytes that this process sends in a call of a group of `size`."""
    if name == "batch_isend_irecv":
        return sum(message.tensor.nbytes for message in first if message.op is PLAIN_SEND)
    if name.startswith("all_gather"):
        return rest[0].nbytes * (size - 1)
    if name == "all_reduce":
        return first.nbytes * 2 * (size - 1) / size
    return first.nbytes if name == "isend" else 0

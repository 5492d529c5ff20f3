"""What processes send to each other, and how long they wait for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist


class Traffic:
    """Bytes that this process sends, and milliseconds that its collectives take, by being called in their place."""

    CALLS = ("all_to_all_single", "all_gather", "all_reduce", "broadcast", "recv", "isend")

    def __init__(self, device: torch.device):
        self.device = device
        self.bytes = 0
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
        def counted(first: Any, *rest: Any, **options: Any) -> Any:
            sent = {
                "all_to_all_single": rest[:1],
                "all_gather": rest[:1],
                "all_reduce": (first,),
                "isend": (first,),
            }.get(name, ())
            self.bytes += sum(tensor.nbytes for tensor in sent)
            begin = self._now()
            result = call(first, *rest, **options)
            self._spans.append((begin, self._now()))
            return result

        return counted

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

"""Inputs of layers that are run again in the backward pass, in host memory until then.

Each is copied there while its layer computes, and back while the layer after it is differentiated, on a stream of their
own. The device holds three of them at most, whatever the number of layers; no value changes.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

LEAST_VALUES = 1 << 8  # smaller tensors (masks) stay where they are


@dataclass(eq=False)
class Stored:
    """A tensor on the host. `value`: it is also on the device, once `copied` is over; `before`: stored before it."""

    host: Tensor
    before: weakref.ref[Stored] | None
    value: Tensor | None
    copied: torch.cuda.Event | None = field(default=None)


class ActivationOffload:
    """Keeps on the host what layers save inside `keeping()`."""

    def __init__(self, device: torch.device):
        self.device = device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._last: weakref.ref[Stored] | None = None  # the newest

    def keeping(self) -> saved_tensors_hooks:
        """Around one checkpointed layer: its inputs go to the host."""
        return saved_tensors_hooks(self._store, self._fetch)

    def _store(self, x: Tensor) -> Tensor | Stored:
        if x.numel() < LEAST_VALUES or x.device.type != self.device.type:
            return x
        last = _alive(self._last)
        if last is not None:
            # The layer that reads the one before is queued by now. Its memory is free for what comes behind its copy;
            # record_stream would keep it from a host that runs ahead, and all inputs would pile up.
            self._await(last)
            last.value = None
        host = torch.empty_like(x, device="cpu", pin_memory=self._copies is not None)
        stored = Stored(host, self._last, x.detach())
        self._copy(host, x, stored)
        self._last = weakref.ref(stored)
        return stored

    def _fetch(self, stored: Tensor | Stored) -> Tensor:
        if isinstance(stored, Tensor):
            return stored
        value = self._on_device(stored)
        self._await(stored)
        self._last = stored.before
        before = _alive(stored.before)
        if before is not None:
            self._on_device(before)
        stored.value = None  # the graph holds it from here on
        return value

    def _on_device(self, stored: Stored) -> Tensor:
        """It, or what it is going to be when `copied` is over."""
        if stored.value is None:
            stored.value = torch.empty_like(stored.host, device=self.device)
            self._copy(stored.value, stored.host, stored)
        return stored.value

    def _copy(self, target: Tensor, source: Tensor, stored: Stored) -> None:
        if self._copies is None:
            target.copy_(source)
            return
        self._copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)
        stored.copied = self._copies.record_event()

    def _await(self, stored: Stored) -> None:
        """What is queued from here on comes behind the copy."""
        if stored.copied is not None:
            torch.cuda.current_stream(self.device).wait_event(stored.copied)


def _alive(stored: weakref.ref[Stored] | None) -> Stored | None:
    """It, if a graph still needs it."""
    return None if stored is None else stored()

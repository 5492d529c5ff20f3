"""Activation checkpointing of one layer: everything recomputed in the backward pass, or all but its large products.

`ActivationOffload` keeps the inputs of such layers in host memory until then: each is copied there while its layer
computes, and back while the layer after it is differentiated, on a stream of their own. The device holds three of them
at most, whatever the number of layers; no value changes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from sgm.modules.ops.recompute_modes import MODES

# What torch's attention becomes on the way to a kernel. Where it becomes something else (the plain fallback), all of
# the layer is recomputed, which changes no number.
_ATTENTION_NAMES = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_fused_attention_overrideable",
)


def stronger_mode(*modes: bool | str) -> bool | str:
    """The mode that several places ask for together: a name says more than true, true more than false."""
    return max(modes, key=MODES.index)


def run_layer(mode: bool | str, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """layer(*args, **kwargs), with what its backward pass needs kept as `mode` says.

    Args:
        mode: False keeps everything. True keeps the inputs alone and runs the layer again. "selective" also keeps the
            attention product, the only part whose work grows with the square of the sequence: per layer one more
            tensor of the sequence's size. "products" also keeps what the linears with a bias give, ten tensors more:
            what is run again is norms, modulations and GELU.
    """
    if not mode:
        return layer(*args, **kwargs)
    if mode in ("selective", "products"):
        kept = _attention_ops() + ([torch.ops.aten.addmm.default] if mode == "products" else [])
        contexts = partial(create_selective_checkpoint_contexts, kept)
        return checkpoint(layer, *args, use_reentrant=False, context_fn=contexts, **kwargs)
    return checkpoint(layer, *args, use_reentrant=False, **kwargs)


def _attention_ops() -> list[Any]:
    found = [getattr(torch.ops.aten, name, None) for name in _ATTENTION_NAMES]
    found.append(getattr(torch.ops.cogvideox_sat, "flash4", None))
    return [packet.default for packet in found if packet is not None]


LEAST_VALUES = 1 << 8  # smaller tensors (masks) stay where they are


@dataclass(eq=False)
class Stored:
    """A tensor on the host. `value`: it is also on the device, once `copied` is over; `before`: stored before it."""

    host: Tensor
    before: weakref.ref[Stored] | None
    value: Tensor | None
    copied: Any = None  # the event


class ActivationOffload:
    """Keeps on the host what layers save inside `keeping()`."""

    def __init__(self, device: torch.device):
        self.device = device
        self._api: Any = torch.cuda if device.type == "cuda" else torch.cpu  # whose streams do nothing
        self._copies = self._api.Stream(device)
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
        host = torch.empty_like(x, device="cpu", pin_memory=self.device.type == "cuda")
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
        self._copies.wait_stream(self._api.current_stream(self.device))
        with self._api.stream(self._copies):
            target.copy_(source, non_blocking=True)
        stored.copied = self._copies.record_event()

    def _await(self, stored: Stored) -> None:
        """What is queued from here on comes behind the copy."""
        self._api.current_stream(self.device).wait_event(stored.copied)


def _alive(stored: weakref.ref[Stored] | None) -> Stored | None:
    """It, if a graph still needs it."""
    return None if stored is None else stored()

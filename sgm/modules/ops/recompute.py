"""Activation checkpointing of one layer: everything recomputed in the backward pass, or all but its large products."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
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

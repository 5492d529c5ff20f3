"""Joint attention over text and video tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sgm.errors import SgmError

# Preferred implementation, then those that stand in where it does not take the device, dtype or shape at hand.
BACKENDS: dict[str, list[SDPBackend]] = {
    "cudnn": [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
    "flash": [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
}
NAMES = ("default", *BACKENDS, "flash4")


class AttentionError(SgmError):
    """An implementation of attention does not run here; the message says why."""


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(hd)) v without a mask; all tensors (b, heads, n, hd), strided views welcome.

    Every token sees every other: the text's padding takes part as well, as in the original (Vaswani et al. 2017,
    eq. 1; CogVideoX, arXiv:2408.06072, section 2.2).
    """
    return F.scaled_dot_product_attention(query, key, value)


def attention_by(name: str, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """`attention` by torch's own choice ("default"), with one of `BACKENDS` first, or by FlashAttention-4 ("flash4").

    Raises:
        AttentionError: "flash4" without its package, or on another device than a GPU that it was written for.
    """
    if name == "flash4":
        from sgm.modules.ops import flash4

        flash4.demand_flash4(device)
        return flash4.flash4_attention
    return attention if name == "default" else partial(_attention_ordered, BACKENDS[name])


def _attention_ordered(order: list[SDPBackend], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel(order, set_priority=True):
        return attention(query, key, value)

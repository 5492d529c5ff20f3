"""The operations of a transformer block that may have more than one implementation, as one record.

`PLAIN` is the PyTorch that defines them; `sgm.modules.ops.fused_block` gives the same results with fewer passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sgm.modules.ops.attention import attention
from sgm.modules.ops.linear import apply_linear
from sgm.modules.ops.modulation import Modulation, RotaryTable, gated_residual, head_norm_rotate, norm_modulate

Heads = tuple[Tensor, Tensor, Tensor]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
GELU_SLOPE = 2 * math.sqrt(2 / math.pi)


def residual_norm(
    hidden: Tensor,
    update: Tensor,
    text_gate: Tensor,
    video_gate: Tensor,
    norm: nn.Module,
    text: Modulation,
    video: Modulation,
    text_length: int,
) -> tuple[Tensor, Tensor]:
    """`gated_residual`, and `norm_modulate` of its result: the end of one sublayer and the start of the next."""
    hidden = gated_residual(hidden, update, text_gate, video_gate, text_length)
    return hidden, norm_modulate(hidden, norm, text, video, text_length)


def split_heads(
    qkv: Tensor,
    head_width: int,
    query_norm: nn.Module | None,
    key_norm: nn.Module | None,
    rotary: RotaryTable | None,
    text_length: int,
) -> Heads:
    """Query, key and value (b, n, h, hd), the first two normalised and rotated, of (b, n, 3 h hd).

    The last axis of `qkv` is the thirds q, k, v, each with its heads one after the other. Without gradients the buffer
    may be overwritten: its caller has no further use of it.
    """
    query, key, value = qkv.unflatten(-1, (3, -1, head_width)).unbind(2)
    query = head_norm_rotate(query, query_norm, rotary, text_length)
    key = head_norm_rotate(key, key_norm, rotary, text_length)
    return query, key, value


def linear_gelu(linear: nn.Module, x: Tensor) -> Tensor:
    """GELU in its tanh form (Hendrycks and Gimpel 2016, arXiv:1606.08415, section 2) of linear(x)."""
    x = apply_linear(linear, x)
    if x.device.type == "cpu" and x.dtype == torch.float32:
        return _GeluBySigmoid.apply(x)
    return F.gelu(x, approximate="tanh")


class _GeluBySigmoid(torch.autograd.Function):
    """The same as x sigmoid(2u), since (1 + tanh u) / 2 = sigmoid(2u): PyTorch's tanh is slow on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        # 2u = x (slope + 0.044715 slope x^2)
        gate = torch.addcmul(x.new_tensor(GELU_SLOPE), x, x, value=0.044715 * GELU_SLOPE)
        return gate.mul_(x).sigmoid_().mul_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")


class BlockOps(NamedTuple):
    """One implementation of each operation; signatures and results are those of the plain ones."""

    norm_modulate: Callable[..., Tensor] = norm_modulate
    residual_norm: Callable[..., tuple[Tensor, Tensor]] = residual_norm
    gated_residual: Callable[..., Tensor] = gated_residual
    split_heads: Callable[..., Heads] = split_heads
    linear: Callable[[nn.Module, Tensor], Tensor] = apply_linear
    linear_gelu: Callable[[nn.Module, Tensor], Tensor] = linear_gelu
    attention: Attention = attention


PLAIN = BlockOps()

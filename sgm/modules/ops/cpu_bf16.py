"""Matrix products and convolutions in bfloat16 on a CPU that has instructions for them; all else stays float32.

On such a CPU a product takes half the time. Products add up in float32 and are rounded to bfloat16; the residual
stream, norms, modulation and gradients of weights are float32, as in mixed precision on a GPU.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgm.modules.ops import vae
from sgm.modules.ops.block_ops import apply_linear
from sgm.modules.ops.block_ops import attention as any_attention

HALF = torch.bfloat16
LARGEST_SCORES = 2**26
"""Attention scores (b heads n^2) that are held at once; for more, PyTorch's own attention, which holds none."""


def has_bf16_products() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX)."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x), adapters included, as bfloat16."""
    with torch.autocast("cpu", HALF):
        return apply_linear(layer, x)


def linear_gelu(layer: nn.Module, x: Tensor) -> Tensor:
    """GELU in its tanh form of layer(x), as bfloat16."""
    return F.gelu(linear(layer, x), approximate="tanh")


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`sgm.modules.ops.block_ops.attention` as two products: PyTorch's is no faster in bfloat16 than in float32.

    A vector taken from all keys changes no softmax; taking their mean halves what rounding the scores to bfloat16 costs
    (Zhang et al. 2024, arXiv:2410.02367, section 4.2).
    """
    b, heads, n, width = query.shape
    query, key, value = (x.to(HALF) for x in (query, key, value))
    if b * heads * n * key.shape[2] > LARGEST_SCORES:
        return any_attention(query, key, value)
    key = key - key.mean(dim=-2, keepdim=True)
    scores = (query * (1 / math.sqrt(width))) @ key.transpose(-1, -2)
    return scores.softmax(dim=-1) @ value


def convolve(conv: vae.Conv, x: Tensor, bare: bool = False, spare: Tensor | None = None) -> Tensor:
    """`sgm.modules.ops.vae.convolve` with the product in bfloat16; its result is float32 again."""
    if x.dtype != torch.float32 or (torch.is_grad_enabled() and (x.requires_grad or conv.weight.requires_grad)):
        return vae.convolve(conv, x, bare, spare)
    bias = None if bare or conv.bias is None else conv.bias.to(HALF)
    y = conv._conv_forward(x.to(HALF), conv.weight.to(HALF), bias)
    return y.float() if spare is None else spare.copy_(y)

"""Attention by FlashAttention-4 (package flash-attn-4): on an H200, at the model's shape, 1.3 times as fast as
cuDNN's. Optional (`HOW_TO_INSTALL`); its kernels are compiled at first use, in seconds.

It is an operator of its own, so that activation checkpointing can keep its result (`sgm.modules.ops.recompute`).
PyTorch's switch for it (`torch.nn.attention.activate_flash_attention_impl`) fails with the releases of the package that
work on Hopper.

Axes: b batch, n tokens, h heads, hd width of a head.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sgm.modules.ops.block_ops import AttentionError, attention

CAPABILITIES = (9, 10)
# What was measured together: flash-attn-4 leaves its compiler's version open, and 4.8.1 warns at every kernel.
# `{cuda}` is "[cu13]", or nothing for a PyTorch with CUDA 12.
HOW_TO_INSTALL = 'pip install "flash-attn-4{cuda}==4.0.0b36" "nvidia-cutlass-dsl{cuda}==4.7.1" "quack-kernels==0.6.5"'
_HALVES = (torch.float16, torch.bfloat16)


def demand_flash4(device: torch.device) -> None:
    """Raises AttentionError: the package is missing, or `device` is not a GPU that it was written for."""
    if device.type != "cuda":
        raise AttentionError(f"the device is {device.type}, and FlashAttention-4 needs an NVIDIA GPU")
    capability = torch.cuda.get_device_capability(device)
    if capability[0] not in CAPABILITIES:
        raise AttentionError(
            f"FlashAttention-4 is for compute capabilities {' and '.join(f'{c}.x' for c in CAPABILITIES)}, and "
            f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}"
        )
    _library()


def flash4_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`sgm.modules.ops.block_ops.attention` of (b, h, n, hd); PyTorch's own where it is not float16 or bfloat16."""
    if query.dtype not in _HALVES:
        return attention(query, key, value)
    mixed, _ = _flash4(*(x.transpose(1, 2) for x in (query, key, value)))
    return mixed.transpose(1, 2)


@cache
def _library() -> ModuleType:
    try:
        return importlib.import_module("flash_attn.cute.interface")
    except ImportError as error:
        how = HOW_TO_INSTALL.format(cuda="" if (torch.version.cuda or "").startswith("12") else "[cu13]")
        raise AttentionError(f"FlashAttention-4 does not load ({error}); {how}") from error


@torch.library.custom_op("cogvideox_sat::flash4", mutates_args=())
def _flash4(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """All (b, n, h, hd) -> the same, and the logarithm of the softmax's sums (b, h, n), float32."""
    mixed, sums = _library().flash_attn_func(query, key, value, return_lse=True)
    return mixed, sums


@torch.library.custom_op("cogvideox_sat::flash4_backward", mutates_args=())
def _flash4_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, mixed: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad_query, grad_key, grad_value = _library()._flash_attn_bwd(query, key, value, mixed, grad, sums)[:3]
    return grad_query, grad_key, grad_value


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return _flash4_backward(grad.contiguous(), *ctx.saved_tensors)


torch.library.register_autograd("cogvideox_sat::flash4", _backward, setup_context=_setup_context)

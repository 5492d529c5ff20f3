"""Fused forms of a block's operations, for GPUs: fewer passes over the sequence, same results within rounding.

Each function here takes and gives what its twin in `block_ops` does, and calls the twin where its kernel does not
apply: tensors off the GPU, gradients wanted, norms or linears that are more than their weights (hooks, adapters).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sgm.modules.ops import block_ops, modulation
from sgm.modules.ops.modulation import Modulation, RotaryTable
from sgm.modules.ops.triton_block import launch_head_norm_rotate, launch_residual_norm
from sgm.modules.ops.triton_support import runs_kernels


def norm_modulate(x: Tensor, norm: nn.Module, text: Modulation, video: Modulation, text_length: int) -> Tensor:
    if not (_is_plain_norm(norm, x) and _fits(x, norm.weight, *text, *video)):
        return modulation.norm_modulate(x, norm, text, video, text_length)
    return launch_residual_norm(x, text_length, None, (norm.weight, norm.bias, norm.eps, text, video))[1]


def gated_residual(hidden: Tensor, update: Tensor, text_gate: Tensor, video_gate: Tensor, text_length: int) -> Tensor:
    if not (_fits(hidden, update, text_gate, video_gate) and update.is_contiguous()):
        return modulation.gated_residual(hidden, update, text_gate, video_gate, text_length)
    return launch_residual_norm(hidden, text_length, (update, text_gate, video_gate), None)[0]


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
    fits = _is_plain_norm(norm, hidden) and _fits(hidden, update, text_gate, video_gate, norm.weight, *text, *video)
    if not (fits and update.is_contiguous()):
        return block_ops.residual_norm(hidden, update, text_gate, video_gate, norm, text, video, text_length)
    parts = (norm.weight, norm.bias, norm.eps, text, video)
    return launch_residual_norm(hidden, text_length, (update, text_gate, video_gate), parts)


def split_heads(
    qkv: Tensor,
    head_width: int,
    query_norm: nn.Module | None,
    key_norm: nn.Module | None,
    rotary: RotaryTable | None,
    text_length: int,
) -> block_ops.Heads:
    """Overwrites `qkv`: query, key and value stay views of one buffer."""
    norms = [norm for norm in (query_norm, key_norm) if norm is not None]
    if not _heads_fit(qkv, head_width, norms):
        return block_ops.split_heads(qkv, head_width, query_norm, key_norm, rotary, text_length)
    if norms or rotary is not None:
        parts = tuple((norm.weight, norm.bias, norm.eps) for norm in norms) or None
        launch_head_norm_rotate(qkv, head_width, parts, rotary, text_length)
    return qkv.unflatten(-1, (3, -1, head_width)).unbind(2)


def linear_gelu(linear: nn.Module, x: Tensor) -> Tensor:
    """The GELU joins the matrix product (cuBLASLt's epilogue, tanh form), which saves two passes over its result."""
    if not (x.is_cuda and _is_plain_linear(linear) and _fits(x, linear.weight, linear.bias)):
        return block_ops.linear_gelu(linear, x)
    flat = torch._addmm_activation(linear.bias, x.flatten(0, -2), linear.weight.t(), use_gelu=True)
    return flat.unflatten(0, x.shape[:-1])


def _heads_fit(qkv: Tensor, head_width: int, norms: list[nn.Module]) -> bool:
    plain = all(_is_plain_norm(norm, qkv) for norm in norms)
    alike = len(norms) != 1 and len({norm.weight is None for norm in norms}) < 2
    return plain and alike and head_width % 2 == 0 and _fits(qkv, *(norm.weight for norm in norms))


def _fits(x: Tensor, *others: Tensor | None) -> bool:
    """Contiguous, where kernels run, one dtype, no autocast, and nothing to record for a backward pass."""
    tensors = [x, *(t for t in others if t is not None)]
    wants_grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    alike = all(t.dtype == x.dtype and t.device == x.device for t in tensors)
    return runs_kernels(x) and x.is_contiguous() and alike and not wants_grad and not torch.is_autocast_enabled()


def _is_plain_norm(norm: nn.Module, x: Tensor) -> bool:
    """A LayerNorm over the last axis, with weight and bias or neither, that nobody watches."""
    if not isinstance(norm, nn.LayerNorm) or len(norm.normalized_shape) != 1 or _is_watched(norm):
        return False
    return (norm.weight is None) == (norm.bias is None)


def _is_plain_linear(linear: nn.Module) -> bool:
    """torch's or SAT's linear layer itself (no adapter, no quantisation), with a bias, that nobody watches."""
    from sat.mpu import ColumnParallelLinear

    if type(linear) is ColumnParallelLinear:
        return not linear.gather_output and linear.bias is not None and not _is_watched(linear)
    return type(linear) is nn.Linear and linear.bias is not None and not _is_watched(linear)


def _is_watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)

"""Fused forms of a block's operations, for GPUs: fewer passes over the sequence, same results within rounding.

Each function here takes and gives what its twin in `block_ops` does, and calls the twin where its kernel does not
apply: tensors off the GPU, autocast, norms or linears that are more than their weights (hooks, adapters). Where
gradients are wanted, `fused_training` has the kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sgm.distributed import model_parallel_world_size
from sgm.modules.ops import block_ops, fused_training, modulation
from sgm.modules.ops.linear import is_plain_linear, is_watched
from sgm.modules.ops.modulation import Modulation, RotaryTable
from sgm.modules.ops.triton_block import launch_head_norm_rotate, launch_residual_norm
from sgm.modules.ops.triton_support import runs_kernels


def norm_modulate(x: Tensor, norm: nn.Module, text: Modulation, video: Modulation, text_length: int) -> Tensor:
    tensors = (x, norm.weight, *text, *video) if _is_plain_norm(norm, x) else ()
    if not _fits(*tensors):
        return modulation.norm_modulate(x, norm, text, video, text_length)
    if _wants_grad(*tensors):
        return fused_training.norm_modulate(x, _values(norm), text, video, text_length)
    return launch_residual_norm(x, text_length, None, (norm.weight, norm.bias, norm.eps, text, video))[1]


def gated_residual(hidden: Tensor, update: Tensor, text_gate: Tensor, video_gate: Tensor, text_length: int) -> Tensor:
    tensors = (hidden, update, text_gate, video_gate)
    if not (_fits(*tensors) and update.is_contiguous()):
        return modulation.gated_residual(*tensors, text_length)
    if _wants_grad(*tensors):
        return fused_training.gated_residual(*tensors, text_length)
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
    residual = (update, text_gate, video_gate)
    tensors = (hidden, *residual, norm.weight, *text, *video) if _is_plain_norm(norm, hidden) else ()
    if not (_fits(*tensors) and update.is_contiguous()):
        return block_ops.residual_norm(hidden, *residual, norm, text, video, text_length)
    if _wants_grad(*tensors):
        return fused_training.residual_norm(hidden, residual, _values(norm), text, video, text_length)
    return launch_residual_norm(hidden, text_length, residual, (*_values(norm), text, video))


def split_heads(
    qkv: Tensor,
    head_width: int,
    query_norm: nn.Module | None,
    key_norm: nn.Module | None,
    rotary: RotaryTable | None,
    text_length: int,
) -> block_ops.Heads:
    """Without gradients overwrites `qkv`: query, key and value stay views of one buffer."""
    norms = [norm for norm in (query_norm, key_norm) if norm is not None]
    if not _heads_fit(qkv, head_width, norms):
        return block_ops.split_heads(qkv, head_width, query_norm, key_norm, rotary, text_length)
    if norms or rotary is not None:
        parts = tuple(_values(norm) for norm in norms) or None
        if _wants_grad(qkv, *(norm.weight for norm in norms)):
            return fused_training.split_heads(qkv, head_width, parts, rotary, text_length)
        launch_head_norm_rotate(qkv, head_width, parts, rotary, text_length)
    return qkv.unflatten(-1, (3, -1, head_width)).unbind(2)


def linear_gelu(linear: nn.Module, x: Tensor) -> Tensor:
    """The GELU joins the matrix product (cuBLASLt's epilogue, tanh form), which saves two passes over its result."""
    tensors = (x, linear.weight, linear.bias) if is_plain_linear(linear) else ()
    if not (x.is_cuda and _fits(*tensors)) or _wants_grad(*tensors):
        return block_ops.linear_gelu(linear, x)
    flat = torch._addmm_activation(linear.bias, x.flatten(0, -2), linear.weight.t(), use_gelu=True)
    return flat.unflatten(0, x.shape[:-1])


def _heads_fit(qkv: Tensor, head_width: int, norms: list[nn.Module]) -> bool:
    plain = all(_is_plain_norm(norm, qkv) for norm in norms)
    if plain and _wants_grad(*(norm.weight for norm in norms)) and model_parallel_world_size() > 1:
        return False  # the norms' own forward adds up their gradients over processes
    alike = len(norms) != 1 and len({norm.weight is None for norm in norms}) < 2
    return plain and alike and head_width % 2 == 0 and _fits(qkv, *(norm.weight for norm in norms))


def _fits(x: Tensor | None = None, *others: Tensor | None) -> bool:
    """Something, contiguous, where kernels run, of one dtype, no autocast."""
    if x is None or not (runs_kernels(x) and x.is_contiguous()) or torch.is_autocast_enabled():
        return False
    return all(t.dtype == x.dtype and t.device == x.device for t in others if t is not None)


def _wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _values(norm: nn.LayerNorm) -> tuple[Tensor | None, Tensor | None, float]:
    return norm.weight, norm.bias, norm.eps


def _is_plain_norm(norm: nn.Module, x: Tensor) -> bool:
    """A LayerNorm over the last axis, with weight and bias or neither, that nobody watches."""
    if not isinstance(norm, nn.LayerNorm) or len(norm.normalized_shape) != 1 or is_watched(norm):
        return False
    return (norm.weight is None) == (norm.bias is None)

"""Fused forms of a block's operations, for GPUs: fewer passes over the sequence, same results within rounding.

Each function here takes and gives what its twin in `block_ops` does, and calls the twin where its kernel does not
apply: tensors off the GPU, autocast, norms or linears that are more than their weights (hooks, adapters). Where
gradients are wanted, `fused_training` has the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeGuard

import torch
from torch import Tensor, nn

from sgm.distributed import model_parallel_world_size
from sgm.modules.ops import block_ops, fused_training, modulation
from sgm.modules.ops.linear import is_plain_linear, is_watched
from sgm.modules.ops.modulation import Modulation, RotaryTable
from sgm.modules.ops.triton_block import ModulatedNorm, NormValues, launch_head_norm_rotate, launch_residual_norm
from sgm.modules.ops.triton_support import runs_kernels


def norm_modulate(x: Tensor, norm: nn.Module, text: Modulation, video: Modulation, text_length: int) -> Tensor:
    if not _is_plain_norm(norm, x) or not _can_fuse(x, norm.weight, *text, *video):
        return modulation.norm_modulate(x, norm, text, video, text_length)
    run = _residual_norm_for(x, norm.weight, *text, *video)
    return run(x, text_length, None, _modulated(norm, text, video))[1]


def gated_residual(hidden: Tensor, update: Tensor, text_gate: Tensor, video_gate: Tensor, text_length: int) -> Tensor:
    tensors = (hidden, update, text_gate, video_gate)
    if not (_can_fuse(*tensors) and update.is_contiguous()):
        return modulation.gated_residual(*tensors, text_length)
    return _residual_norm_for(*tensors)(hidden, text_length, (update, text_gate, video_gate), None)[0]


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
    others = (*residual, *text, *video)
    if not (_is_plain_norm(norm, hidden) and _can_fuse(hidden, norm.weight, *others) and update.is_contiguous()):
        return block_ops.residual_norm(hidden, *residual, norm, text, video, text_length)
    run = _residual_norm_for(hidden, norm.weight, *others)
    return run(hidden, text_length, residual, _modulated(norm, text, video))


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
    if not _are_plain_norms(norms, qkv) or not _can_fuse_heads(qkv, head_width, norms):
        return block_ops.split_heads(qkv, head_width, query_norm, key_norm, rotary, text_length)
    if norms or rotary is not None:
        values = (_norm_values(norms[0]), _norm_values(norms[1])) if norms else None
        if _wants_grad(qkv, *(norm.weight for norm in norms)):
            return fused_training.split_heads(qkv, head_width, values, rotary, text_length)
        launch_head_norm_rotate(qkv, head_width, values, rotary, text_length)
    query, key, value = qkv.unflatten(-1, (3, -1, head_width)).unbind(2)
    return query, key, value


def linear_gelu(linear: nn.Module, x: Tensor) -> Tensor:
    """The GELU joins the matrix product (cuBLASLt's epilogue, tanh form), which saves two passes over its result."""
    if not (x.is_cuda and is_plain_linear(linear) and _can_fuse(x, linear.weight, linear.bias)):
        return block_ops.linear_gelu(linear, x)
    if _wants_grad(x, linear.weight, linear.bias):
        return block_ops.linear_gelu(linear, x)
    flat = torch._addmm_activation(linear.bias, x.flatten(0, -2), linear.weight.t(), use_gelu=True)
    return flat.unflatten(0, x.shape[:-1])


def _can_fuse_heads(qkv: Tensor, head_width: int, norms: Sequence[nn.LayerNorm]) -> bool:
    weights = [norm.weight for norm in norms]
    if _wants_grad(*weights) and model_parallel_world_size() > 1:
        return False  # the norms' own forward adds up their gradients over processes
    alike = len(norms) != 1 and len({weight is None for weight in weights}) < 2
    return alike and head_width % 2 == 0 and _can_fuse(qkv, *weights)


def _can_fuse(x: Tensor, *others: Tensor | None) -> bool:
    """Contiguous x, where kernels run; all of one dtype, no autocast."""
    if not (runs_kernels(x) and x.is_contiguous()) or torch.is_autocast_enabled():
        return False
    return all(t.dtype == x.dtype and t.device == x.device for t in others if t is not None)


def _wants_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _residual_norm_for(*tensors: Tensor | None) -> Callable[..., tuple[Tensor, Tensor]]:
    """`launch_residual_norm`, with gradients where one of its tensors wants any."""
    return fused_training.residual_norm if _wants_grad(*tensors) else launch_residual_norm


def _modulated(norm: nn.LayerNorm, text: Modulation, video: Modulation) -> ModulatedNorm:
    return ModulatedNorm(*_norm_values(norm), text.shift, text.scale, video.shift, video.scale)


def _norm_values(norm: nn.LayerNorm) -> NormValues:
    return norm.weight, norm.bias, norm.eps


def _are_plain_norms(norms: Sequence[nn.Module], x: Tensor) -> TypeGuard[Sequence[nn.LayerNorm]]:
    return all(_is_plain_norm(norm, x) for norm in norms)


def _is_plain_norm(norm: nn.Module, x: Tensor) -> TypeGuard[nn.LayerNorm]:
    """A LayerNorm over the last axis, with weight and bias or neither, that nobody watches."""
    if not isinstance(norm, nn.LayerNorm) or len(norm.normalized_shape) != 1 or is_watched(norm):
        return False
    return (norm.weight is None) == (norm.bias is None)

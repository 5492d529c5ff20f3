"""Fused forms of a block's operations, for GPUs: fewer passes over the sequence, same results within rounding.

Each function here takes and gives what its twin in `block_ops` does, and calls the twin where its kernel does not
apply: tensors off the GPU, autocast, norms or linears that are more than their weights (hooks, adapters). Where a graph
is recorded, each keeps its inputs alone, not what its twin would keep on the way, and has first derivatives only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sgm.distributed import model_parallel_world_size
from sgm.modules.ops import block_ops
from sgm.modules.ops.block_ops import Modulation, RotaryTable, is_plain_linear, is_watched
from sgm.modules.ops.triton_block import (
    ModulatedNorm,
    NormValues,
    Residual,
    launch_head_norm_rotate,
    launch_head_norm_rotate_backward,
    launch_residual_norm,
    launch_residual_norm_backward,
)
from sgm.modules.ops.triton_support import runs_kernels


def norm_modulate(x: Tensor, norm: nn.Module, text: Modulation, video: Modulation, text_length: int) -> Tensor:
    if not _is_plain_norm(norm, x) or not _can_fuse(x, norm.weight, *text, *video):
        return block_ops.norm_modulate(x, norm, text, video, text_length)
    run = _residual_norm_for(x, norm.weight, *text, *video)
    return run(x, text_length, None, _modulated(norm, text, video))[1]


def gated_residual(hidden: Tensor, update: Tensor, text_gate: Tensor, video_gate: Tensor, text_length: int) -> Tensor:
    tensors = (hidden, update, text_gate, video_gate)
    if not (_can_fuse(*tensors) and update.is_contiguous()):
        return block_ops.gated_residual(*tensors, text_length)
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
            query_values, key_values = values or ((), ())
            return _SplitHeads.apply(qkv, head_width, rotary, text_length, *query_values, *key_values)
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
    """`launch_residual_norm`, with gradients where one of its tensors wants any (an absent half is None then)."""

    def recorded(
        hidden: Tensor, text_length: int, residual: Residual | None, norm: ModulatedNorm | None
    ) -> tuple[Tensor, Tensor]:
        return _ResidualNorm.apply(hidden, text_length, *(residual or (None, None, None)), *(norm or ()))

    return recorded if _wants_grad(*tensors) else launch_residual_norm


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


Gradients = tuple[Tensor | None, ...]  # one an argument of `forward`


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        text_length: int,
        update: Any,
        text_gate: Any,
        video_gate: Any,
        *values: Any,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Update and gates are None where there is no residual; `values` are those of a `ModulatedNorm`, or none."""
        residual = None if update is None else (update, text_gate, video_gate)
        norm = ModulatedNorm(*values) if values else None
        summed, normed = launch_residual_norm(hidden, text_length, residual, norm)
        weight, bias, eps, *vectors = norm or (None, None, None)
        ctx.save_for_backward(summed if norm else None, update, text_gate, video_gate, weight, bias, *vectors)
        ctx.text_length, ctx.eps = text_length, eps
        ctx.set_materialize_grads(False)
        return summed if residual else None, normed if norm else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_summed: Any, grad_normed: Any) -> Gradients:
        # read once: where activations are checkpointed each saved tensor can be
        summed, update, text_gate, video_gate, weight, bias, *vectors = ctx.saved_tensors
        grad_summed, grad_normed = (None if g is None else g.contiguous() for g in (grad_summed, grad_normed))
        residual = None if update is None else (update, text_gate, video_gate)
        norm = (weight, ctx.eps, vectors[1], vectors[3]) if vectors else None
        to_hidden, to_update, sums = launch_residual_norm_backward(
            grad_summed, grad_normed, grad_summed if summed is None else summed, residual, norm, ctx.text_length
        )
        gates = zip(sums[:, 2], residual[1:]) if residual else ()
        to_gates = [_vector_gradient(part, gate) for part, gate in gates] or (None, None)
        to_norm = _norm_gradients(sums, weight, bias, vectors) if norm else ()
        return to_hidden, None, to_update, *to_gates, *to_norm


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, width: int, rotary: RotaryTable | None, text_length: int, *values: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`values`: `NormValues` of the queries' norm, then of the keys', or none."""
        norms = (values[:3], values[3:]) if values else None
        weights = values[::3] or (None, None)
        ctx.save_for_backward(qkv, *weights, *(rotary or ()))
        ctx.head_eps, ctx.text_length = values[2::3], text_length
        out = qkv.new_empty((2, *qkv.shape[:2], qkv.shape[2] // (3 * width), width))
        launch_head_norm_rotate(qkv, width, norms, rotary, text_length, out)
        return out[0], out[1], qkv.unflatten(-1, (3, -1, width))[:, :, 2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_query: Tensor, to_key: Tensor, to_value: Tensor) -> Gradients:
        qkv, query_weight, key_weight, *table = ctx.saved_tensors
        norms: Any = tuple(zip((query_weight, key_weight), ctx.head_eps)) or None
        grads = (_with_unit_stride(to_query), _with_unit_stride(to_key), _with_unit_stride(to_value))
        rotary = RotaryTable(*table) if table else None
        to_qkv, sums = launch_head_norm_rotate_backward(qkv, grads, norms, rotary, ctx.text_length)
        if query_weight is None:
            return to_qkv, None, None, None, *(None,) * (6 if norms else 0)
        (query_plain, query_normed), (key_plain, key_normed) = sums.to(query_weight.dtype)
        return to_qkv, None, None, None, query_normed, query_plain, None, key_normed, key_plain, None


def _with_unit_stride(grad: Tensor) -> Tensor:
    """With unit stride along a head's channels."""
    return grad if grad.stride(-1) == 1 else grad.contiguous()


def _norm_gradients(
    sums: Tensor, weight: Tensor | None, bias: Tensor | None, vectors: Sequence[Tensor]
) -> list[Tensor | None]:
    """Gradients of the values of a `ModulatedNorm`, from the kernel's sums."""
    affine = None if weight is None or bias is None else (weight.float(), bias.float())
    to_vectors: list[Tensor] = []
    to_weight: list[Tensor] = []
    to_bias: list[Tensor] = []
    for (plain, normed, _), shift, scale in zip(sums, vectors[::2], vectors[1::2]):  # text, video; each sum (b, d)
        to_scale = normed if affine is None else normed * affine[0] + plain * affine[1]
        to_vectors += [_vector_gradient(plain, shift), _vector_gradient(to_scale, scale)]
        slope = 1 + scale.float().squeeze(1)
        to_weight.append((normed * slope).sum(0))
        to_bias.append((plain * slope).sum(0))
    if weight is None or bias is None:
        return [None, None, None, *to_vectors]
    return [(to_weight[0] + to_weight[1]).to(weight.dtype), (to_bias[0] + to_bias[1]).to(bias.dtype), None, *to_vectors]


def _vector_gradient(total: Tensor, vector: Tensor) -> Tensor:
    """(b, d) as the gradient of a vector (b, 1, d), or of one for all samples."""
    return total[:, None].sum_to_size(vector.shape).to(vector.dtype)

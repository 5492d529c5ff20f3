"""The kernels of `triton_block` with gradients: what `fused_block` calls where a graph is recorded.

Each keeps its inputs alone, not what its plain twin in `block_ops` would keep on the way, and has first derivatives
only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sgm.modules.ops.modulation import RotaryTable
from sgm.modules.ops.triton_block import (
    ModulatedNorm,
    NormValues,
    Residual,
    launch_head_norm_rotate,
    launch_residual_norm,
)
from sgm.modules.ops.triton_block_backward import launch_head_norm_rotate_backward, launch_residual_norm_backward

Gradients = tuple[Tensor | None, ...]  # one an argument of `forward`


def residual_norm(
    hidden: Tensor, text_length: int, residual: Residual | None, norm: ModulatedNorm | None
) -> tuple[Tensor, Tensor]:
    """`launch_residual_norm` with gradients; the result of an absent half is None."""
    return _ResidualNorm.apply(hidden, text_length, *(residual or (None, None, None)), *(norm or ()))


def split_heads(
    qkv: Tensor,
    head_width: int,
    norms: tuple[NormValues, NormValues] | None,
    rotary: RotaryTable | None,
    text_length: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Leaves `qkv` as it is; the value is a view of it."""
    query, key = norms or ((), ())
    return _SplitHeads.apply(qkv, head_width, rotary, text_length, *query, *key)


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
        to_gates = _gate_gradients(sums, residual[1:]) if residual else (None, None)
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


def _gate_gradients(sums: Tensor, gates: Sequence[Tensor]) -> list[Tensor]:
    return [_vector_gradient(part, gate) for part, gate in zip(sums[:, 2], gates)]


def _vector_gradient(total: Tensor, vector: Tensor) -> Tensor:
    """(b, d) as the gradient of a vector (b, 1, d), or of one for all samples."""
    return total[:, None].sum_to_size(vector.shape).to(vector.dtype)

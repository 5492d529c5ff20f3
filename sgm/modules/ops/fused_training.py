"""The fused operations of a transformer block with gradients: what `fused_block` calls where a graph is recorded.

Each keeps its inputs alone, not what its plain twin in `block_ops` would keep on the way, and has first derivatives
only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sgm.modules.ops.autograd import Context
from sgm.modules.ops.modulation import Modulation, RotaryTable
from sgm.modules.ops.triton_block import NormValues, Residual, launch_head_norm_rotate, launch_residual_norm
from sgm.modules.ops.triton_block_backward import launch_head_norm_rotate_backward, launch_residual_norm_backward

Gradients = tuple[Tensor | None, ...]  # one an argument of `forward`


def norm_modulate(x: Tensor, norm: NormValues, text: Modulation, video: Modulation, text_length: int) -> Tensor:
    vectors = (text.shift, text.scale, video.shift, video.scale)
    return _NormModulate.apply(x, *norm, *vectors, text_length)


def gated_residual(hidden: Tensor, update: Tensor, text_gate: Tensor, video_gate: Tensor, text_length: int) -> Tensor:
    return _GatedResidual.apply(hidden, update, text_gate, video_gate, text_length)


def residual_norm(
    hidden: Tensor,
    residual: Residual,
    norm: NormValues,
    text: Modulation,
    video: Modulation,
    text_length: int,
) -> tuple[Tensor, Tensor]:
    """`residual`: update, text gate, video gate."""
    vectors = (text.shift, text.scale, video.shift, video.scale)
    return _ResidualNorm.apply(hidden, *residual, *norm, *vectors, text_length)


def split_heads(
    qkv: Tensor,
    head_width: int,
    norms: tuple[NormValues, NormValues] | None,
    rotary: RotaryTable | None,
    text_length: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Leaves `qkv` as it is; the value is a view of it."""
    (*query, query_eps), (*key, key_eps) = norms or ((None, None, 0.0), (None, None, 0.0))
    head_eps = (query_eps, key_eps) if norms else None
    return _SplitHeads.apply(qkv, head_width, *query, *key, head_eps, rotary, text_length)


class _GateContext(Context, Protocol):
    saved_tensors: tuple[Tensor, Tensor, Tensor]
    text_length: int


class _NormContext(Context, Protocol):
    saved_tensors: tuple[Tensor, Tensor | None, Tensor | None, *tuple[Tensor, ...]]  # x, weight, bias, others
    text_length: int
    eps: float


class _ResidualNormContext(Context, Protocol):
    saved_tensors: tuple[  # the result, weight, bias, update, two gates, others
        Tensor, Tensor | None, Tensor | None, Tensor, Tensor, Tensor, *tuple[Tensor, ...]
    ]
    text_length: int
    eps: float


class _HeadsContext(Context, Protocol):
    saved_tensors: tuple[Tensor, Tensor | None, Tensor | None, *tuple[Tensor, ...]]  # qkv, two weights, rotary table
    text_length: int
    head_eps: tuple[float, float] | None


class _NormModulate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _NormContext,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        text_shift: Tensor,
        text_scale: Tensor,
        video_shift: Tensor,
        video_scale: Tensor,
        text_length: int,
    ) -> Tensor:
        vectors = (text_shift, text_scale, video_shift, video_scale)
        ctx.save_for_backward(x, weight, bias, *vectors)
        ctx.eps, ctx.text_length = eps, text_length
        return launch_residual_norm(x, text_length, None, (weight, bias, eps, *_modulations(vectors)))[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: _NormContext, grad: Tensor) -> Gradients:
        x, weight, bias, *vectors = ctx.saved_tensors
        norm = (weight, ctx.eps, vectors[1], vectors[3])
        to_x, _, sums = launch_residual_norm_backward(None, grad.contiguous(), x, None, norm, ctx.text_length)
        to_weight, to_bias, to_vectors = _norm_gradients(sums, weight, bias, vectors)
        return to_x, to_weight, to_bias, None, *to_vectors, None


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _GateContext, hidden: Tensor, update: Tensor, text_gate: Tensor, video_gate: Tensor, text_length: int
    ) -> Tensor:
        ctx.save_for_backward(update, text_gate, video_gate)
        ctx.text_length = text_length
        return launch_residual_norm(hidden, text_length, (update, text_gate, video_gate), None)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: _GateContext, grad: Tensor) -> Gradients:
        residual, grad = ctx.saved_tensors, grad.contiguous()
        _, to_update, sums = launch_residual_norm_backward(grad, None, grad, residual, None, ctx.text_length)
        return grad, to_update, *_gate_gradients(sums, residual[1:]), None


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _ResidualNormContext,
        hidden: Tensor,
        update: Tensor,
        text_gate: Tensor,
        video_gate: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        text_shift: Tensor,
        text_scale: Tensor,
        video_shift: Tensor,
        video_scale: Tensor,
        text_length: int,
    ) -> tuple[Tensor, Tensor]:
        residual, vectors = (update, text_gate, video_gate), (text_shift, text_scale, video_shift, video_scale)
        norm = (weight, bias, eps, *_modulations(vectors))
        summed, normed = launch_residual_norm(hidden, text_length, residual, norm)
        ctx.save_for_backward(summed, weight, bias, *residual, *vectors)
        ctx.eps, ctx.text_length = eps, text_length
        ctx.set_materialize_grads(False)
        return summed, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: _ResidualNormContext, grad_summed: Tensor | None, grad_normed: Tensor | None) -> Gradients:
        # read once: where activations are checkpointed each saved tensor can be
        summed, weight, bias, update, text_gate, video_gate, *vectors = ctx.saved_tensors
        grad_summed, grad_normed = (None if g is None else g.contiguous() for g in (grad_summed, grad_normed))
        residual, norm = (update, text_gate, video_gate), (weight, ctx.eps, vectors[1], vectors[3])
        to_hidden, to_update, sums = launch_residual_norm_backward(
            grad_summed, grad_normed, summed, residual, norm, ctx.text_length
        )
        to_weight, to_bias, to_vectors = _norm_gradients(sums, weight, bias, vectors)
        to_gates = _gate_gradients(sums, residual[1:])
        return to_hidden, to_update, *to_gates, to_weight, to_bias, None, *to_vectors, None


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _HeadsContext,
        qkv: Tensor,
        width: int,
        query_weight: Tensor | None,
        query_bias: Tensor | None,
        key_weight: Tensor | None,
        key_bias: Tensor | None,
        head_eps: tuple[float, float] | None,
        rotary: RotaryTable | None,
        text_length: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`head_eps`: of the queries' norm and the keys', None: there are none."""
        norms = None
        if head_eps is not None:
            norms = ((query_weight, query_bias, head_eps[0]), (key_weight, key_bias, head_eps[1]))
        ctx.save_for_backward(qkv, query_weight, key_weight, *(rotary or ()))
        ctx.head_eps, ctx.text_length = head_eps, text_length
        out = qkv.new_empty((2, *qkv.shape[:2], qkv.shape[2] // (3 * width), width))
        launch_head_norm_rotate(qkv, width, norms, rotary, text_length, out)
        return out[0], out[1], qkv.unflatten(-1, (3, -1, width))[:, :, 2]

    @staticmethod
    @once_differentiable
    def backward(ctx: _HeadsContext, to_query: Tensor, to_key: Tensor, to_value: Tensor) -> Gradients:
        qkv, query_weight, key_weight, *table = ctx.saved_tensors
        norms = None
        if ctx.head_eps is not None:
            norms = ((query_weight, ctx.head_eps[0]), (key_weight, ctx.head_eps[1]))
        grads = (_with_unit_stride(to_query), _with_unit_stride(to_key), _with_unit_stride(to_value))
        rotary = RotaryTable(*table) if table else None
        to_qkv, sums = launch_head_norm_rotate_backward(qkv, grads, norms, rotary, ctx.text_length)
        if query_weight is None:
            return to_qkv, *(None,) * 8
        (query_plain, query_normed), (key_plain, key_normed) = sums.to(query_weight.dtype)
        return to_qkv, None, query_normed, query_plain, key_normed, key_plain, None, None, None


def _with_unit_stride(grad: Tensor) -> Tensor:
    """With unit stride along a head's channels."""
    return grad if grad.stride(-1) == 1 else grad.contiguous()


def _modulations(vectors: Sequence[Tensor]) -> tuple[Modulation, Modulation]:
    """Of text and of video; the kernels that take them have no use for gates."""
    text_shift, text_scale, video_shift, video_scale = vectors
    return Modulation(text_shift, text_scale, text_shift), Modulation(video_shift, video_scale, video_shift)


def _norm_gradients(
    sums: Tensor, weight: Tensor | None, bias: Tensor | None, vectors: Sequence[Tensor]
) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
    """Gradients of weight and bias (d,), and of shift and scale of text and of video, from the kernel's sums."""
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
        return None, None, to_vectors
    return (to_weight[0] + to_weight[1]).to(weight.dtype), (to_bias[0] + to_bias[1]).to(bias.dtype), to_vectors


def _gate_gradients(sums: Tensor, gates: Sequence[Tensor]) -> list[Tensor]:
    return [_vector_gradient(part, gate) for part, gate in zip(sums[:, 2], gates)]


def _vector_gradient(total: Tensor, vector: Tensor) -> Tensor:
    """(b, d) as the gradient of a vector (b, 1, d), or of one for all samples."""
    return total[:, None].sum_to_size(vector.shape).to(vector.dtype)

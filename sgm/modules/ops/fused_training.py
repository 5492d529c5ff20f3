"""The fused operations of a transformer block with gradients: what `fused_block` calls where a graph is recorded.

Each keeps its inputs alone, not what its plain twin in `block_ops` would keep on the way, and has first derivatives
only.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from sgm.modules.ops.modulation import Modulation, RotaryTable
from sgm.modules.ops.triton_block import launch_head_norm_rotate, launch_residual_norm
from sgm.modules.ops.triton_block_backward import launch_head_norm_rotate_backward, launch_residual_norm_backward

Norm = tuple[Tensor | None, Tensor | None, float]  # weight, bias, eps


def norm_modulate(x: Tensor, norm: Norm, text: Modulation, video: Modulation, text_length: int) -> Tensor:
    vectors = (text.shift, text.scale, video.shift, video.scale)
    return _NormModulate.apply(x, *norm, *vectors, text_length)


def gated_residual(hidden: Tensor, update: Tensor, text_gate: Tensor, video_gate: Tensor, text_length: int) -> Tensor:
    return _GatedResidual.apply(hidden, update, text_gate, video_gate, text_length)


def residual_norm(
    hidden: Tensor,
    residual: tuple[Tensor, Tensor, Tensor],
    norm: Norm,
    text: Modulation,
    video: Modulation,
    text_length: int,
) -> tuple[Tensor, Tensor]:
    """`residual`: update, text gate, video gate."""
    vectors = (text.shift, text.scale, video.shift, video.scale)
    return _ResidualNorm.apply(hidden, *residual, *norm, *vectors, text_length)


def split_heads(
    qkv: Tensor, head_width: int, norms: tuple[Norm, Norm] | None, rotary: RotaryTable | None, text_length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Leaves `qkv` as it is; the value is a view of it."""
    query_norm, key_norm = norms or ((None, None, None), (None, None, None))
    return _SplitHeads.apply(qkv, head_width, *query_norm, *key_norm, rotary, text_length)


class _NormModulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight, bias, eps, *rest) -> Tensor:
        *vectors, text_length = rest
        ctx.save_for_backward(x, weight, bias, *vectors)
        ctx.eps, ctx.text_length = eps, text_length
        return launch_residual_norm(x, text_length, None, (weight, bias, eps, *_modulations(vectors)))[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, *vectors = ctx.saved_tensors
        norm = (weight, ctx.eps, vectors[1], vectors[3])
        to_x, _, sums = launch_residual_norm_backward(None, grad.contiguous(), x, None, norm, ctx.text_length)
        to_weight, to_bias, to_vectors = _norm_gradients(sums, weight, bias, vectors)
        return to_x, to_weight, to_bias, None, *to_vectors, None


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, hidden: Tensor, update, text_gate, video_gate, text_length) -> Tensor:
        ctx.save_for_backward(update, text_gate, video_gate)
        ctx.text_length = text_length
        return launch_residual_norm(hidden, text_length, (update, text_gate, video_gate), None)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        residual, grad = ctx.saved_tensors, grad.contiguous()
        _, to_update, sums = launch_residual_norm_backward(grad, None, grad, residual, None, ctx.text_length)
        return grad, to_update, *_gate_gradients(sums, residual[1:]), None


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, hidden: Tensor, update, text_gate, video_gate, weight, bias, eps, *rest):
        *vectors, text_length = rest
        residual, norm = (update, text_gate, video_gate), (weight, bias, eps, *_modulations(vectors))
        summed, normed = launch_residual_norm(hidden, text_length, residual, norm)
        ctx.save_for_backward(summed, update, text_gate, video_gate, weight, bias, *vectors)
        ctx.eps, ctx.text_length = eps, text_length
        ctx.set_materialize_grads(False)
        return summed, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_summed: Tensor | None, grad_normed: Tensor | None):
        # read once: where activations are checkpointed each saved tensor can be
        summed, update, text_gate, video_gate, weight, bias, *vectors = ctx.saved_tensors
        gates = (text_gate, video_gate)
        grads = (None if g is None else g.contiguous() for g in (grad_summed, grad_normed))
        norm = (weight, ctx.eps, vectors[1], vectors[3])
        to_hidden, to_update, sums = launch_residual_norm_backward(
            *grads, summed, (update, *gates), norm, ctx.text_length
        )
        to_weight, to_bias, to_vectors = _norm_gradients(sums, weight, bias, vectors)
        to_gates = _gate_gradients(sums, gates)
        return to_hidden, to_update, *to_gates, to_weight, to_bias, None, *to_vectors, None


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, qkv: Tensor, width, query_w, query_b, query_eps, key_w, key_b, key_eps, *rest):
        rotary, length = rest
        norms = None if query_eps is None else ((query_w, query_b, query_eps), (key_w, key_b, key_eps))
        ctx.save_for_backward(qkv, query_w, key_w, *(rotary or ()))
        ctx.eps, ctx.text_length = (query_eps, key_eps), length
        out = qkv.new_empty((2, *qkv.shape[:2], qkv.shape[2] // (3 * width), width))
        launch_head_norm_rotate(qkv, width, norms, rotary, length, out)
        return out[0], out[1], qkv.unflatten(-1, (3, -1, width))[:, :, 2]

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        qkv, query_w, key_w, *table = ctx.saved_tensors
        norms = None if ctx.eps[0] is None else tuple(zip((query_w, key_w), ctx.eps))
        grads = tuple(grad if grad.stride(-1) == 1 else grad.contiguous() for grad in grads)
        rotary = RotaryTable(*table) if table else None
        to_qkv, sums = launch_head_norm_rotate_backward(qkv, grads, norms, rotary, ctx.text_length)
        if query_w is None:
            return to_qkv, *(None,) * 9
        (query_plain, query_normed), (key_plain, key_normed) = sums.to(query_w.dtype)
        return to_qkv, None, query_normed, query_plain, None, key_normed, key_plain, None, None, None


def _modulations(vectors: list[Tensor]) -> tuple[Modulation, Modulation]:
    """Of text and of video; the kernels that take them have no use for gates."""
    text_shift, text_scale, video_shift, video_scale = vectors
    return Modulation(text_shift, text_scale, text_shift), Modulation(video_shift, video_scale, video_shift)


def _norm_gradients(
    sums: Tensor, weight: Tensor | None, bias: Tensor | None, vectors: list[Tensor]
) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
    """Gradients of weight and bias (d,), and of shift and scale of text and of video, from the kernel's sums."""
    to_vectors: list[Tensor] = []
    to_weight = to_bias = 0.0
    for (plain, normed, _), shift, scale in zip(sums, vectors[::2], vectors[1::2]):  # text, video; each sum (b, d)
        to_scale = normed if weight is None else normed * weight.float() + plain * bias.float()
        to_vectors += [_like(plain, shift), _like(to_scale, scale)]
        slope = 1 + scale.float().squeeze(1)
        to_weight = to_weight + (normed * slope).sum(0)
        to_bias = to_bias + (plain * slope).sum(0)
    if weight is None:
        return None, None, to_vectors
    return to_weight.to(weight.dtype), to_bias.to(bias.dtype), to_vectors


def _gate_gradients(sums: Tensor, gates: tuple[Tensor, ...] | list[Tensor]) -> list[Tensor]:
    return [_like(part, gate) for part, gate in zip(sums[:, 2], gates)]


def _like(total: Tensor, vector: Tensor) -> Tensor:
    """(b, d) as the gradient of a vector (b, 1, d), or of one for all samples."""
    return total[:, None].sum_to_size(vector.shape).to(vector.dtype)

"""Triton kernels of a transformer block, of its gradients, and of its 8-bit linears. Each is one pass over its tensors,
in float32.

A program of a backward pass goes through many rows and adds up what the vectors (gates, modulations, weights) get from
them; the programs' sums are added by PyTorch, in an order that does not change from run to run.

Axes: b batch, l text tokens, n all tokens (text first), d width, h heads, hd width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sgm.modules.ops.block_ops import RotaryTable
from sgm.modules.ops.triton_support import launch

# The fastest on an H200 at the model's shapes. Tokens that a program of `_residual_norm_kernel` takes, its warps with a
# norm, and without (no sum to share then).
_ROWS, _NORM_WARPS, _GATE_WARPS = 4, 4, 8
# Values that a program of `_head_norm_rotate_kernel` holds, its warps: chosen by what they compile to. Hardly a lane is
# idle at 2B's 60 and 5B's 96 heads, and a value takes 18 instructions, 25 with rotation.
_HEAD_TILE, _HEAD_WARPS = 2048, 4

NormValues = tuple[Tensor | None, Tensor | None, float]  # weight and bias (both or neither), eps
Residual = tuple[Tensor, Tensor, Tensor]  # update (b, n, d), text gate, video gate (b, 1, d)


class ModulatedNorm(NamedTuple):
    """Weight and bias (d,), both or neither, eps, and shift and scale (b, 1, d) of text and of video."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    text_shift: Tensor
    text_scale: Tensor
    video_shift: Tensor
    video_scale: Tensor


@triton.jit
def load_vector(text, video, is_text, at, inside):
    """`at` of the text's vector or of the video's, as float32."""
    if is_text:
        value = tl.load(text + at, mask=inside, other=0.0).to(tl.float32)
    else:
        value = tl.load(video + at, mask=inside, other=0.0).to(tl.float32)
    return value


@triton.jit
def _residual_norm_kernel(
    hidden, update, text_gate, video_gate, weight, bias,
    text_shift, text_scale, video_shift, video_scale, summed, normed,
    n, text_length, d, vector_stride, eps,
    RESIDUAL: tl.constexpr, NORM: tl.constexpr, AFFINE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A program takes ROWS tokens of one sample, all text or all video, and reads their vectors once.

    It goes from token to token, and asks for the next one before it works on this one.
    """
    block, sample = tl.program_id(0), tl.program_id(1)
    text_blocks = tl.cdiv(text_length, ROWS)
    is_text = block < text_blocks
    first = tl.where(is_text, block * ROWS, text_length + (block - text_blocks) * ROWS)
    end = tl.minimum(first + ROWS, tl.where(is_text, text_length, n))
    cols = tl.arange(0, COLS)
    inside = cols < d
    vector = sample.to(tl.int64) * vector_stride + cols
    if RESIDUAL:
        gate = load_vector(text_gate, video_gate, is_text, vector, inside)
    if NORM:  # (y w + b) (1 + scale) + shift = y factor + offset
        factor = 1.0 + load_vector(text_scale, video_scale, is_text, vector, inside)
        offset = load_vector(text_shift, video_shift, is_text, vector, inside)
        if AFFINE:
            offset += tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32) * factor
            factor *= tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    at = (sample.to(tl.int64) * n + first) * d + cols
    next_x = tl.load(hidden + at, mask=inside, other=0.0)
    if RESIDUAL:
        next_step = tl.load(update + at, mask=inside, other=0.0)
    for row in range(first, end):
        x = next_x.to(tl.float32)
        following = cols < tl.where(row + 1 < end, d, 0)
        next_x = tl.load(hidden + at + d, mask=following, other=0.0)
        if RESIDUAL:
            rounded = (x + gate * next_step.to(tl.float32)).to(summed.dtype.element_ty)
            next_step = tl.load(update + at + d, mask=following, other=0.0)
            tl.store(summed + at, rounded, mask=inside)
            x = rounded.to(tl.float32)
        if NORM:
            centred = tl.where(inside, x - tl.sum(x, axis=0) / d, 0.0)
            variance = tl.sum(centred * centred, axis=0) / d
            y = centred * (1.0 / tl.sqrt(variance + eps))
            tl.store(normed + at, (y * factor + offset).to(normed.dtype.element_ty), mask=inside)
        at += d


@triton.jit
def _head_norm_rotate_kernel(
    qkv, out, query_weight, query_bias, key_weight, key_bias, cos, sin,
    tokens, n, text_length, heads, query_eps, key_eps,
    NORM: tl.constexpr, AFFINE: tl.constexpr, ROTATE: tl.constexpr, IN_PLACE: tl.constexpr,
    PARTS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A program takes ROWS of a token's heads, one of PARTS, out of (tokens, 3, heads, WIDTH), and overwrites them.

    Queries and keys lie side by side and are one axis here. Otherwise it writes to `out`, (2, tokens, heads, WIDTH).
    """
    token = tl.program_id(0) // PARTS
    head = tl.program_id(0) % PARTS * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, COLS)
    col_inside = cols < WIDTH
    inside = (head < 2 * heads)[:, None] & col_inside[None, :]
    is_key = (head >= heads)[:, None]
    source = qkv + token.to(tl.int64) * (3 * heads * WIDTH)
    at = head[:, None] * WIDTH + cols[None, :]
    x = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        centred = x - (tl.sum(x, axis=1) / WIDTH)[:, None]
        if COLS > WIDTH:
            centred = tl.where(col_inside[None, :], centred, 0.0)
        eps = tl.where(is_key, key_eps, query_eps)
        x = centred * tl.rsqrt((tl.sum(centred * centred, axis=1) / WIDTH)[:, None] + eps)
        if AFFINE:
            query_w = tl.load(query_weight + cols, mask=col_inside, other=0.0).to(tl.float32)[None, :]
            key_w = tl.load(key_weight + cols, mask=col_inside, other=0.0).to(tl.float32)[None, :]
            query_b = tl.load(query_bias + cols, mask=col_inside, other=0.0).to(tl.float32)[None, :]
            key_b = tl.load(key_bias + cols, mask=col_inside, other=0.0).to(tl.float32)[None, :]
            x = x * tl.where(is_key, key_w, query_w) + tl.where(is_key, key_b, query_b)
    if ROTATE:  # one row of the table for all heads of the token
        place = token % n - text_length
        turns = col_inside & (place >= 0)
        c = tl.load(cos + place * WIDTH + cols, mask=turns, other=1.0).to(tl.float32)[None, :]
        s = tl.load(sin + place * WIDTH + cols, mask=turns, other=0.0).to(tl.float32)[None, :]
        even, odd = tl.split(tl.reshape(x, (ROWS, COLS // 2, 2)))
        x = x * c + tl.reshape(tl.join(-odd, even), (ROWS, COLS)) * s
    if IN_PLACE:
        tl.store(source + at, x.to(out.dtype.element_ty), mask=inside)
    else:
        half = tl.where(is_key, tokens, 0).to(tl.int64) + token
        own = tl.where(is_key, head[:, None] - heads, head[:, None])
        tl.store(out + (half * heads + own) * WIDTH + cols[None, :], x.to(out.dtype.element_ty), mask=inside)


def launch_residual_norm(
    hidden: Tensor, text_length: int, residual: Residual | None, norm: ModulatedNorm | None
) -> tuple[Tensor, Tensor]:
    """(hidden + gate * update, modulated norm of that); an absent half is not computed and its result is `hidden`.

    `hidden` (b, n, d) is contiguous.
    """
    b, n, d = hidden.shape
    cols = triton.next_power_of_2(d)
    update = residual[0] if residual else hidden
    weight, bias, eps = norm[:3] if norm else (None, None, 0.0)
    given = [*(residual[1:] if residual else ()), *(norm[3:] if norm else ())]
    vectors, stride = aligned(given, b, d)
    gates = vectors[:2] if residual else (hidden, hidden)
    modulations = vectors[-4:] if norm else (hidden,) * 4
    summed = torch.empty_like(hidden) if residual else hidden
    normed = torch.empty_like(hidden) if norm else hidden
    blocks = triton.cdiv(text_length, _ROWS) + triton.cdiv(n - text_length, _ROWS)
    launch(
        _residual_norm_kernel, (blocks, b),
        hidden, update, *gates, or_else(weight, hidden), or_else(bias, hidden), *modulations, summed, normed,
        n, text_length, d, stride, eps,
        RESIDUAL=residual is not None, NORM=norm is not None, AFFINE=weight is not None, ROWS=_ROWS, COLS=cols,
        num_warps=_NORM_WARPS if norm else _GATE_WARPS,
    )  # fmt: skip
    return summed, normed


def launch_head_norm_rotate(
    qkv: Tensor,
    head_width: int,
    norms: tuple[NormValues, NormValues] | None,
    rotary: RotaryTable | None,
    text_length: int,
    out: Tensor | None = None,
) -> None:
    """Normalise and rotate queries and keys of qkv (b, n, 3 h hd), contiguous, into `out` (2, b, n, h, hd) or in place.

    `norms` are weight (hd,), bias (hd,) and eps of the queries' norm and of the keys'; both have weights or neither.
    """
    b, n, width = qkv.shape
    heads = width // (3 * head_width)
    cols = triton.next_power_of_2(head_width)
    rows = min(max(1, _HEAD_TILE // cols), triton.next_power_of_2(2 * heads))
    parts = triton.cdiv(2 * heads, rows)
    (query_w, query_b, query_eps), (key_w, key_b, key_eps) = norms or ((None, None, 0.0), (None, None, 0.0))
    cos, sin = (qkv, qkv) if rotary is None else (rotary.cos.contiguous(), rotary.sin.contiguous())
    launch(
        _head_norm_rotate_kernel, (b * n * parts,),
        qkv, or_else(out, qkv), *(or_else(part, qkv) for part in (query_w, query_b, key_w, key_b)), cos, sin,
        b * n, n, text_length, heads, query_eps, key_eps,
        NORM=norms is not None, AFFINE=query_w is not None, ROTATE=rotary is not None,
        IN_PLACE=out is None, PARTS=parts, ROWS=rows, WIDTH=head_width, COLS=cols, num_warps=_HEAD_WARPS,
    )  # fmt: skip


def aligned(vectors: Sequence[Tensor], b: int, d: int) -> tuple[tuple[Tensor, ...], int]:
    """The vectors (b, 1, d) as (b, d) with unit stride along d and one common stride along b, and that stride."""
    flat = tuple(v.expand(b, 1, d).squeeze(1) for v in vectors)
    if len({v.stride(0) for v in flat}) > 1 or any(v.stride(1) != 1 for v in flat):
        flat = tuple(v.contiguous() for v in flat)
    return flat, flat[0].stride(0)


def or_else(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """A kernel's pointer arguments must be tensors also where they are not read."""
    return stand_in if tensor is None else tensor


_TILE = 4096  # values of the sequence that a program of a backward pass holds
_PROGRAMS = 512  # for each sample, or for the queries and for the keys


@triton.jit
def _residual_norm_backward_kernel(
    grad_summed, grad_normed, summed, update, text_gate, video_gate, weight, text_scale, video_scale,
    to_hidden, to_update, sums,
    n, text_length, d, gate_stride, scale_stride, eps, text_programs,
    SUMMED: tl.constexpr, RESIDUAL: tl.constexpr, NORM: tl.constexpr, AFFINE: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A program takes every `count`-th run of ROWS tokens of one sample, all text or all video."""
    program, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    is_text = program < text_programs
    begin = tl.where(is_text, 0, text_length)
    end = tl.where(is_text, text_length, n)
    index = tl.where(is_text, program, program - text_programs)
    count = tl.where(is_text, text_programs, tl.num_programs(0) - text_programs)
    cols = tl.arange(0, COLS)
    col_inside = cols < d
    if NORM:
        slope = 1.0 + load_vector(text_scale, video_scale, is_text, sample * scale_stride + cols, col_inside)[None, :]
        if AFFINE:
            slope = slope * tl.load(weight + cols, mask=col_inside, other=0.0).to(tl.float32)[None, :]
    if RESIDUAL:
        gate = load_vector(text_gate, video_gate, is_text, sample * gate_stride + cols, col_inside)[None, :]
    plain_sum = tl.zeros((COLS,), tl.float32)
    normed_sum = tl.zeros((COLS,), tl.float32)
    gate_sum = tl.zeros((COLS,), tl.float32)
    for block in range(index, tl.cdiv(end - begin, ROWS), count):
        rows = begin + block * ROWS + tl.arange(0, ROWS)
        inside = (rows < end)[:, None] & col_inside[None, :]
        at = (sample * n + rows)[:, None] * d + cols[None, :]
        total = tl.zeros((ROWS, COLS), tl.float32)
        if SUMMED:
            total += tl.load(grad_summed + at, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            x = tl.load(summed + at, mask=inside, other=0.0).to(tl.float32)
            grad = tl.load(grad_normed + at, mask=inside, other=0.0).to(tl.float32)
            centred = tl.where(inside, x - (tl.sum(x, axis=1) / d)[:, None], 0.0)
            inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / d + eps)
            y = centred * inverse[:, None]
            plain_sum += tl.sum(grad, axis=0)
            normed_sum += tl.sum(grad * y, axis=0)
            grad = grad * slope
            mean = (tl.sum(grad, axis=1) / d)[:, None]
            along = (tl.sum(grad * y, axis=1) / d)[:, None]
            total += (grad - mean - y * along) * inverse[:, None]
        tl.store(to_hidden + at, total.to(to_hidden.dtype.element_ty), mask=inside)
        if RESIDUAL:
            step = tl.load(update + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(to_update + at, (total * gate).to(to_update.dtype.element_ty), mask=inside)
            gate_sum += tl.sum(total * step, axis=0)
    out = sums + (sample * tl.num_programs(0) + program) * 3 * d + cols
    tl.store(out, plain_sum, mask=col_inside)
    tl.store(out + d, normed_sum, mask=col_inside)
    tl.store(out + 2 * d, gate_sum, mask=col_inside)


@triton.jit
def _head_norm_rotate_backward_kernel(
    qkv, grad_query, grad_key, query_weight, key_weight, cos, sin, to_qkv, sums,
    tokens, n, text_length, heads, query_eps, key_eps,
    query_b, query_n, query_h, key_b, key_n, key_h,
    NORM: tl.constexpr, AFFINE: tl.constexpr, ROTATE: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A program takes every so many tokens' queries or (second half of the grid) keys, ROWS of the heads at a time."""
    program, is_key = tl.program_id(0), tl.program_id(1)
    cols = tl.arange(0, COLS)
    col_inside = cols < WIDTH
    weight = tl.full((1, COLS), 1.0, tl.float32)
    if is_key == 0:
        eps = query_eps
        grads = grad_query
        if AFFINE:
            weight = tl.load(query_weight + cols, mask=col_inside, other=0.0).to(tl.float32)[None, :]
    else:
        eps = key_eps
        grads = grad_key
        if AFFINE:
            weight = tl.load(key_weight + cols, mask=col_inside, other=0.0).to(tl.float32)[None, :]
    grad_b, grad_n = tl.where(is_key == 0, query_b, key_b), tl.where(is_key == 0, query_n, key_n)
    grad_h = tl.where(is_key == 0, query_h, key_h)
    plain_sum = tl.zeros((ROWS, COLS), tl.float32)  # of the rows at the end, which takes all warps
    normed_sum = tl.zeros((ROWS, COLS), tl.float32)
    for token in range(program, tokens, tl.num_programs(0)):
        place = token % n
        own_grads = grads + tl.cast(token // n, tl.int64) * grad_b + tl.cast(place, tl.int64) * grad_n
        start = tl.cast(token, tl.int64) * (3 * heads * WIDTH) + is_key * heads * WIDTH
        if ROTATE:  # one row of the table for all heads of the token
            turns = col_inside & (place >= text_length)
            angle = (place - text_length) * WIDTH + cols
            c = tl.load(cos + angle, mask=turns, other=1.0).to(tl.float32)[None, :]
            s = tl.load(sin + angle, mask=turns, other=0.0).to(tl.float32)[None, :]
        for first in range(0, heads, ROWS):
            head = first + tl.arange(0, ROWS)
            inside = (head < heads)[:, None] & col_inside[None, :]
            grad_at = head[:, None].to(tl.int64) * grad_h + cols[None, :]
            grad = tl.load(own_grads + grad_at, mask=inside, other=0.0).to(tl.float32)
            if ROTATE:
                even, odd = tl.split(tl.reshape(grad * s, (ROWS, COLS // 2, 2)))
                grad = grad * c + tl.reshape(tl.join(odd, -even), (ROWS, COLS))
            at = head[:, None] * WIDTH + cols[None, :]
            if NORM:
                x = tl.load(qkv + start + at, mask=inside, other=0.0).to(tl.float32)
                centred = x - (tl.sum(x, axis=1) / WIDTH)[:, None]
                if COLS > WIDTH:
                    centred = tl.where(col_inside[None, :], centred, 0.0)
                inverse = tl.rsqrt(tl.sum(centred * centred, axis=1) / WIDTH + eps)
                y = centred * inverse[:, None]
                plain_sum += grad
                normed_sum += grad * y
                grad = grad * weight
                mean = (tl.sum(grad, axis=1) / WIDTH)[:, None]
                along = (tl.sum(grad * y, axis=1) / WIDTH)[:, None]
                grad = (grad - mean - y * along) * inverse[:, None]
            tl.store(to_qkv + start + at, grad.to(to_qkv.dtype.element_ty), mask=inside)
    out = sums + (is_key * tl.num_programs(0) + program) * 2 * WIDTH + cols
    tl.store(out, tl.sum(plain_sum, axis=0), mask=col_inside)
    tl.store(out + WIDTH, tl.sum(normed_sum, axis=0), mask=col_inside)


def launch_residual_norm_backward(
    grad_summed: Tensor | None,
    grad_normed: Tensor | None,
    summed: Tensor,
    residual: Residual | None,
    norm: tuple[Tensor | None, float, Tensor, Tensor] | None,
    text_length: int,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients for hidden and for the update, both (b, n, d), and the vectors' sums, (2, 3, b, d) in float32.

    The sums are for text and video each: of grad_normed, of grad_normed times the norm (without its weight), and of
    the gradient for `summed` times the update.

    Args:
        grad_summed, grad_normed: gradients of the results of `launch_residual_norm`, contiguous; None: zero. Without
            `norm`, grad_normed is None.
        summed: its first result.
        residual: update (b, n, d), text gate, video gate (b, 1, d).
        norm: weight (d,) or None, eps, scale of text and of video (b, 1, d).
    """
    b, n, d = summed.shape
    cols = triton.next_power_of_2(d)
    rows = max(1, _TILE // cols)
    text_programs, programs = _split_programs(triton.cdiv(text_length, rows), triton.cdiv(n - text_length, rows))
    update = residual[0] if residual else summed
    weight, eps = norm[:2] if norm else (None, 0.0)
    gates, gate_stride = aligned(residual[1:], b, d) if residual else ((summed, summed), 0)
    scales, scale_stride = aligned(norm[2:], b, d) if norm else ((summed, summed), 0)
    to_hidden = torch.empty_like(summed)
    to_update = torch.empty_like(summed) if residual else None
    sums = torch.empty((b, programs, 3, d), dtype=torch.float32, device=summed.device)
    launch(
        _residual_norm_backward_kernel, (programs, b),
        or_else(grad_summed, summed), or_else(grad_normed, summed), summed, update, *gates,
        or_else(weight, summed), *scales, to_hidden, or_else(to_update, summed), sums,
        n, text_length, d, gate_stride, scale_stride, eps, text_programs,
        SUMMED=grad_summed is not None, RESIDUAL=residual is not None, NORM=grad_normed is not None,
        AFFINE=weight is not None, ROWS=rows, COLS=cols, num_warps=8,
    )  # fmt: skip
    parts = (sums[:, :text_programs].sum(1), sums[:, text_programs:].sum(1))  # each (b, 3, d)
    return to_hidden, to_update, torch.stack(parts).transpose(1, 2)


def launch_head_norm_rotate_backward(
    qkv: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    norms: tuple[tuple[Tensor | None, float], tuple[Tensor | None, float]] | None,
    rotary: RotaryTable | None,
    text_length: int,
) -> tuple[Tensor, Tensor]:
    """The gradient for qkv (b, n, 3 h hd), and the norms' sums, (2, 2, hd) in float32: queries and keys.

    The sums are of the gradient behind the norm, and of that times the norm (without its weight).

    Args:
        grads: of query, key and value (b, n, h, hd), unit stride along hd.
        norms: weight (hd,) or None and eps of the queries' norm and of the keys'.
    """
    query, key, value = grads
    b, n, heads, width = query.shape
    cols = triton.next_power_of_2(width)
    rows = min(max(1, _HEAD_TILE // cols), triton.next_power_of_2(heads))
    programs = min(_PROGRAMS, b * n)
    (query_w, query_eps), (key_w, key_eps) = norms or ((None, 0.0), (None, 0.0))
    cos, sin = (qkv, qkv) if rotary is None else (rotary.cos.contiguous(), rotary.sin.contiguous())
    result = torch.empty_like(qkv)
    result.unflatten(-1, (3, heads, width))[:, :, 2] = value
    sums = torch.empty((2, programs, 2, width), dtype=torch.float32, device=qkv.device)
    launch(
        _head_norm_rotate_backward_kernel, (programs, 2),
        qkv, query, key, or_else(query_w, qkv), or_else(key_w, qkv), cos, sin, result, sums,
        b * n, n, text_length, heads, query_eps, key_eps, *query.stride()[:3], *key.stride()[:3],
        NORM=norms is not None, AFFINE=query_w is not None, ROTATE=rotary is not None,
        ROWS=rows, WIDTH=width, COLS=cols, num_warps=4,
    )  # fmt: skip
    return result, sums.sum(1)


def _split_programs(text_blocks: int, video_blocks: int) -> tuple[int, int]:
    """Programs for the text, and all programs, so that each has about as many runs of rows; none without rows."""
    whole = text_blocks + video_blocks
    programs = min(_PROGRAMS, whole)
    text = -(-programs * text_blocks // whole)
    return text, text + min(video_blocks, max(1, programs - text))


@triton.jit
def _quantize_rows_kernel(x, codes, scales, k, LARGEST: tl.constexpr, COLS: tl.constexpr):
    """A program takes one row."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, COLS)
    inside = cols < k
    value = tl.load(x + row * k + cols, mask=inside, other=0.0).to(tl.float32)
    scale = tl.div_rn(tl.max(tl.abs(value), axis=0), LARGEST)
    scale = tl.where(scale > 0, scale, 1.0)
    tl.store(scales + row, scale)
    code = tl.minimum(tl.maximum(tl.div_rn(value, scale), -LARGEST), LARGEST)
    tl.store(codes + row * k + cols, code.to(codes.dtype.element_ty), mask=inside)


def launch_quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (m, k), contiguous -> codes e4m3 (m, k) and scales float32 (m,)."""
    m, k = x.shape
    codes = torch.empty(m, k, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(m, dtype=torch.float32, device=x.device)
    cols = triton.next_power_of_2(k)
    launch(
        _quantize_rows_kernel, (m,), x, codes, scales, k, LARGEST=448.0, COLS=cols, num_warps=4 if cols <= 4096 else 8
    )
    return codes, scales

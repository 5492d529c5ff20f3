"""Triton kernels of the 3D VAE, for activations stored channels-last: a pixel's channels lie side by side.

Axes: b batch, c channels, t frames, h w pixels; h' w' pixels of a field, each a block of h/h' x w/w' pixels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_MOST_CHANNELS = 64  # that a program handles: 128 bytes in half precision
_MOMENT_ROWS, _MOMENT_STEPS = 64, 16
_FIELD_TILE = 4096


@triton.jit
def _moments_kernel(
    x, means, squares, rows, channels, batch_stride,
    ROWS: tl.constexpr, COLS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of each channel over ROWS * STEPS pixels, merged as in Chan et al. 1979."""
    chunk, sample = tl.program_id(0), tl.program_id(2)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    mean = tl.zeros((COLS,), tl.float32)
    square = tl.zeros((COLS,), tl.float32)
    seen = 0.0
    for step in range(STEPS):
        first = (chunk * STEPS + step) * ROWS
        row = first + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (cols < channels)[None, :]
        at = sample.to(tl.int64) * batch_stride + row.to(tl.int64)[:, None] * channels + cols[None, :]
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        count = tl.minimum(tl.maximum(rows - first, 0), ROWS).to(tl.float32)
        part_mean = tl.sum(value, axis=0) / tl.maximum(count, 1.0)
        centred = tl.where(inside, value - part_mean[None, :], 0.0)
        share = count / tl.maximum(seen + count, 1.0)
        apart = part_mean - mean
        square += tl.sum(centred * centred, axis=0) + apart * apart * (seen * share)
        mean += apart * share
        seen += count
    out = (sample * tl.num_programs(0) + chunk) * channels + cols
    tl.store(means + out, mean, mask=cols < channels)
    tl.store(squares + out, square, mask=cols < channels)


@triton.jit
def _apply_field_kernel(
    x, out, scale, shift, cells, channels, height, width, field_height, field_width,
    x_b, x_t, x_h, x_w, out_b, out_t, out_h, out_w, field_b, field_t,
    SWISH: tl.constexpr, CELLS: tl.constexpr, REPEAT: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """A cell is REPEAT pixels side by side that share one value of the field, which is read once for all of them."""
    sample = tl.program_id(2).to(tl.int64)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    per_row = width // REPEAT
    column = (cell % per_row) * REPEAT
    row = (cell // per_row) % height
    frame = (cell // per_row // height).to(tl.int64)
    known = (cell < cells)[:, None] & (cols < channels)[None, :]
    place = (row // (height // field_height)) * field_width + column // (width // field_width)
    at = (sample * field_b + frame * field_t + place * channels)[:, None] + cols[None, :]
    a = tl.load(scale + at, mask=known, other=0.0)
    b = tl.load(shift + at, mask=known, other=0.0)
    pixel = column[:, None] + tl.arange(0, REPEAT)[None, :]
    x_at = (sample * x_b + frame * x_t + row * x_h)[:, None] + pixel * x_w
    out_at = (sample * out_b + frame * out_t + row * out_h)[:, None] + pixel * out_w
    inside = known[:, None, :] & (pixel < width)[:, :, None]
    value = tl.load(x + x_at[:, :, None] + cols[None, None, :], mask=inside, other=0.0).to(tl.float32)
    value = value * a[:, None, :] + b[:, None, :]
    if SWISH:
        value = value * tl.sigmoid(value)
    tl.store(out + out_at[:, :, None] + cols[None, None, :], value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add_residual_kernel(h, x, bias, values, channels, h_b, x_b, SIZE: tl.constexpr):
    """h + x + bias in the place of h, over the values of one sample, which lie without gaps."""
    first = tl.program_id(0).to(tl.int64) * SIZE
    at = first + tl.arange(0, SIZE)
    channel = ((first % channels).to(tl.int32) + tl.arange(0, SIZE)) % channels
    sample = tl.program_id(1).to(tl.int64)
    inside = at < values
    total = tl.load(h + sample * h_b + at, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(x + sample * x_b + at, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(h + sample * h_b + at, total.to(h.dtype.element_ty), mask=inside)


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and sum of squared deviations (b, k, c) of k runs of pixels, and the number of pixels of each run (k,).

    x is (b, c, t, h, w), channels-last; the results are float32.
    """
    b, c, t, h, w = x.shape
    rows, run = t * h * w, _MOMENT_ROWS * _MOMENT_STEPS
    runs = triton.cdiv(rows, run)
    block = channel_block(c)
    means, squares = x.new_empty((2, b, runs, c), dtype=torch.float32).unbind(0)
    with torch.cuda.device_of(x):
        _moments_kernel[(runs, triton.cdiv(c, block), b)](
            x, means, squares, rows, c, x.stride(0),
            ROWS=_MOMENT_ROWS, COLS=block, STEPS=_MOMENT_STEPS, num_warps=4,
        )  # fmt: skip
    counts = torch.full((runs,), float(run), device=x.device)
    counts[-1:].fill_(float(rows - run * (runs - 1)))
    return means, squares, counts


def launch_apply_field(x: Tensor, scale: Tensor, shift: Tensor, out: Tensor, swish: bool) -> None:
    """out = x * scale + shift, then swish if asked for; x and out (b, c, t, h, w) with unit stride along c.

    `scale` and `shift` (b, c, t or 1, h', w') are float32, channels-last, with h' and w' that divide h and w.
    """
    b, c, t, h, w = x.shape
    rows, cols = scale.shape[3:]
    repeat = power_of_two_in(w // cols, 16)
    cells = t * h * (w // repeat)
    block = channel_block(c)
    per_program = max(1, _FIELD_TILE // (block * repeat))
    field_t = rows * cols * c if scale.shape[2] > 1 else 0
    with torch.cuda.device_of(x):
        _apply_field_kernel[(triton.cdiv(cells, per_program), triton.cdiv(c, block), b)](
            x, out, scale, shift, cells, c, h, w, rows, cols,
            *(x.stride(axis) for axis in (0, 2, 3, 4)), *(out.stride(axis) for axis in (0, 2, 3, 4)),
            scale.shape[2] * rows * cols * c, field_t,
            SWISH=swish, CELLS=per_program, REPEAT=repeat, COLS=block, num_warps=4,
        )  # fmt: skip


def launch_add_residual(h: Tensor, x: Tensor, bias: Tensor) -> None:
    """h += x + bias; h and x (b, c, t, h, w) channels-last without gaps within a sample, bias (c,)."""
    values = h[0].numel()
    with torch.cuda.device_of(h):
        _add_residual_kernel[(triton.cdiv(values, _FIELD_TILE), h.shape[0])](
            h, x, bias, values, h.shape[1], h.stride(0), x.stride(0), SIZE=_FIELD_TILE, num_warps=8
        )


def channel_block(channels: int) -> int:
    """Channels that a program handles, a power of two."""
    return min(_MOST_CHANNELS, triton.next_power_of_2(channels))


def power_of_two_in(number: int, limit: int) -> int:
    """The largest power of two that divides `number` and is at most `limit` (a power of two)."""
    return min(number & -number, limit)

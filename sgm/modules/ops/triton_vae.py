"""Triton kernels of the 3D VAE, for activations stored channels-last: a pixel's channels lie side by side.

Axes: b batch, c channels, t frames, h w pixels; h' w' pixels of a field, each a block of h/h' x w/w' pixels. For the
gradients of a field, a cell is a rectangle of pixels within one block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sgm.modules.ops.triton_support import launch
from sgm.modules.ops.vae import SAME_FRAMES, FrameMap, Modulation

_MOST_CHANNELS = 64  # that a program handles: 128 bytes in half precision
_MOMENT_ROWS, _MOMENT_STEPS = 64, 16
_MERGE_TILE = 2048
_FIELD_TILE = 4096
_FIELD_PIXELS = 32


@triton.jit
def _moments_kernel(
    x, means, squares, rows, channels, batch_stride,
    ROWS: tl.constexpr, COLS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of each channel over ROWS * STEPS pixels.

    Sums are of deviations from the mean of the first ROWS pixels, so that they do not cancel far from zero.
    """
    chunk, sample = tl.program_id(0), tl.program_id(2)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    first = chunk * (ROWS * STEPS)
    row = first + tl.arange(0, ROWS)
    inside = (row < rows)[:, None] & (cols < channels)[None, :]
    at = sample.to(tl.int64) * batch_stride + row.to(tl.int64)[:, None] * channels + cols[None, :]
    head = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    pivot = tl.sum(head, axis=0) / tl.minimum(rows - first, ROWS).to(tl.float32)
    total = tl.where(inside, head - pivot[None, :], 0.0)
    square = total * total
    for _ in range(1, STEPS):
        row += ROWS
        at += ROWS * channels
        inside = (row < rows)[:, None] & (cols < channels)[None, :]
        apart = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - pivot[None, :]
        apart = tl.where(inside, apart, 0.0)
        total += apart
        square += apart * apart
    count = tl.minimum(rows - first, ROWS * STEPS).to(tl.float32)
    moved = tl.sum(total, axis=0) / count
    out = (sample * tl.num_programs(0) + chunk) * channels + cols
    tl.store(means + out, pivot + moved, mask=cols < channels)
    tl.store(squares + out, tl.sum(square, axis=0) - moved * moved * count, mask=cols < channels)


@triton.jit(do_not_specialize=["rows"])
def _merge_moments_kernel(
    means, squares, added, mean, variance, rows, runs, channels, per_group,
    BIASED: tl.constexpr, RUN_ROWS: tl.constexpr, RUNS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Mean and biased variance of a group of channels over all runs of pixels, in double precision."""
    group, sample = tl.program_id(0), tl.program_id(1)
    col = tl.arange(0, COLS)
    channel = group * per_group + col
    bias = tl.zeros((COLS,), tl.float64)
    if BIASED:
        bias = tl.load(added + channel, mask=col < per_group, other=0.0).to(tl.float64)
    values = rows.to(tl.float64) * per_group
    total = tl.zeros((RUNS, COLS), tl.float64)
    for first in range(0, runs, RUNS):
        run = first + tl.arange(0, RUNS)
        inside = (run < runs)[:, None] & (col < per_group)[None, :]
        count = tl.minimum(rows - run * RUN_ROWS, RUN_ROWS).to(tl.float64)
        at = (sample * runs + run)[:, None] * channels + channel[None, :]
        value = tl.load(means + at, mask=inside, other=0.0).to(tl.float64) + bias[None, :]
        total += tl.where(inside, value * count[:, None], 0.0)
    centre = tl.sum(tl.sum(total, axis=0), axis=0) / values
    total = tl.zeros((RUNS, COLS), tl.float64)
    for first in range(0, runs, RUNS):
        run = first + tl.arange(0, RUNS)
        inside = (run < runs)[:, None] & (col < per_group)[None, :]
        count = tl.minimum(rows - run * RUN_ROWS, RUN_ROWS).to(tl.float64)
        at = (sample * runs + run)[:, None] * channels + channel[None, :]
        apart = tl.load(means + at, mask=inside, other=0.0).to(tl.float64) + bias[None, :] - centre
        square = tl.load(squares + at, mask=inside, other=0.0).to(tl.float64)
        total += tl.where(inside, square + apart * apart * count[:, None], 0.0)
    spread = tl.sum(tl.sum(total, axis=0), axis=0) / values
    out = sample * tl.num_programs(0) + group
    tl.store(mean + out, centre.to(tl.float32))
    tl.store(variance + out, spread.to(tl.float32))


@triton.jit
def _norm_field_kernel(
    mean, variance, weight, bias, added, latent, scale_weight, scale_bias, shift_weight, shift_bias, scale, shift,
    pixels, channels, per_group, eps, height, width, latent_b, latent_k, latent_t, latent_h, latent_w,
    ADDED: tl.constexpr, LATENTS: tl.constexpr, PIXELS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Scale and shift of a group normalisation, times and plus two 1x1x1 convolutions of LATENTS channels (0: none)."""
    sample = tl.program_id(2)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    known = cols < channels
    at = sample * (channels // per_group) + cols // per_group
    a = tl.load(weight + cols, mask=known, other=0.0).to(tl.float32)
    a = a / tl.sqrt(tl.load(variance + at, mask=known, other=1.0) + eps)
    middle = tl.load(mean + at, mask=known, other=0.0)
    if ADDED:
        middle -= tl.load(added + cols, mask=known, other=0.0).to(tl.float32)
    b = tl.load(bias + cols, mask=known, other=0.0).to(tl.float32) - middle * a
    if LATENTS == 0:
        tl.store(scale + sample * channels + cols, a, mask=known)
        tl.store(shift + sample * channels + cols, b, mask=known)
    else:
        pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
        place = pixel // width // height * latent_t + pixel // width % height * latent_h + pixel % width * latent_w
        y = tl.zeros((PIXELS, COLS), tl.float32) + tl.load(scale_bias + cols, mask=known, other=0.0).to(tl.float32)
        z = tl.zeros((PIXELS, COLS), tl.float32) + tl.load(shift_bias + cols, mask=known, other=0.0).to(tl.float32)
        for k in range(LATENTS):
            value = tl.load(latent + sample * latent_b + k * latent_k + place, mask=pixel < pixels, other=0.0)
            value = value.to(tl.float32)[:, None]
            y += value * tl.load(scale_weight + cols * LATENTS + k, mask=known, other=0.0).to(tl.float32)[None, :]
            z += value * tl.load(shift_weight + cols * LATENTS + k, mask=known, other=0.0).to(tl.float32)[None, :]
        out = (sample * pixels + pixel).to(tl.int64)[:, None] * channels + cols[None, :]
        inside = (pixel < pixels)[:, None] & known[None, :]
        tl.store(scale + out, a[None, :] * y, mask=inside)
        tl.store(shift + out, z + b[None, :] * y, mask=inside)


@triton.jit(do_not_specialize=["frame_repeat", "frame_offset"])
def _apply_field_kernel(
    x, out, scale, shift, cells, channels, height, width, field_height, field_width, frame_repeat, frame_offset,
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
    of_field = (frame + frame_offset) // frame_repeat
    at = (sample * field_b + of_field * field_t + place * channels)[:, None] + cols[None, :]
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


@triton.jit(do_not_specialize=["frame_repeat", "frame_offset"])
def _join_phases_kernel(
    parts, out, bias, pixels, channels, height, width, frame_repeat, frame_offset,
    parts_b, parts_t, parts_h, parts_w, out_b, out_t, out_h, out_w,
    PIXELS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Each pixel of `out` from the set of channels that belongs to its row and column, even or odd, plus bias."""
    sample = tl.program_id(2).to(tl.int64)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    column = pixel % width
    row = pixel // width % height
    frame = (pixel // width // height).to(tl.int64)
    inside = (pixel < pixels)[:, None] & (cols < channels)[None, :]
    source = sample * parts_b + (frame + frame_offset) // frame_repeat * parts_t
    source += (row // 2 + row % 2) * parts_h + (column // 2 + column % 2) * parts_w
    source += (row % 2 * 2 + column % 2) * channels
    value = tl.load(parts + source[:, None] + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    value += tl.load(bias + cols, mask=cols < channels, other=0.0).to(tl.float32)[None, :]
    target = sample * out_b + frame * out_t + row * out_h + column * out_w
    tl.store(out + target[:, None] + cols[None, :], value.to(out.dtype.element_ty), mask=inside)


def launch_group_moments(x: Tensor, groups: int, added: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (b, groups), float32, of x (b, c, t, h, w), channels-last, or of x + added (c,)."""
    b, c, t, h, w = x.shape
    rows, run = t * h * w, _MOMENT_ROWS * _MOMENT_STEPS
    runs, block, per_group = triton.cdiv(rows, run), channel_block(c), c // groups
    means, squares = x.new_empty((2, b, runs, c), dtype=torch.float32).unbind(0)
    mean, variance = x.new_empty((2, b, groups), dtype=torch.float32).unbind(0)
    cols = triton.next_power_of_2(per_group)
    launch(
        _moments_kernel, (runs, triton.cdiv(c, block), b),
        x, means, squares, rows, c, x.stride(0),
        ROWS=_MOMENT_ROWS, COLS=block, STEPS=_MOMENT_STEPS, num_warps=4,
    )  # fmt: skip
    launch(
        _merge_moments_kernel, (groups, b),
        means, squares, x if added is None else added, mean, variance, rows, runs, c, per_group,
        BIASED=added is not None, RUN_ROWS=run, RUNS=max(1, _MERGE_TILE // cols), COLS=cols, num_warps=8,
    )  # fmt: skip
    return mean, variance


def launch_norm_field(
    moments: tuple[Tensor, Tensor],
    norm: tuple[Tensor, Tensor, float],
    added: Tensor | None,
    modulation: Modulation | None,
) -> tuple[Tensor, Tensor]:
    """Scale and shift (b, c, t', h', w') of a field, float32, channels-last; see `vae.latent_field`.

    Args:
        moments: mean and variance (b, groups), float32.
        norm: weight (c,), bias (c,), eps.
    """
    (mean, variance), (weight, bias, eps) = moments, norm
    (b, groups), c = mean.shape, weight.shape[0]
    grid = (1, 1, 1) if modulation is None else tuple(modulation.latent.shape[2:])
    scale, shift = mean.new_empty((2, b, *grid, c)).movedim(-1, 2).unbind(0)
    block = channel_block(c)
    convolutions: Sequence[Tensor | None] = (mean,) * 5
    count = 0 if modulation is None else modulation.latent.shape[1]
    strides: Sequence[int] = (0,) * 5
    if modulation is not None:
        latent, convs = modulation.latent, (modulation.to_scale, modulation.to_shift)
        convolutions = (latent, *(part for conv in convs for part in (conv.weight, conv.bias)))
        strides = latent.stride()
    launch(
        _norm_field_kernel, (triton.cdiv(math.prod(grid), _FIELD_PIXELS), triton.cdiv(c, block), b),
        mean, variance, weight, bias, bias if added is None else added, *convolutions, scale, shift,
        math.prod(grid), c, c // groups, eps, *grid[1:], *strides,
        ADDED=added is not None, LATENTS=count, PIXELS=_FIELD_PIXELS, COLS=block, num_warps=4,
    )  # fmt: skip
    return scale, shift


def launch_apply_field(
    x: Tensor, scale: Tensor, shift: Tensor, out: Tensor, swish: bool, frame_map: FrameMap = SAME_FRAMES
) -> None:
    """out = x * scale + shift, then swish if asked for; x and out (b, c, t, h, w) with unit stride along c.

    `scale` and `shift` (b, c, t', h', w') are float32, channels-last, with h' and w' that divide h and w. The map says
    which of their frames serves which of x; one alone serves all.
    """
    b, c, t, h, w = x.shape
    rows, cols = scale.shape[3:]
    repeat = power_of_two_in(w // cols, 16)
    cells = t * h * (w // repeat)
    block = channel_block(c)
    per_program = max(1, _FIELD_TILE // (block * repeat))
    field_t = rows * cols * c if scale.shape[2] > 1 else 0
    launch(
        _apply_field_kernel, (triton.cdiv(cells, per_program), triton.cdiv(c, block), b),
        x, out, scale, shift, cells, c, h, w, rows, cols, *frame_map, *frame_strides(x), *frame_strides(out),
        scale.shape[2] * rows * cols * c, field_t,
        SWISH=swish, CELLS=per_program, REPEAT=repeat, COLS=block, num_warps=4,
    )  # fmt: skip


def launch_join_phases(parts: Tensor, out: Tensor, frame_map: FrameMap, bias: Tensor) -> None:
    """`vae.join_phases` for parts and out with unit stride along c."""
    b, c, t, h, w = out.shape
    block = channel_block(c)
    per_program = _FIELD_TILE // block
    launch(
        _join_phases_kernel, (triton.cdiv(t * h * w, per_program), triton.cdiv(c, block), b),
        parts, out, bias, t * h * w, c, h, w, *frame_map, *frame_strides(parts), *frame_strides(out),
        PIXELS=per_program, COLS=block, num_warps=4,
    )  # fmt: skip


def launch_add_residual(h: Tensor, x: Tensor, bias: Tensor) -> None:
    """h += x + bias; h and x (b, c, t, h, w) channels-last without gaps within a sample, bias (c,)."""
    values = h[0].numel()
    launch(
        _add_residual_kernel, (triton.cdiv(values, _FIELD_TILE), h.shape[0]),
        h, x, bias, values, h.shape[1], h.stride(0), x.stride(0), SIZE=_FIELD_TILE, num_warps=8,
    )  # fmt: skip


def channel_block(channels: int) -> int:
    """Channels that a program handles, a power of two."""
    return min(_MOST_CHANNELS, triton.next_power_of_2(channels))


def power_of_two_in(number: int, limit: int) -> int:
    """The largest power of two that divides `number` and is at most `limit` (a power of two)."""
    return min(number & -number, limit)


def frame_strides(x: Tensor) -> tuple[int, ...]:
    """Strides of x (b, c, t, h, w) along all axes but c."""
    return tuple(x.stride(axis) for axis in (0, 2, 3, 4))


_TILE = 4096
_MOST_SIDE = 8  # pixels, of a cell


@triton.jit(do_not_specialize=["frame_repeat", "frame_offset"])
def _field_gradient_kernel(
    x, grad, scale, shift, to_x, to_scale, to_shift, cells, channels, cell_rows, cell_cols, across_rows, across_cols,
    field_cols, field_b, field_t, frame_repeat, frame_offset,
    x_b, x_t, x_h, x_w, grad_b, grad_t, grad_h, grad_w, out_b, out_t, out_h, out_w,
    SWISH: tl.constexpr, CELLS: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Gradient for x, and for each cell those of its scale and shift, of swish(x * scale + shift) or without swish."""
    sample = tl.program_id(2).to(tl.int64)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)
    column = cell % cell_cols
    row = (cell // cell_cols) % cell_rows
    frame = (cell // cell_cols // cell_rows).to(tl.int64)
    known = (cell < cells)[:, None] & (cols < channels)[None, :]
    place = (row // across_rows) * field_cols + column // across_cols
    of_field = (frame + frame_offset) // frame_repeat
    at = (sample * field_b + of_field * field_t + place * channels)[:, None] + cols[None, :]
    a = tl.load(scale + at, mask=known, other=0.0)[:, None, :]
    b = tl.load(shift + at, mask=known, other=0.0)[:, None, :]
    pixel = tl.arange(0, HIGH * WIDE)
    high = (row * HIGH)[:, None] + (pixel // WIDE)[None, :]
    wide = (column * WIDE)[:, None] + (pixel % WIDE)[None, :]
    inside = known[:, None, :] & (pixel >= 0)[None, :, None]
    x_at = (sample * x_b + frame * x_t)[:, None] + high * x_h + wide * x_w
    grad_at = (sample * grad_b + frame * grad_t)[:, None] + high * grad_h + wide * grad_w
    value = tl.load(x + x_at[:, :, None] + cols[None, None, :], mask=inside, other=0.0).to(tl.float32)
    slope = tl.load(grad + grad_at[:, :, None] + cols[None, None, :], mask=inside, other=0.0).to(tl.float32)
    if SWISH:
        y = value * a + b
        gate = tl.sigmoid(y)
        slope = slope * gate * (1.0 + y * (1.0 - gate))
    out_at = (sample * out_b + frame * out_t)[:, None] + high * out_h + wide * out_w
    tl.store(to_x + out_at[:, :, None] + cols[None, None, :], (slope * a).to(to_x.dtype.element_ty), mask=inside)
    cell_at = (sample * cells + cell)[:, None] * channels + cols[None, :]
    tl.store(to_scale + cell_at, tl.sum(slope * value, axis=1), mask=known)
    tl.store(to_shift + cell_at, tl.sum(slope, axis=1), mask=known)


def field_gradients(
    x: Tensor, grad: Tensor, scale: Tensor, shift: Tensor, swish: bool, frame_map: FrameMap
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for x, scale and shift of swish(x * scale + shift), or of x * scale + shift, given that of the result.

    Args:
        x, grad: (b, c, t, h, w) with unit stride along c.
        scale, shift: (b, c, t', h', w') float32, channels-last; h' and w' divide h and w.
        frame_map: which of their frames serves which of x, for t' > 1.
    """
    b, c, t, h, w = x.shape
    frames, rows, cols = scale.shape[2:]
    high, wide = power_of_two_in(h // rows, _MOST_SIDE), power_of_two_in(w // cols, _MOST_SIDE)
    cell_rows, cell_cols = h // high, w // wide
    cells, block = t * cell_rows * cell_cols, channel_block(c)
    per_program = max(1, _TILE // (block * high * wide))
    to_x = torch.empty_like(x, memory_format=torch.channels_last_3d)
    to_scale, to_shift = x.new_empty((2, b, t, cell_rows, cell_cols, c), dtype=torch.float32).unbind(0)
    launch(
        _field_gradient_kernel, (triton.cdiv(cells, per_program), triton.cdiv(c, block), b),
        x, grad, scale, shift, to_x, to_scale, to_shift, cells, c, cell_rows, cell_cols,
        cell_rows // rows, cell_cols // cols, cols, frames * rows * cols * c, rows * cols * c if frames > 1 else 0,
        *frame_map, *frame_strides(x), *frame_strides(grad), *frame_strides(to_x),
        SWISH=swish, CELLS=per_program, HIGH=high, WIDE=wide, COLS=block, num_warps=4,
    )  # fmt: skip
    return to_x, _sum_cells(to_scale, scale, frame_map), _sum_cells(to_shift, shift, frame_map)


def _sum_cells(parts: Tensor, field: Tensor, frame_map: FrameMap) -> Tensor:
    """Sums of parts (b, t, cell rows, cell columns, c) over what one value of the field serves, in its shape."""
    t, (frames, rows, cols) = parts.shape[1], field.shape[2:]
    parts = parts.unflatten(3, (cols, -1)).unflatten(2, (rows, -1)).sum((3, 5))  # b t h' w' c
    if frames > 1:  # frames that the field has before and behind those of x get nothing
        behind = frames * frame_map.repeat - t - frame_map.offset
        parts = F.pad(parts, (0, 0, 0, 0, 0, 0, frame_map.offset, behind))
    return parts.unflatten(1, (frames, -1)).sum(2).movedim(-1, 1)

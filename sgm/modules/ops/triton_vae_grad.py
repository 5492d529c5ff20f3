"""The Triton kernel for the gradients of a field (`vae.AffineField`), for activations stored channels-last.

Axes: b batch, c channels, t frames, h w pixels; h' w' pixels of a field, each a block of h/h' x w/w' pixels. A cell is
a rectangle of pixels within one block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sgm.modules.ops.triton_support import launch
from sgm.modules.ops.triton_vae import channel_block, frame_strides, power_of_two_in
from sgm.modules.ops.vae import FrameMap

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

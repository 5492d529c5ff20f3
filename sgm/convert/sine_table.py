"""What a sine position table says of the network it was made for: text length, grid, spacing of positions.

A row is [time d/4 | column 3d/8 | row 3d/8], each part all sines, then all cosines, the first frequency being 1; text
rows stand in front and are zero.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sgm.convert.lazy import ConvertError
from sgm.modules.transformer.positions import sincos_axis

_USUAL = (1.0, 1.875)  # of the published models; half precision blurs what the table says


class SineTable(NamedTuple):
    """Text rows in front; latent frames (in patches), token rows and columns; divisors of positions."""

    text_length: int
    frames: int
    rows: int
    columns: int
    spacing: float
    time_spacing: float


def read_sine_table(table: Tensor) -> SineTable:
    """Read a table (l + t*h*w, d) in any floating-point type.

    Raises:
        ConvertError: not such a table, or one with different spacings along height and width.
    """
    width = table.shape[1]
    filled = table.any(dim=-1).nonzero()
    if not len(filled):
        raise ConvertError("the position table is all zeros, which no sine table is; the file is damaged.")
    text = int(filled[0, 0])
    grid = table[text:]
    time, column, row = grid.split((width // 4, width // 8 * 3, width // 8 * 3), dim=1)
    columns = _period(column)
    rows = _period(row[::columns])
    frames = len(grid) // (rows * columns)
    if frames * rows * columns != len(grid):
        raise ConvertError(f"the position table's {len(grid)} rows form no grid of {rows} x {columns} tokens.")
    across, down = _spacing(column[:columns]), _spacing(row[: rows * columns : columns])
    if across and down and across != down:
        raise ConvertError(f"positions are {down} apart in height, {across} in width; diffusers has one for both.")
    found = SineTable(text, frames, rows, columns, across or down or 1.0, _spacing(time[:: rows * columns]) or 1.0)
    _check(grid, found)
    return found


def _check(grid: Tensor, found: SineTable) -> None:
    """Demand the values of the formula, frame by frame, up to the rounding of the table's type."""
    width = grid.shape[1]
    column = sincos_axis(found.columns, width // 8 * 3, found.spacing).expand(found.rows, -1, -1).flatten(0, 1)
    row = sincos_axis(found.rows, width // 8 * 3, found.spacing).repeat_interleave(found.columns, dim=0)
    time = sincos_axis(found.frames, width // 4, found.time_spacing)
    allowed = 4 * torch.finfo(grid.dtype).eps + 1e-6
    for k, frame in enumerate(grid.split(found.rows * found.columns)):
        expected = torch.cat((time[k].expand(len(frame), -1), column, row), dim=1)
        if (frame.double() - expected).abs().max() > allowed:
            raise ConvertError(
                "the position table is not the sine table of its grid (it was trained or changed). Diffusers computes "
                "the table and cannot hold another one."
            )


def _period(part: Tensor) -> int:
    """Rows until the first one comes again; their number if it does not."""
    again = (part[1:] == part[0]).all(dim=-1).nonzero()
    return int(again[0, 0]) + 1 if len(again) else len(part)


def _spacing(axis: Tensor) -> float | None:
    """The divisor of positions, from the angle of frequency 1 at the last position; None for a single position."""
    if len(axis) < 2:
        return None
    sines, cosines = axis[:, 0].double(), axis[:, axis.shape[1] // 2].double()
    steps = torch.atan2(sines, cosines).diff()
    total = torch.remainder(steps, 2 * torch.pi).sum().item()  # each step is between 0 and a full turn
    found = (len(axis) - 1) / total
    return next((usual for usual in _USUAL if abs(found / usual - 1) < 0.005), round(found, 3))

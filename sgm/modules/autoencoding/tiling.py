"""Spatial tiles with blended overlaps: less memory at any frame size, at the price of exactness.

A tile's normalisations see the tile alone, so tiled results differ from whole-frame ones; they are for frames that the
exact means (cut convolutions) cannot fit. All positions are in latent cells; `scale` turns them into result pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tiling:
    """Tiles of height x width latent cells that overlap by at least `overlap` cells.

    Raises:
        ValueError: a size below one cell, or an overlap that is not smaller than the tile.
    """

    height: int
    width: int
    overlap: int

    def __post_init__(self) -> None:
        if min(self.height, self.width) < 1 or not 0 <= self.overlap < min(self.height, self.width):
            raise ValueError(
                f"tiles of {self.height}x{self.width} latent cells cannot overlap by {self.overlap}: "
                "sizes must be positive and the overlap smaller than both."
            )

    def boxes(self, height: int, width: int) -> list[tuple[slice, slice]]:
        """Rows and columns of every tile of a latent of height x width, in reading order; tiles are equally large."""
        rows = tile_spans(height, self.height, self.overlap)
        cols = tile_spans(width, self.width, self.overlap)
        return [(slice(*r), slice(*c)) for r in rows for c in cols]


def tile_spans(length: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """The fewest evenly spread (start, stop) of `tile` cells that cover 0 .. length and overlap by >= `overlap`."""
    if tile >= length:
        return [(0, length)]
    count = -(-(length - overlap) // (tile - overlap))
    starts = [round(k * (length - tile) / (count - 1)) for k in range(count)]
    return [(start, start + tile) for start in starts]


def blend_tiles(
    boxes: Sequence[tuple[slice, slice]],
    render: Callable[[int, slice, slice], Tensor],
    size: tuple[int, int],
    scale: int,
) -> Tensor:
    """Weighted mean of overlapping tiles, the weights falling linearly towards a tile's inner edges.

    Args:
        boxes: rows and columns of each tile, in latent cells.
        render: (index, rows, cols) -> the tile's result (b, c, t, rows * scale, cols * scale).
        size: height and width of the whole in latent cells.
        scale: result cells per latent cell.
    Returns:
        (b, c, t, height * scale, width * scale) in the tiles' dtype.
    """
    sums: tuple[Tensor, Tensor] | None = None
    whole = (size[0] * scale, size[1] * scale)
    for index, (rows, cols) in enumerate(boxes):
        tile = render(index, rows, cols)
        top, left = rows.start * scale, cols.start * scale
        kind = torch.promote_types(tile.dtype, torch.float32)
        sums = sums or (tile.new_zeros((*tile.shape[:3], *whole), dtype=kind), tile.new_zeros(whole, dtype=kind))
        total, weights = sums
        weight = _edge_weights(rows, size[0], tile.shape[3], tile.device)[:, None]
        weight = weight * _edge_weights(cols, size[1], tile.shape[4], tile.device)
        here = (..., slice(top, top + tile.shape[3]), slice(left, left + tile.shape[4]))
        total[here] += tile * weight
        weights[here] += weight
    return (total / weights).to(tile.dtype)


def _edge_weights(span: slice, length: int, cells: int, device: torch.device) -> Tensor:
    """(cells,) weights of a tile along one axis: 1 at the frame's own borders, towards inner edges down to 1/cells."""
    position = torch.arange(1, cells + 1, device=device, dtype=torch.float32)
    from_start = position if span.start > 0 else torch.full_like(position, cells)
    from_end = position.flip(0) if span.stop < length else torch.full_like(position, cells)
    return torch.minimum(from_start, from_end) / cells

"""Optimizer moments in 8 bits: each value is a sign and a power of 2^(1/8), relative to the largest of its block.

All blocks lie on one logarithmic grid (values 2^(e/8), e whole); a block of 256 values stores the largest e it holds
("top"), and a value its distance to that. A window that moves with the block's largest value therefore never shifts the
values that stay. Neighbours on the grid differ by 9 %; a value between two of them goes to either with the probability
that keeps its mean, so that changes smaller than the grid's step (1 - beta2 is 0.001 to 0.05) are not lost. The place
of a linear code (Dettmers et al. 2022, arXiv:2110.02861, whose blocks these are) is taken by a logarithmic one because
the two moments enter the update as a ratio: what counts is their relative error.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

BLOCK = 256
MOST_BLOCKS = 1 << 14  # of one call of `encode`
BYTES_A_MOMENT = 1 + 2 / BLOCK  # a code a value, a top a block
PER_OCTAVE = 8
STEP = 2.0 ** (1 / PER_OCTAVE)
SMALLEST = 2.0**-100  # anything below counts as this (unsigned) or as 0 (signed)
SIGNED_LEVELS, UNSIGNED_LEVELS = 127, 255
# Irrational numbers: their multiples fill [0, 1) evenly, without a random generator whose state would need saving.
_BETWEEN_VALUES, _BETWEEN_CALLS = 0.6180339887498949, 0.7548776662466927


def blocks(count: int) -> int:
    """Blocks that `count` values need."""
    return -(-count // BLOCK)


def empty_codes(count: int, signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """(codes, tops) of `count` zeros: (blocks * 256,) int8 or uint8, and (blocks,) int16."""
    codes = torch.zeros(blocks(count) * BLOCK, dtype=torch.int8 if signed else torch.uint8, device=device)
    return codes, torch.zeros(blocks(count), dtype=torch.int16, device=device)


def decode(codes: Tensor, tops: Tensor) -> Tensor:
    """Values (blocks, 256) in float32 of codes (blocks * 256,) and tops (blocks,)."""
    signed = codes.dtype == torch.int8
    codes = codes.view(-1, BLOCK)
    lowest = (tops[:, None].float() - (SIGNED_LEVELS if signed else UNSIGNED_LEVELS)) / PER_OCTAVE
    values = torch.add(lowest, codes.abs() if signed else codes, alpha=1 / PER_OCTAVE).exp2_()  # eighths: exact
    return values.mul_(codes.sign()) if signed else values.masked_fill_(codes == 0, 0.0)


def encoded_again(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """(codes, tops) of values (n,) that `decode` gave, in blocks of their own.

    Exact but for values that lie below the window of their new block: 65 536 times smaller than its largest they go to
    0, where unsigned and 2^32 times smaller to its lowest place.
    """
    codes, tops = empty_codes(len(values), signed, values.device)
    rows = torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
    place = torch.log2(rows.abs().clamp(min=SMALLEST)).mul_(PER_OCTAVE).round_()
    tops.copy_(place.amax(1))
    place.sub_(tops[:, None] - (SIGNED_LEVELS if signed else UNSIGNED_LEVELS)).clamp_(min=0 if signed else 1)
    codes.copy_(place.mul_(rows.sign()).view(-1))
    return codes, tops


def encode(values: Tensor, codes: Tensor, tops: Tensor, call: int) -> None:
    """Write values (blocks, 256) float32, >= 0 where codes are uint8, into codes and tops; at most MOST_BLOCKS of them.

    Values whose grid place lies below a block's window (65 536 times smaller than its largest, a factor of 2^32 where
    unsigned) go to 0 or to its lowest place, again keeping the mean; unsigned ones that are not 0 never go to 0, since
    they are divisors.

    Args:
        call: number of this call; equal numbers round alike, so a resumed run repeats itself.
    """
    signed = codes.dtype == torch.int8
    levels = SIGNED_LEVELS if signed else UNSIGNED_LEVELS
    sizes = values.abs() if signed else values
    place = _grid_place(sizes, call)
    top = place.amax(1)
    place.sub_(top[:, None] - levels)
    if signed:
        lowest = torch.exp2((top - levels + 1) / PER_OCTAVE)[:, None]
        rise = _dither(sizes, call + 1) < sizes / lowest
        place = torch.where(place < 1, rise, place).mul_(values.sign())
    else:
        place.clamp_(min=1).masked_fill_(sizes == 0, 0.0)
    codes.copy_(place.view(-1))
    tops.copy_(top)


def _grid_place(sizes: Tensor, call: int) -> Tensor:
    """e of 2^(e/8) for each of `sizes` >= 0, one of its two neighbours on the grid."""
    sizes = sizes.clamp(min=SMALLEST)
    below = torch.log2(sizes).mul_(PER_OCTAVE).floor_()
    beyond = sizes.mul_((below * (-1 / PER_OCTAVE)).exp2_()).sub_(1.0)  # 0 to STEP - 1
    return below.add_(_dither(sizes, call).mul_(STEP - 1) < beyond)


def _dither(like: Tensor, call: int) -> Tensor:
    """Numbers in [0, 1) that are even over the values of a call, and over the calls of a value."""
    return (_ramp(str(like.device))[: like.shape[0]] + call * _BETWEEN_CALLS % 1.0).frac_()


@lru_cache(maxsize=2)
def _ramp(device: str) -> Tensor:
    """(MOST_BLOCKS, 256) multiples of an irrational number, without their whole part."""
    ramp = torch.arange(MOST_BLOCKS * BLOCK, dtype=torch.float64).mul_(_BETWEEN_VALUES).frac_()
    return ramp.view(-1, BLOCK).to(device, torch.float32)

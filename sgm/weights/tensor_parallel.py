"""Cutting a whole state dict into the parts of N processes, and putting the parts together again.

The layout is SAT's: column-parallel weights are cut by output rows (`query_key_value` within each of its thirds, so
that every process gets whole heads of q, k and v), row-parallel weights by input columns, with whole biases. LoRA's
matrices follow their linear. Everything else is whole in every part.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sgm.weights.checksums import WeightsError
from sgm.weights.save import Deferred


class Cut(NamedTuple):
    """How a tensor is cut: along `dim`, within each of `blocks` equal blocks."""

    dim: int
    blocks: int = 1


_LAYER = r"(?:^|\.)transformer\.layers\.\d+\."
_CUTS: tuple[tuple[re.Pattern[str], Cut], ...] = tuple(
    (re.compile(_LAYER + pattern + "$"), cut)
    for pattern, cut in (
        (r"attention\.query_key_value\.(?:original\.)?(?:weight|bias)", Cut(0, 3)),
        (r"mlp\.dense_h_to_4h\.(?:original\.)?(?:weight|bias)", Cut(0)),
        (r"(?:attention\.dense|mlp\.dense_4h_to_h)\.(?:original\.)?weight", Cut(1)),
        (r"(?:attention\.query_key_value|mlp\.dense_h_to_4h)\.matrix_B\.\d+", Cut(0)),
        (r"(?:attention\.dense|mlp\.dense_4h_to_h)\.matrix_A\.\d+", Cut(1)),
    )
)


def cut_of(name: str) -> Cut | None:
    """How the tensor of this name is cut; None if every process holds it whole. Any prefix is allowed."""
    return next((cut for pattern, cut in _CUTS if pattern.search(name)), None)


def partition_state(state: Mapping[str, Tensor], rank: int, world: int) -> dict[str, Tensor]:
    """The part of a whole state dict that process `rank` of `world` holds.

    Raises:
        WeightsError: rank outside 0..world-1, or a tensor that `world` does not divide.
    """
    if not 0 <= rank < world:
        raise WeightsError(f"rank {rank} is outside 0..{world - 1}.")
    return {name: _slice_of_rank(name, tensor, rank, world) for name, tensor in state.items()}


def _slice_of_rank(name: str, tensor: Tensor, rank: int, world: int) -> Tensor:
    cut = cut_of(name)
    if cut is None or world == 1:
        return tensor
    if tensor.shape[cut.dim] % (cut.blocks * world):
        raise WeightsError(
            f"{name} {tuple(tensor.shape)} cannot be cut into {world} parts along dimension {cut.dim} "
            f"({cut.blocks} blocks); choose a model_parallel_size that divides it."
        )
    blocks = tensor.chunk(cut.blocks, dim=cut.dim)
    return torch.cat([block.chunk(world, dim=cut.dim)[rank] for block in blocks], dim=cut.dim)


def merge_partitions(states: Sequence[Mapping[str, Tensor]], strict: bool = True) -> dict[str, Tensor]:
    """`join_partitions`, all tensors at once."""
    return {name: value.make() for name, value in join_partitions(states, strict).items()}


def join_partitions(states: Sequence[Mapping[str, Tensor]], strict: bool = True) -> dict[str, Deferred]:
    """The whole state dict of the parts of all processes, in rank order; the inverse of `partition_state`.

    Args:
        strict: tensors that every process holds whole must be equal in all parts; False takes the first part's
            (the original's own tensor-parallel training lets q/k norms drift apart).
    Raises:
        WeightsError: parts with different names; when a tensor is made, (if strict) different values of a whole one.
    """
    first = states[0]
    if len(states) == 1:
        return {name: Deferred.of(tensor) for name, tensor in first.items()}
    for rank, state in enumerate(states):
        if state.keys() != first.keys():
            odd = sorted(state.keys() ^ first.keys())
            raise WeightsError(f"part {rank} and part 0 differ in their names: {', '.join(odd[:6])}.")
    return {name: _join(name, [state[name] for state in states], strict) for name in first}


def _join(name: str, pieces: list[Tensor], strict: bool) -> Deferred:
    cut, first = cut_of(name), pieces[0]
    if cut is not None:
        shape = list(first.shape)
        shape[cut.dim] *= len(pieces)

        def make() -> Tensor:
            blocks = zip(*(piece.chunk(cut.blocks, dim=cut.dim) for piece in pieces), strict=True)
            return torch.cat([piece for block in blocks for piece in block], dim=cut.dim)

        return Deferred(tuple(shape), first.dtype, make)

    def whole() -> Tensor:
        if strict and not all(torch.equal(piece, first) for piece in pieces[1:]):
            raise WeightsError(
                f"{name} is whole on every process but differs between the parts: they are of different checkpoints, "
                "or drifted apart in the original's training (tools/convert_weight_sat2hf.py takes the first part's "
                "with --allow_drift)."
            )
        return first

    return Deferred(tuple(first.shape), first.dtype, whole)

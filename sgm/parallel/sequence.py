"""Sequence parallelism: each process has a share of the joint tokens, and in attention all tokens of some heads.

(Jacobs et al. 2023, DeepSpeed-Ulysses, arXiv:2309.14509.) Shares and heads need not divide evenly: nothing is padded.
Axes: b batch, n all tokens (text first), h heads, hd width of a head, d width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from sgm.modules.ops.block_ops import Attention, RotaryTable
from sgm.modules.transformer.block import NetworkInputs
from sgm.parallel.exchange import ByHeads, ByTokens, Division, Gather, by_heads, by_tokens, shares_of, spans_of

PARTS = 2  # of the heads, whose exchanges and attention follow one another where no gradient is wanted


class SharedTokens:
    """Process `rank` of `size`, which hold the tokens of a forward in shares one behind the other."""

    def __init__(self, rank: int, size: int, group: dist.ProcessGroup):
        self.rank, self.size, self.group = rank, size, group
        self._tokens: list[slice] = []  # of each share, in the present forward

    def own(self, hidden: Tensor, inputs: NetworkInputs) -> tuple[Tensor, NetworkInputs]:
        """This process's tokens of (b, n, d), and what its layers need of them."""
        self._tokens = spans_of(shares_of(hidden.shape[1], self.size))
        own, text = self._tokens[self.rank], inputs.text_length
        rotary = inputs.rotary
        if rotary is not None:
            rotary = RotaryTable(*(part[max(0, own.start - text) : max(0, own.stop - text)] for part in rotary))
        length = min(max(0, text - own.start), own.stop - own.start)
        return hidden[:, own].contiguous(), replace(inputs, text_length=length, rotary=rotary)

    def whole(self, hidden: Tensor) -> Tensor:
        """All tokens again (b, n, d)."""
        return Gather.apply(hidden, self._tokens, self.rank, self.group)

    def attention(self, attend: Attention) -> Attention:
        """`attend` over all tokens, for query, key and value (b, h, n', hd) of this share, by heads in turn."""

        def shared(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            heads = spans_of(shares_of(query.shape[1], self.size))
            division = Division(self.rank, self.group, self._tokens, heads)
            tensors = [x.transpose(1, 2) for x in (query, key, value)]  # as they lie in memory
            if torch.is_grad_enabled():
                spread = ByHeads.apply(division, *tensors)
                mixed = ByTokens.apply(division, _by_last(attend, spread))
            else:
                mixed = _overlapped(attend, tensors, division)
            return mixed.transpose(1, 2)

        return shared


def _overlapped(attend: Attention, tensors: list[Tensor], division: Division) -> Tensor:
    """One part of the heads is under way while attention is computed for another."""
    parts = division.in_parts(PARTS)
    coming = [by_heads(tensors, part) for part in parts]
    mixed = torch.empty_like(tensors[0], memory_format=torch.contiguous_format)
    going = [by_tokens([_by_last(attend, x.finish())], part, [mixed]) for x, part in zip(coming, parts)]
    for x in going:
        x.finish()
    return mixed


def _by_last(attend: Attention, heads: Sequence[Tensor]) -> Tensor:
    """`attend` where heads are the axis before the last."""
    return attend(*(x.transpose(1, 2) for x in heads)).transpose(1, 2)

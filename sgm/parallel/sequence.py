"""Sequence parallelism: each process has a share of the joint tokens, and in attention all tokens of some heads.

(Jacobs et al. 2023, DeepSpeed-Ulysses, arXiv:2309.14509.) Shares and heads need not divide evenly: nothing is padded.
Axes: b batch, n all tokens (text first), h heads, hd width of a head, d width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from sgm.modules.ops.block_ops import Attention
from sgm.modules.ops.modulation import RotaryTable
from sgm.modules.transformer.block import NetworkInputs
from sgm.parallel.exchange import AllToAll, Gather, shares_of


class SharedTokens:
    """Process `rank` of `size`, which hold the tokens of a forward in shares one behind the other."""

    def __init__(self, rank: int, size: int, group: dist.ProcessGroup):
        self.rank, self.size, self.group = rank, size, group
        self._tokens: list[int] = []  # of each share, in the present forward

    def own(self, hidden: Tensor, inputs: NetworkInputs) -> tuple[Tensor, NetworkInputs]:
        """This process's tokens of (b, n, d), and what its layers need of them."""
        self._tokens = shares_of(hidden.shape[1], self.size)
        start = sum(self._tokens[: self.rank])
        stop = start + self._tokens[self.rank]
        text = inputs.text_length
        rotary = inputs.rotary
        if rotary is not None:
            rotary = RotaryTable(*(part[max(0, start - text) : max(0, stop - text)] for part in rotary))
        mine = replace(inputs, text_length=min(max(0, text - start), stop - start), rotary=rotary)
        return hidden[:, start:stop].contiguous(), mine

    def whole(self, hidden: Tensor) -> Tensor:
        """All tokens again (b, n, d)."""
        return Gather.apply(hidden, self._tokens, self.rank, self.group)

    def attention(self, attend: Attention) -> Attention:
        """`attend` over all tokens, for query, key and value (b, h, n', hd) of this share, by heads in turn."""

        def shared(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            heads = shares_of(query.shape[1], self.size)
            mixed = attend(*self._by_heads(torch.stack((query, key, value)), heads))
            return self._by_tokens(mixed, heads)

        return shared

    def _by_heads(self, qkv: Tensor, heads: list[int]) -> tuple[Tensor, ...]:
        """(3, b, h, n', hd) -> query, key and value (b, h', n, hd), in one message to each process."""
        _, b, _, n, hd = qkv.shape
        unit, own = 3 * b * hd, heads[self.rank]
        sent, taken = [unit * n * h for h in heads], [unit * own * k for k in self._tokens]
        flat = AllToAll.apply(qkv.permute(2, 0, 1, 3, 4).reshape(-1), sent, taken, self.group)  # (h, 3, b, n', hd)
        parts = [part.view(own, 3, b, k, hd) for part, k in zip(flat.split(taken), self._tokens)]
        return torch.cat(parts, dim=3).permute(1, 2, 0, 3, 4).unbind(0)

    def _by_tokens(self, mixed: Tensor, heads: list[int]) -> Tensor:
        """(b, h', n, hd) -> (b, h, n', hd)."""
        b, own, _, hd = mixed.shape
        unit, n = b * hd, self._tokens[self.rank]
        sent, taken = [unit * own * k for k in self._tokens], [unit * n * h for h in heads]
        flat = AllToAll.apply(mixed.permute(2, 0, 1, 3).reshape(-1), sent, taken, self.group)  # (n, b, h', hd)
        parts = [part.view(n, b, h, hd) for part, h in zip(flat.split(taken), heads)]
        return torch.cat(parts, dim=2).permute(1, 2, 0, 3)

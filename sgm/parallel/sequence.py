"""Sequence parallelism: each process has a share of the joint tokens, and in attention all tokens of some heads.

(Jacobs et al. 2023, DeepSpeed-Ulysses, arXiv:2309.14509.) Shares and heads need not divide evenly: nothing is padded.
In the exchanges pieces travel as they lie in memory, each tensor and sample of a batch by itself and all in one group
of messages; what a process keeps is copied, not sent.

Axes: b batch, n all tokens (text first), n' those of a process, h all heads, h' those of a process, hd width of a head,
d width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import irecv, isend

from sgm.modules.ops.block_ops import Attention, RotaryTable
from sgm.modules.transformer.block import NetworkInputs

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


# --- exchanges and their gradients ---------------------------------------------------------------------------------


def shares_of(count: int, parts: int) -> list[int]:
    """`count` things over `parts` processes, the first ones with one more where it does not divide."""
    whole, rest = divmod(count, parts)
    return [whole + (k < rest) for k in range(parts)]


def spans_of(sizes: Sequence[int]) -> list[slice]:
    """Where shares of these sizes lie, one behind the other."""
    return [slice(sum(sizes[:k]), sum(sizes[: k + 1])) for k in range(len(sizes))]


@dataclass(frozen=True)
class Division:
    """Which tokens and which heads each process of a group has; `rank` is this one."""

    rank: int
    group: dist.ProcessGroup
    tokens: list[slice]
    heads: list[slice]

    @property
    def own_tokens(self) -> int:
        return _length(self.tokens[self.rank])

    def others(self) -> list[int]:
        return [k for k in range(len(self.tokens)) if k != self.rank]

    def in_parts(self, count: int) -> list[Division]:
        """The same tokens, and of each process's heads a part after the other; just one where they do not suffice."""
        sizes = [shares_of(_length(heads), count) for heads in self.heads]
        if min(map(min, sizes)) == 0:
            return [self]
        parts = []
        for k in range(count):
            starts = [heads.start + sum(size[:k]) for heads, size in zip(self.heads, sizes)]
            heads = [slice(start, start + size[k]) for start, size in zip(starts, sizes)]
            parts.append(Division(self.rank, self.group, self.tokens, heads))
        return parts


@dataclass
class Pending:
    """Messages under way; `finish` waits for them and puts what came where it belongs."""

    results: list[Tensor]
    works: list[dist.Work]
    held: list[Tensor] = field(default_factory=list)  # what is sent, until it is
    put: Callable[[], None] = lambda: None

    def finish(self) -> list[Tensor]:
        for work in self.works:
            work.wait()
        self.held.clear()
        self.put()
        return self.results


def by_heads(tensors: Sequence[Tensor], division: Division) -> Pending:
    """(b, n', h, hd) each, of all heads that `division` names -> (b, n, h', hd)."""
    d, own = division, division.rank
    b, _, _, hd = tensors[0].shape
    results = [x.new_empty(b, d.tokens[-1].stop, _length(d.heads[own]), hd) for x in tensors]
    sent = {k: [x[:, :, d.heads[k]].contiguous() for x in tensors] for k in d.others()}
    taken = {k: [y[:, d.tokens[k]] for y in results] for k in d.others()}
    works = _exchange(sent, taken, d.group)
    for x, y in zip(tensors, results):
        y[:, d.tokens[own]] = x[:, :, d.heads[own]]
    return Pending(results, works, [x for pieces in sent.values() for x in pieces])


def by_tokens(tensors: Sequence[Tensor], division: Division, into: Sequence[Tensor] | None = None) -> Pending:
    """(b, n, h', hd) each -> (b, n', h, hd): new ones, or `into`, of which only the division's heads are written."""
    d, own = division, division.rank
    b, _, _, hd = tensors[0].shape
    whole = [x.contiguous() for x in tensors]
    heads = sum(map(_length, d.heads))
    results = list(into) if into else [x.new_empty(b, d.own_tokens, heads, hd) for x in tensors]
    taken = {k: [x.new_empty(b, d.own_tokens, _length(d.heads[k]), hd) for x in tensors] for k in d.others()}
    works = _exchange({k: [x[:, d.tokens[k]] for x in whole] for k in d.others()}, taken, d.group)

    def put() -> None:
        for k, pieces in {**taken, own: [x[:, d.tokens[own]] for x in whole]}.items():
            for y, piece in zip(results, pieces):
                y[:, :, d.heads[k]] = piece

    return Pending(results, works, list(whole), put)


def _exchange(
    sent: dict[int, list[Tensor]], taken: dict[int, list[Tensor]], group: dist.ProcessGroup
) -> list[dist.Work]:
    """Begin to send and to take tensors by process of the group, sample by sample of their first axis."""
    calls = []
    for kind, call in ((sent, isend), (taken, irecv)):
        for rank, pieces in kind.items():
            peer = dist.get_global_rank(group, rank)
            samples = [sample for piece in pieces for sample in piece]
            calls += [dist.P2POp(call, sample, peer, group, tag) for tag, sample in enumerate(samples)]
    return dist.batch_isend_irecv(calls)


def _length(span: slice) -> int:
    return span.stop - span.start


class ByHeads(torch.autograd.Function):
    """`by_heads` of (query, key, value)."""

    @staticmethod
    def forward(ctx: Any, division: Division, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.division = division
        return tuple(by_heads(tensors, division).finish())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *by_tokens(grads, ctx.division).finish()


class ByTokens(torch.autograd.Function):
    """`by_tokens` of what attention gives."""

    @staticmethod
    def forward(ctx: Any, division: Division, mixed: Tensor) -> Tensor:
        ctx.division = division
        return by_tokens([mixed], division).finish()[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, by_heads([grad], ctx.division).finish()[0]


class Gather(torch.autograd.Function):
    """Shares (b, n', d) of all processes of a group, one behind the other (b, n, d), on each of them.

    Every process goes on with the same whole and the same loss, and each parameter's gradient is the sum over them of
    what their shares give. Who averages over processes afterwards divides that by their number; so the gradient of the
    own share goes back multiplied by it.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, tokens: list[slice], rank: int, group: dist.ProcessGroup) -> Tensor:
        ctx.tokens, ctx.rank = tokens, rank
        whole = own.new_empty(own.shape[0], tokens[-1].stop, own.shape[2])
        others = [k for k in range(len(tokens)) if k != rank]
        held = own.contiguous()
        works = _exchange({k: [held] for k in others}, {k: [whole[:, tokens[k]]] for k in others}, group)
        whole[:, tokens[rank]] = own
        Pending([whole], works, [held]).finish()
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad[:, ctx.tokens[ctx.rank]] * len(ctx.tokens), None, None, None

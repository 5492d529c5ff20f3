"""The exchange that sequence parallelism is made of, with its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def shares_of(count: int, parts: int) -> list[int]:
    """`count` things over `parts` processes, the first ones with one more where it does not divide."""
    whole, rest = divmod(count, parts)
    return [whole + (k < rest) for k in range(parts)]


class AllToAll(torch.autograd.Function):
    """Piece k of `flat` (1-D) to process k of a group; what they sent to this one, behind one another.

    Its gradient goes the other way.
    """

    @staticmethod
    def forward(ctx: Any, flat: Tensor, sent: list[int], taken: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sizes, ctx.group = (sent, taken), group
        return _exchange(flat, sent, taken, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        sent, taken = ctx.sizes
        return _exchange(grad.contiguous(), taken, sent, ctx.group), None, None, None


def _exchange(flat: Tensor, sent: Sequence[int], taken: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    out = flat.new_empty(sum(taken))
    dist.all_to_all_single(out, flat, list(taken), list(sent), group=group)
    return out


class Gather(torch.autograd.Function):
    """Shares (b, n_k, d) of all processes of a group, one behind the other (b, n, d), on each of them.

    Every process goes on with the same whole and the same loss, and each parameter's gradient is the sum over them of
    what their shares give. Who averages over processes afterwards divides that by their number; so the gradient of the
    own share goes back multiplied by it.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, sizes: list[int], rank: int, group: dist.ProcessGroup) -> Tensor:
        ctx.sizes, ctx.rank = sizes, rank
        b, _, d = own.shape
        taken = [b * n * d for n in sizes]
        flat = _exchange(own.reshape(-1).repeat(len(sizes)), [own.numel()] * len(sizes), taken, group)
        return torch.cat([part.view(b, -1, d) for part in flat.split(taken)], dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad.split(ctx.sizes, dim=1)[ctx.rank] * len(ctx.sizes), None, None, None

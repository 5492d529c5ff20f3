"""A clip decoded by several processes, chunk by chunk in turn, with the numbers of one.

A chunk's convolution needs the last frames that the same convolution saw of the chunk before, and nothing else of it.
So while one process computes a layer of chunk k, the next one can compute the layer before of chunk k + 1: chunks go
around, and each process sends these frames on to the one that has the next chunk.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sgm.modules.autoencoding.causal_conv import CausalCache, CausalConv3d, empty, layout_of
from sgm.modules.ops.vae import Activation
from sgm.parallel.team import Team


class PassedOn(CausalCache):
    """The frames of one chunk's convolutions: taken from the process of the chunk before, sent to that of the next."""

    def __init__(self, team: Team, chunk: int):
        super().__init__()
        self._chunk = chunk
        self._before = team.global_rank((team.rank - 1) % team.size)
        self._next = team.global_rank((team.rank + 1) % team.size)
        self._from, self._to = team.edges[team.rank - 1], team.edges[team.rank]
        self._sent: list[tuple[dist.Work, Tensor]] = []

    def take(self, conv: nn.Module, x: Activation | None = None) -> Tensor | None:
        if self._chunk == 0:
            return None
        if not isinstance(conv, CausalConv3d) or x is None:
            raise TypeError("frames from another process go to a causal convolution whose input is known")
        b, c, _, h, w = x.shape
        frames = empty((b, c, conv.front, h, w), x, layout_of(conv.conv.weight))
        dist.recv(_dense(frames), self._before, group=self._from)
        return frames

    def keep(self, conv: nn.Module, frames: Tensor) -> None:
        self._sent = [(work, kept) for work, kept in self._sent if not work.is_completed()]
        sent = _dense(frames)
        work = dist.isend(sent, self._next, group=self._to)
        assert work is not None  # this process is a member of its own edge
        self._sent.append((work, sent))

    def close(self) -> None:
        """Return when all has been taken."""
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()


class SharedChunks:
    """Chunk k of a decode belongs to process k mod `team.size`."""

    def __init__(self, team: Team):
        self.team = team

    def owns(self, chunk: int) -> bool:
        return chunk % self.team.size == self.team.rank

    def cache(self, chunk: int) -> CausalCache:
        return PassedOn(self.team, chunk)

    def collect(self, own: Iterable[Tensor], shapes: Sequence[tuple[int, ...]], device: torch.device) -> list[Tensor]:
        """The pieces of all chunks, uint8 of these shapes, in order, on every process; `own` are this one's."""
        pieces, found = iter(own), []
        for chunk, shape in enumerate(shapes):
            if self.owns(chunk):
                piece = next(pieces).contiguous()
            else:
                piece = torch.empty(shape, dtype=torch.uint8, device=device)
            dist.broadcast(piece, self.team.global_rank(chunk % self.team.size), group=self.team.clip)
            found.append(piece)
        return found


def _dense(frames: Tensor) -> Tensor:
    """The same memory as a contiguous tensor."""
    return frames if frames.is_contiguous() else frames.permute(0, 2, 3, 4, 1)

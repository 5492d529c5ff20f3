"""The autoencoder by several processes: a clip decoded with the numbers of one, and encoded so but for rounding.

A chunk's convolution needs the last frames that the same convolution saw of the chunk before, and nothing else of it.
So while one process decodes a layer of chunk k, the next one can decode the layer before of chunk k + 1: chunks go
around, and each process sends these frames on to the one that has the next chunk. In encoding each process has some of
the latent frames; there a normalisation needs the moments of all frames, too, which go around layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sgm.modules.autoencoding.causal_conv import CausalCache, CausalConv3d, ClipPass, empty, layout_of
from sgm.modules.autoencoding.coders import ContextParallelEncoder3D
from sgm.modules.ops.vae import Activation, merge_moments
from sgm.parallel.sequence import shares_of, spans_of
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


class SharedFrames:
    """Share k of a clip's latent frames belongs to process k of `team`."""

    def __init__(self, team: Team):
        self.team = team

    def takes(self, encoder: ContextParallelEncoder3D, x: Tensor) -> bool:
        """Whether a clip (b, 3, f, h, w) is shared: one with a latent frame for each process, and no gradients."""
        frames, strides = x.shape[2], encoder.strides
        return strides.is_whole(frames) and strides.latent_frames(frames) >= self.team.size

    @torch.no_grad()
    def encode(self, encoder: ContextParallelEncoder3D, x: Tensor, run: ClipPass) -> Tensor:
        """`encoder(x, run)` on every process, which all have x; one that `takes`."""
        team, strides = self.team, encoder.strides
        latents = spans_of(shares_of(strides.latent_frames(x.shape[2]), team.size))
        own = latents[team.rank]
        start = strides.pixel_frames(own.start) if own.start else 0
        cache = PassedOn(team, team.rank)
        shared = replace(
            run, cache=cache, last=team.rank == team.size - 1, ops=run.ops._replace(group_moments=self._moments_by(run))
        )
        part = encoder(x[:, :, start : strides.pixel_frames(own.stop)], shared).contiguous()
        cache.close()
        b, c, _, h, w = part.shape
        parts = [part.new_empty(b, c, span.stop - span.start, h, w) for span in latents]
        parts[team.rank] = part
        for k, piece in enumerate(parts):
            dist.broadcast(piece, team.global_rank(k), group=team.clip)
        return torch.cat(parts, dim=2)

    def _moments_by(self, run: ClipPass) -> Callable[..., tuple[Tensor, Tensor]]:
        """`group_moments` of the frames of all processes."""

        def moments(x: Tensor, groups: int, budget: int, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
            mean, variance = run.ops.group_moments(x, groups, budget, bias)
            own = torch.stack((torch.full_like(mean, x.shape[2]), mean, variance))
            found = [torch.empty_like(own) for _ in range(self.team.size)]
            dist.all_gather(found, own, group=self.team.clip)
            return merge_moments((piece[0], piece[1], piece[2]) for piece in found)

        return moments


def _dense(frames: Tensor) -> Tensor:
    """The same memory as a contiguous tensor."""
    return frames if frames.is_contiguous() else frames.permute(0, 2, 3, 4, 1)

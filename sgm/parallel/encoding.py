"""A clip encoded by several processes, each some of its latent frames, with the result of one but for rounding.

A convolution needs the last frames that the same one saw of the share before, and a normalisation the moments of all
frames: both go from process to process, layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from sgm.modules.autoencoding.causal_conv import ClipPass
from sgm.modules.autoencoding.coders import ContextParallelEncoder3D
from sgm.modules.ops.vae import merge_moments
from sgm.parallel.decoding import PassedOn
from sgm.parallel.exchange import shares_of, spans_of
from sgm.parallel.team import Team


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

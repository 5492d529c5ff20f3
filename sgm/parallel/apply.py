"""What a team of processes does to an engine, from outside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from sgm.models.autoencoder import VideoAutoencoder
from sgm.models.diffusion import SATVideoDiffusionEngine
from sgm.modules.diffusionmodules.sampling import DenoiserFn
from sgm.modules.diffusionmodules.shortcuts import DenoiserCall
from sgm.parallel.first_stage import SharedFrames
from sgm.parallel.sequence import SharedTokens
from sgm.parallel.team import ParallelError, Team

if TYPE_CHECKING:
    from sgm.models.network import DiffusionTransformer  # brings SAT, and with it seconds


def share_network(engine: SATVideoDiffusionEngine, team: Team) -> None:
    """Let `engine`, whose kernels are chosen, compute this process's part of each clip of the team.

    Raises:
        ParallelError: see `check_shares`.
    """
    if team.guidance is not None and team.layout.guidance > 1:
        engine.branches = SharedBranches(team.branch, team.guidance)
    share_encoding(engine.first_stage_model, team)
    share_tokens(engine.network, team)


def share_encoding(stage: object, team: Team) -> None:
    """Let the first stage, where it is the autoencoder, encode clips together with the other processes of the team."""
    if team.size > 1 and isinstance(stage, VideoAutoencoder):
        stage.share = SharedFrames(team)


def share_tokens(network: DiffusionTransformer, team: Team) -> None:
    """As `share_network`, for a network alone."""
    check_shares(network, team.layout.sequence)
    if team.sequence is None or team.layout.sequence == 1:
        return
    tokens = SharedTokens(team.share, team.layout.sequence, team.sequence)
    ops = network.modulation.ops
    network.transformer.share = tokens
    network.use_ops(ops._replace(attention=tokens.attention(ops.attention)))


def most_shares(network: DiffusionTransformer) -> int:
    """How many processes can share the tokens of a network, which may lie on the meta device."""
    return 1 if network.further_configs else _heads(network)


def check_shares(network: DiffusionTransformer, size: int) -> None:
    """Whether `size` processes can share the tokens of a network, which may lie on the meta device.

    Raises:
        ParallelError: it has fewer heads than there are shares, or something in it sees its own tokens only.
    """
    heads = _heads(network)
    if size > heads:
        raise ParallelError(f"args.sequence_parallel_size is {size}, and the network has {heads} heads to share out.")
    if size > 1 and (further := list(network.further_configs)):
        raise ParallelError(
            f"the mixin {further[0]!r} would see the tokens of one process: leave out args.sequence_parallel_size."
        )


def _heads(network: DiffusionTransformer) -> int:
    heads: int = network.transformer.layers[0].attention.num_attention_heads_per_partition
    return heads


class SharedBranches:
    """Process `branch` of two, which both have the whole of x and of the conditions."""

    def __init__(self, branch: int, group: dist.ProcessGroup):
        self.branch, self.group = branch, group

    def around(self, denoiser: DenoiserFn, samples: int) -> DenoiserFn:
        """`denoiser` of which each process computes its branch of a guided call (2b, unconditional half first).

        A call for one branch alone is computed by both.
        """

        def denoise(x: Tensor, signal: Tensor, conditions: Mapping[str, Any], **extras: Any) -> Tensor:
            if x.shape[0] != 2 * samples:
                return denoiser(x, signal, conditions, **extras)
            half = slice(self.branch * samples, (self.branch + 1) * samples)
            call = DenoiserCall(x, signal, conditions, extras).half(half)
            own = denoiser(call.x, call.signal, call.conditions, **call.extras).contiguous()
            both = [torch.empty_like(own) for _ in range(2)]
            dist.all_gather(both, own, group=self.group)
            return torch.cat(both)

        return denoise

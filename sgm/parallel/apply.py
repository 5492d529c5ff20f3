"""What a team of processes does to an engine, from outside."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sgm.models.autoencoder import VideoAutoencoder
from sgm.models.diffusion import SATVideoDiffusionEngine
from sgm.parallel.encoding import SharedFrames
from sgm.parallel.guidance import SharedBranches
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

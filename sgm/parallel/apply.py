"""What a team of processes does to an engine, from outside."""

from __future__ import annotations

from sgm.distributed import model_parallel_world_size
from sgm.models.diffusion import SATVideoDiffusionEngine
from sgm.parallel.guidance import SharedBranches
from sgm.parallel.sequence import SharedTokens
from sgm.parallel.team import ParallelError, Team


def share_network(engine: SATVideoDiffusionEngine, team: Team) -> None:
    """Let `engine`, whose kernels are chosen, compute this process's part of each clip of the team.

    Raises:
        ParallelError: the network has fewer heads than there are shares, or something in it sees its own tokens only.
    """
    if team.guidance is not None and team.layout.guidance > 1:
        engine.branches = SharedBranches(team.branch, team.guidance)
    if team.sequence is None or team.layout.sequence == 1:
        return
    _check(engine, team.layout.sequence)
    tokens = SharedTokens(team.share, team.layout.sequence, team.sequence)
    ops = engine.kernels.block
    engine.network.transformer.share = tokens
    engine.network.use_ops(ops._replace(attention=tokens.attention(ops.attention)))


def _check(engine: SATVideoDiffusionEngine, size: int) -> None:
    transformer = engine.network.transformer
    heads = transformer.layers[0].attention.num_attention_heads_per_partition
    if size > heads:
        raise ParallelError(f"args.sequence_parallel_size is {size}, and the network has {heads} heads to share out.")
    if model_parallel_world_size() > 1:
        raise ParallelError("args.sequence_parallel_size does not go with args.model_parallel_size; choose one.")
    if further := list(engine.network.further_configs):
        raise ParallelError(
            f"the mixin {further[0]!r} would see the tokens of one process: leave out args.sequence_parallel_size."
        )

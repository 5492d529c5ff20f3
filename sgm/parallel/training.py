"""Processes that train on one clip together: the same batches, noise and gradients as one of them alone."""

from __future__ import annotations

from sgm.distributed import ClipGroup, model_parallel_world_size, replica_count, share_clips
from sgm.parallel.team import Layout, ParallelError, Team, form_team


def training_team(size: int) -> Team:
    """This process's team of `size`; from here on its members have the same data. Collective, behind `ensure_groups`.

    Raises:
        ParallelError: the number of processes is no multiple of it.
    """
    count, parts = replica_count(), model_parallel_world_size()
    if count % size:
        raise ParallelError(
            f"args.sequence_parallel_size asks for {size} processes a clip{' and part of the model' * (parts > 1)}, "
            f"and this run has {count}: start a multiple, as in NPROC={size * parts} bash finetune.sh, or leave it out."
        )
    team = form_team(Layout(count // size, 1, size), parts)
    if size > 1:
        share_clips(ClipGroup(size, team.clip, team.global_rank(0)))
    return team

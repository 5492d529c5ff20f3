"""Which processes make a clip together, and their process groups.

Rank ((d g + i) s + j) p + k, of d clips at a time, has branch i of g, share j of s, and part k of p of each weight:
neighbours exchange the most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import TypeVar

import torch.distributed as dist

from sgm.distributed import COLLECTIVE_LIMIT, ClipGroup, model_parallel_world_size, replica_count, share_clips
from sgm.errors import SgmError

T = TypeVar("T")
BRANCHES = 2  # of guidance: unconditional, conditional


class ParallelError(SgmError):
    """The processes of a run cannot be divided as asked; the message says how they can."""


@dataclass(frozen=True)
class Layout:
    """`data` clips at a time, each by `guidance` x `sequence` processes."""

    data: int = 1
    guidance: int = 1
    sequence: int = 1

    @property
    def clip(self) -> int:
        """Processes a clip."""
        return self.guidance * self.sequence

    @property
    def world(self) -> int:
        """Processes in all."""
        return self.data * self.clip

    def __str__(self) -> str:
        parts = {"the two branches of guidance": self.guidance, f"{self.sequence} shares of the tokens": self.sequence}
        shared = " x ".join(name for name, size in parts.items() if size > 1)
        if not shared:
            return f"{self.data} processes make clips of their own"
        return f"{self.clip} processes make a clip together: {shared}"


def choose_layout(
    world: int,
    clips: int,
    guided: bool,
    cfg_parallel: bool | None = None,
    sequence: int | None = None,
    together: int = 1,
    most_shares: int | None = None,
) -> Layout:
    """How `world` processes make `clips` videos.

    What is asked for holds; else there are as many clips at a time as there are clips and processes, and processes that
    are left over share a clip: the branches first, since they exchange least, then the tokens. Where these cannot be
    shared by so many, some processes have nothing to do.

    Args:
        guided: the sampler asks for both branches.
        cfg_parallel: each branch by processes of its own; None: where it helps.
        sequence: processes that share the tokens; 1: never; None: where it helps.
        together: least number of processes a clip (`cp_size`).
        most_shares: most processes that can share the tokens, see `sgm.parallel.apply.most_shares`; None: any number.
    Raises:
        ParallelError: the number of processes is no multiple of what was asked for, there is no second branch, or
            `together` asks for more processes a clip than the others allow.
    """
    if cfg_parallel and not guided:
        raise ParallelError("args.cfg_parallel shares out the branches of guidance, and here is one; leave it out.")
    guidance = BRANCHES if cfg_parallel else 1
    clip = guidance * (sequence or 1)
    most = BRANCHES if sequence == 1 and guided and cfg_parallel is None else clip
    if together > most and (cfg_parallel or sequence):
        raise ParallelError(
            f"cp_size in first_stage_config.params asks for {together} processes a clip, and args.cfg_parallel and "
            f"args.sequence_parallel_size allow {most}: set it to 1, or leave them out."
        )
    if clip > 1:
        if world % clip:
            raise ParallelError(
                f"args.cfg_parallel and args.sequence_parallel_size ask for {clip} processes a clip, and this run has "
                f"{world}: start a multiple, as in NPROC={clip} bash inference.sh, or leave them out."
            )
        return Layout(world // clip, guidance, sequence or 1)
    if sequence == 1:
        most_shares = 1
    if world % max(1, together):
        raise ParallelError(
            f"cp_size in first_stage_config.params asks for {together} processes a clip, and this run has {world}: "
            f"start a multiple, as in NPROC={together} bash inference.sh, or set it to 1."
        )
    teams = [n for n in range(1, world // max(1, together) + 1) if world % n == 0]
    fewest = max(n for n in teams if n <= max(1, clips))
    branches = guided and cfg_parallel is None
    found = [_of_teams(world, n, branches) for n in teams if n >= fewest]
    return next((layout for layout in found if layout.sequence <= (most_shares or world)), found[0])


def _of_teams(world: int, count: int, branches: bool) -> Layout:
    """`count` clips at a time; `branches`: of guidance, which are shared out where their number divides."""
    clip = world // count
    guidance = BRANCHES if branches and clip % BRANCHES == 0 else 1
    return Layout(count, guidance, clip // guidance)


@dataclass(frozen=True)
class Team:
    """This process among those that make a clip together.

    Attributes:
        rank: among them, from 0 to `size` - 1. data_rank: which of the teams this is, out of `layout.data`.
        guidance, sequence, clip: groups of those that hold the other branch, the other shares, and all of the clip.
        edges: for each of them one from it to the next, around; a group of its own for each direction, since what is
            sent waits until it is taken.
        parts, part: of each weight (tensor parallelism). Each part of a clip has a team of its own.
    """

    layout: Layout = Layout()
    rank: int = 0
    data_rank: int = 0
    guidance: dist.ProcessGroup | None = None
    sequence: dist.ProcessGroup | None = None
    clip: dist.ProcessGroup | None = None
    edges: tuple[dist.ProcessGroup, ...] = ()
    parts: int = 1
    part: int = 0

    @property
    def size(self) -> int:
        return self.layout.clip

    @property
    def is_first(self) -> bool:
        """Whether this process writes what the team makes."""
        return self.rank == 0

    @property
    def branch(self) -> int:
        return self.rank // self.layout.sequence

    @property
    def share(self) -> int:
        return self.rank % self.layout.sequence

    def global_rank(self, rank: int) -> int:
        """That of another member."""
        return (self.data_rank * self.size + rank) * self.parts + self.part

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first member makes, on all of them."""
        if self.size == 1:
            return make()
        held = [make() if self.is_first else None]
        dist.broadcast_object_list(held, self.global_rank(0), group=self.clip)
        return held[0]  # type: ignore[return-value]

    @contextmanager
    def together(self) -> Iterator[None]:
        """No member leaves the block before all have come to its end; each raises the `SgmError` of one."""
        met: SgmError | None = None
        try:
            yield
        except SgmError as error:
            met = error
        if self.size > 1:
            told: list[tuple[type[SgmError], str] | None] = [None] * self.size
            dist.all_gather_object(told, met and (type(met), str(met)), group=self.clip)
            for kind, text in filter(None, told):
                met = met or kind.__new__(kind, text)  # some make their text of other arguments
        if met is not None:
            raise met


def form_team(layout: Layout, parts: int = 1) -> Team:
    """Make the groups; all processes of the run call it. Lone processes have none.

    Args:
        parts: processes among which each weight is split, neighbours; `layout` is of those that hold the same part.
    """
    replica, part = divmod(dist.get_rank() if dist.is_initialized() else 0, parts)
    data_rank, own = divmod(replica, layout.clip)
    if layout.clip == 1:
        return Team(layout, own, data_rank, parts=parts, part=part)
    mine: dict[str, list[dist.ProcessGroup]] = {"guidance": [], "sequence": [], "clip": [], "edges": []}
    for d, p in product(range(layout.data), range(parts)):
        members = range(d * layout.clip * parts + p, (d + 1) * layout.clip * parts, parts)
        for kind, ranks in _groups(layout, members):
            made = dist.new_group(sorted(ranks), timeout=COLLECTIVE_LIMIT)
            if dist.get_rank() in (members if kind == "edges" else ranks):
                mine[kind].append(made)
    (guidance,), (sequence,), (clip,) = mine["guidance"], mine["sequence"], mine["clip"]
    return Team(layout, own, data_rank, guidance, sequence, clip, tuple(mine["edges"]), parts, part)


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


def _groups(layout: Layout, members: Sequence[int]) -> list[tuple[str, Sequence[int]]]:
    """What each group of a team is for, and its ranks."""
    return [
        *(("guidance", members[j :: layout.sequence]) for j in range(layout.sequence)),
        *(("sequence", members[i : i + layout.sequence]) for i in range(0, layout.clip, layout.sequence)),
        ("clip", members),
        *(("edges", (members[k], members[(k + 1) % layout.clip])) for k in range(layout.clip)),
    ]

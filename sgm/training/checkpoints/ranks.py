"""The processes of a run, also where there is but one and no process group."""

from __future__ import annotations

from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def own_rank() -> tuple[int, int]:
    """(rank, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if _has_group() else (0, 1)


def gather(value: T) -> list[T]:
    """`value` of every rank, in order, on every rank."""
    if not _has_group():
        return [value]
    held: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(held, value)
    return held


def _has_group() -> bool:
    return dist.is_available() and dist.is_initialized()

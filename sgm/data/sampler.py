"""In which order clips are trained on: endless, repeatable, resumable, shared out among data-parallel ranks.

All ranks walk along one stream of clip numbers; rank r of w takes the positions r, r + w, r + 2w, ... The stream
depends on the seed and the sizes of the data sets only, so neither the number of workers nor that of ranks changes it,
and a run may be resumed with other numbers of both.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NotRequired, TypedDict

import numpy as np
from torch.utils.data import Sampler

from sgm.data.frames import DatasetError

ORDERS = ("shuffle", "sequential", "upstream")


class SamplerState(TypedDict):
    """Where a stream stands, for all ranks alike, and of what data it is; from `block` on: of a `BucketSampler`."""

    seed: int
    epoch: int
    position: int
    sizes: list[int]
    order: str
    weights: list[float] | None
    block: NotRequired[int]
    groups: NotRequired[list[int]]
    begin: NotRequired[int]
    taken: NotRequired[list[int]]


class ClipSampler(Sampler[int]):
    """Endless stream of clip numbers for one rank.

    An epoch has as many positions as there are clips. Without weights each clip comes once in every epoch. With weights
    each source gets its share of the positions (at least one), and goes through its own clips, shuffled anew each time
    round, going on where the last epoch left it.

    Args:
        sizes: clips in each source; numbers count through the sources, as in torch's ConcatDataset.
        order: "shuffle"; "sequential" (sources one after the other, or in turn when weighted); "upstream": the
            original's endless draws with repetition, which depend on the position only (`upstream_index`).
        weights: share of each source, any positive numbers; by default its size.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        order: str = "shuffle",
        weights: Sequence[float] | None = None,
    ):
        _check(sizes, rank, world_size, order, weights)
        self.sizes = [int(size) for size in sizes]
        self.length = sum(self.sizes)
        self.seed, self.rank, self.world_size, self.order = int(seed), rank, world_size, order
        self.weights = None if weights is None else [float(w) for w in weights]
        self.shares = shares(self.length, self.weights or self.sizes)
        self.consumed = 0  # positions of the stream that all ranks together are past
        self._epoch, self._plan = -1, np.empty(0, np.int64)

    def __iter__(self) -> Iterator[int]:
        while True:
            index = self.at(self.consumed + self.rank)
            self.consumed += self.world_size
            yield index

    def at(self, position: int) -> int:
        """Clip number at a position of the stream (counted from 0, over all ranks and epochs)."""
        if self.order == "upstream":
            return upstream_index(position, self.length)
        epoch, offset = divmod(position, self.length)
        if epoch != self._epoch:
            self._epoch, self._plan = epoch, self._plan_of(epoch)
        return int(self._plan[offset])

    def state_dict(self, consumed: int | None = None) -> SamplerState:
        """Where the stream stands, for all ranks alike.

        Args:
            consumed: positions that all ranks together have trained on, when that is fewer than were drawn (a loader
                draws ahead); by default those drawn.
        """
        epoch, position = divmod(self.consumed if consumed is None else consumed, self.length)
        return SamplerState(
            seed=self.seed,
            epoch=epoch,
            position=position,
            sizes=list(self.sizes),
            order=self.order,
            weights=self.weights,
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken, with its seed.

        Raises:
            DatasetError: the state belongs to other data or another order, so that its position means nothing here.
        """
        own = self.state_dict()
        for name in ("sizes", "order", "weights", "groups"):
            if state.get(name) != own.get(name):
                raise DatasetError(
                    f"the saved data position was taken with {name} {state.get(name)}, now it is {own.get(name)}; "
                    "restore the data set, or start a new run from the saved weights (args.load)"
                )
        self.seed = int(state["seed"])
        self.consumed = int(state["epoch"]) * self.length + int(state["position"])
        self._epoch = -1

    def _plan_of(self, epoch: int) -> np.ndarray:
        """Clip numbers of one epoch, int64 (length,)."""
        source_of = np.repeat(np.arange(len(self.sizes)), self.shares)
        if self.order == "shuffle":
            self._rng(epoch).shuffle(source_of)
        elif self.weights is not None:
            turn = np.concatenate([(np.arange(share) + 0.5) / share for share in self.shares])
            source_of = source_of[np.argsort(turn, kind="stable")]
        plan = np.empty(self.length, np.int64)
        first = 0
        for source, (size, share) in enumerate(zip(self.sizes, self.shares, strict=True)):
            plan[source_of == source] = first + self._of_source(source, size, epoch * share, share)
            first += size
        return plan

    def _of_source(self, source: int, size: int, start: int, count: int) -> np.ndarray:
        """Numbers `start` to `start + count` in the endless stream of one source's clips."""
        if self.order == "sequential":
            return (start + np.arange(count)) % size
        rounds = range(start // size, (start + count - 1) // size + 1)
        stream = np.concatenate([self._rng(1 + source, r).permutation(size) for r in rounds])
        begin = start - rounds[0] * size
        return stream[begin : begin + count]

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.seed % 2**64, len(key), *key])


def shares(total: int, weights: Sequence[float]) -> list[int]:
    """`total` divided in proportion to `weights` by largest remainders, at least 1 each."""
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [max(1, int(value)) for value in exact]
    while sum(counts) != total:
        step = 1 if sum(counts) < total else -1
        able = [i for i, count in enumerate(counts) if step > 0 or count > 1]
        counts[max(able, key=lambda i: step * (exact[i] - counts[i]))] += step
    return counts


def upstream_index(position: int, length: int) -> int:
    """The original's choice among `length` clips at a position: random, with repetition, whatever the run's seed."""
    draws = random.Random(position)
    rng = np.random.RandomState([draws.randint(0, 2**32 - 1) for _ in range(16)])
    return int(rng.randint(length))


def _check(sizes: Sequence[int], rank: int, world_size: int, order: str, weights: Sequence[float] | None) -> None:
    if not sizes or any(size < 1 for size in sizes):
        raise ValueError(f"sizes of the data sets are {list(sizes)}; each must have at least one clip")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of {world_size}; ranks count from 0 to world_size - 1")
    if order not in ORDERS:
        raise ValueError(f"unknown order {order!r}; choose one of {', '.join(ORDERS)}")
    if weights is None:
        return
    if order == "upstream":
        raise ValueError("order 'upstream' draws from all clips alike and takes no weights; use order 'shuffle'")
    if len(weights) != len(sizes) or not all(0 < weight < float("inf") for weight in weights):
        raise ValueError(f"weights are {list(weights)}; give one positive number for each of {len(sizes)} data sets")

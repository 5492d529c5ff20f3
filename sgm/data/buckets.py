"""Buckets: clips of several lengths, sizes and shapes in one run, each batch of one kind.

A clip goes into the bucket that keeps most of it. It is scaled by one factor and cropped, never stretched; how much may
be cropped away is bounded.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sgm.data.frames import ClipError, ClipShape, DatasetError
from sgm.data.sampler import ClipSampler, SamplerState, shares
from sgm.modules.autoencoding.strides import STRIDES


class Bucket(NamedTuple):
    """Frames, height and width of a clip in pixels."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


def parse_buckets(given: Sequence[Sequence[int]]) -> tuple[Bucket, ...]:
    """Buckets from `[[frames, height, width], ...]`.

    Raises:
        DatasetError: not three whole numbers, frames that are no 4k + 1, sides that are no multiples of 16, duplicates.
    """
    buckets, problems = [], []
    for entry in given:
        if len(entry) != 3 or any(int(number) != number or number < 1 for number in entry):
            problems.append(f"{list(entry)} is not [frames, height, width]")
            continue
        bucket = Bucket(*(int(number) for number in entry))
        if not STRIDES.is_whole(bucket.frames):
            problems.append(f"{bucket}: the number of frames must be {STRIDES.clip_lengths}")
        if bucket.height % STRIDES.size_step or bucket.width % STRIDES.size_step:
            problems.append(f"{bucket}: height and width must be multiples of {STRIDES.size_step}")
        buckets.append(bucket)
    if len(set(buckets)) < len(buckets):
        problems.append("one bucket stands there twice")
    if problems:
        raise DatasetError(f"buckets: {'; '.join(problems)}")
    return tuple(buckets)


def kept_share(height: int, width: int, clip: ClipShape) -> float:
    """Share of a picture's area that scaling to cover a clip (frames, height, width) and cropping leaves."""
    ratio = (width / height) / (clip[2] / clip[1])
    return min(ratio, 1 / ratio)


def choose_bucket(
    height: int, width: int, buckets: Sequence[Bucket], max_crop: float, fits: Callable[[int], bool]
) -> Bucket:
    """The bucket for a video: most frames; of these the least cropped; of these the nearest in size.

    Args:
        max_crop: largest share of a picture's area that may be cropped away.
        fits: whether the video gives a clip of so many frames.

    Raises:
        ClipError: none will do; says why.
    """
    uncut = [b for b in buckets if 1 - kept_share(height, width, b) <= max_crop + 1e-9]
    if not uncut:
        least = min(1 - kept_share(height, width, b) for b in buckets)
        raise ClipError(
            f"{width}x{height} pixels: the nearest bucket would crop {least:.0%}, more than max_crop {max_crop:.0%}"
        )
    possible = {frames: fits(frames) for frames in {b.frames for b in uncut}}
    held = [b for b in uncut if possible[b.frames]]
    if not held:
        raise ClipError(f"too short for the buckets of its shape, of which the shortest has {min(possible)} frames")

    def worth(bucket: Bucket) -> tuple[int, float, float]:
        scale = abs(math.log(bucket.height * bucket.width / (height * width)))
        return bucket.frames, round(kept_share(height, width, bucket), 6), -scale

    return max(held, key=worth)


class BucketSampler(ClipSampler):
    """The stream of `ClipSampler`, arranged so that every batch of every rank, at every step, is of one kind.

    The stream consists of blocks of `batch_size * world_size` clips of one shape. An epoch has, of each shape, as many
    blocks as its clips fill, rounded, at least one; the shapes come in shuffled order. Within a shape each clip comes
    once before any comes again, also across epochs.

    Args:
        shapes: shape of every clip, one sequence a source.
    """

    def __init__(
        self,
        shapes: Sequence[Sequence[tuple[int, ...]]],
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        weights: Sequence[float] | None = None,
    ):
        super().__init__([len(source) for source in shapes], seed, rank, world_size, "shuffle", weights)
        self.groups, self._amounts = _groups(shapes, self.weights)
        self._clips = self.length
        # Where this arrangement in blocks began, and how many clips of each shape came before it.
        self._begin, self._taken = 0, [0] * len(self.groups)
        self._arrange(batch_size * world_size)

    def _arrange(self, block: int) -> None:
        self.block = block
        blocks = max(len(self.groups), round(self._clips / block))
        self.shares = shares(blocks, self._amounts)
        self.length = blocks * block

    def at(self, position: int) -> int:
        return super().at(position - self._begin)

    def state_dict(self, consumed: int | None = None) -> SamplerState:
        state = super().state_dict((self.consumed if consumed is None else consumed) - self._begin)
        groups = [len(group) for group in self.groups]
        return {**state, "block": self.block, "groups": groups, "begin": self._begin, "taken": list(self._taken)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken. With another number of clips a step the shapes come in a new order, while
        those of one shape go on in theirs.
        """
        own = self.block
        self._arrange(int(state.get("block", own)))
        super().load_state_dict(state)
        self._begin, self._taken = int(state.get("begin", 0)), list(state.get("taken", [0] * len(self.groups)))
        self.consumed += self._begin
        if own != self.block:
            self._arrange_anew(own)

    def _arrange_anew(self, block: int) -> None:
        epoch, offset = divmod(self.consumed - self._begin, self.length)
        here = np.bincount(self._order(epoch)[: offset // self.block], minlength=len(self.groups)).tolist()
        blocks = [epoch * share + count for share, count in zip(self.shares, here, strict=True)]
        self._taken = [before + count * self.block for before, count in zip(self._taken, blocks, strict=True)]
        self._begin = self.consumed
        self._arrange(block)

    def _order(self, epoch: int) -> np.ndarray:
        """Group of each block of an epoch."""
        order = np.repeat(np.arange(len(self.groups)), self.shares)
        self._rng(epoch).shuffle(order)
        return order

    def _plan_of(self, epoch: int) -> np.ndarray:
        """Clip numbers of one epoch, int64 (length,)."""
        order = self._order(epoch)
        plan = np.empty((len(order), self.block), np.int64)
        for number, (group, share) in enumerate(zip(self.groups, self.shares, strict=True)):
            count = share * self.block
            taken = self._of_source(number, len(group), self._taken[number] + epoch * count, count)
            plan[order == number] = group[taken].reshape(share, self.block)
        return plan.reshape(-1)


def batches_by_shape(shapes: Sequence[tuple[int, ...]], batch_size: int) -> list[list[int]]:
    """Every clip in batches of one shape, the shapes in turn; a shape's last batch is filled from its first clips."""
    groups = _groups([shapes], None)[0]
    split = [
        [np.resize(np.roll(group, -start), batch_size).tolist() for start in range(0, len(group), batch_size)]
        for group in groups
    ]
    return [batch for turn in itertools.zip_longest(*split) for batch in turn if batch is not None]


def _groups(
    shapes: Sequence[Sequence[tuple[int, ...]]], weights: Sequence[float] | None
) -> tuple[list[np.ndarray], list[float]]:
    """(clip numbers of each group, its share of the stream). With weights each source has groups of its own."""
    found: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    first = 0
    for source, of_source in enumerate(shapes):
        for k, shape in enumerate(of_source):
            found.setdefault((source if weights else 0, tuple(shape)), []).append(first + k)
        first += len(of_source)
    keys = sorted(found)
    amounts = [
        len(found[key]) * (weights[key[0]] / len(shapes[key[0]]) if weights else 1.0) for key in keys
    ]  # fmt: skip
    return [np.array(found[key], np.int64) for key in keys], amounts

"""Training clips rendered on the fly by worker processes, in batches that wait in shared memory.

Batch number i depends on the seed, i and its shape only, whatever the number of workers. This module imports numpy
and the renderer alone, so that workers start quickly.
"""

from __future__ import annotations

import os
import queue
import time
import traceback
from collections import deque
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.sharedctypes import RawArray
from typing import Self

import numpy as np

from tools.demo.shapes import ClipSpec, render_clip, sample_spec

CLIP = (49, 128, 192)  # frames, height and width of the clips that pieces are cut from
POLL = 1.0  # seconds between looks at whether the other side still lives
Withheld = frozenset[tuple[str, str, str]]


class FeedError(ValueError):
    """A batch that does not fit, or workers that failed."""


@dataclass(frozen=True)
class BatchShape:
    """What a batch holds: pieces of clips, each `frames` x `height` x `width`."""

    pieces: int
    frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        limits = zip((self.frames, self.height, self.width), CLIP, strict=True)
        if self.pieces < 1 or any(not 1 <= size <= limit for size, limit in limits):
            raise FeedError(f"{self} does not fit clips of {CLIP[0]} frames of {CLIP[1]}x{CLIP[2]}")

    @property
    def size(self) -> tuple[int, int, int, int, int]:
        return self.pieces, self.frames, self.height, self.width, 3

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.size))


def make_batch(index: int, shape: BatchShape, seed: int, withheld: Withheld) -> np.ndarray:
    """Batch number `index`: uint8 (b, f, h, w, 3). No shape shows a withheld combination."""
    rng = np.random.default_rng([seed, index])
    batch = np.empty(shape.size, np.uint8)
    each = 1 if shape.frames > CLIP[0] // 2 else 2  # pieces from one clip
    for k in range(shape.pieces):
        if k % each == 0:
            spec = sample_spec(rng, *CLIP, withheld=withheld)
            clip = _recoloured(_filled(render_clip(spec), rng, withheld), rng)
        batch[k] = cut_piece(clip, shape, rng)
    return batch


def cut_piece(clip: np.ndarray, shape: BatchShape, rng: np.random.Generator) -> np.ndarray:
    """A random piece (f, h, w, 3) of a clip: of two places, the one where more happens."""
    start = rng.integers(clip.shape[0] - shape.frames + 1)
    frames = clip[start : start + shape.frames]
    if frames.shape[1:3] == (shape.height, shape.width):
        return frames
    rows, columns = (clip.shape[1] - shape.height + 1, clip.shape[2] - shape.width + 1)
    places = [(int(rng.integers(rows)), int(rng.integers(columns))) for _ in range(2)]
    pieces = [frames[:, y : y + shape.height, x : x + shape.width] for y, x in places]
    return max(pieces, key=_activity)


def _activity(piece: np.ndarray) -> int:
    middle, last = piece[len(piece) // 2], piece[-1]
    return int(np.count_nonzero(middle != piece[0]) + np.count_nonzero(last != piece[0]))


def _filled(clip: np.ndarray, rng: np.random.Generator, withheld: Withheld) -> np.ndarray:
    """One clip in eight with a textured shape in it: a codec should not know plain fills only."""
    if rng.random() >= 0.125:
        return clip
    window, texture = (sample_spec(rng, *CLIP, two=0, withheld=withheld) for _ in range(2))
    shown = render_clip(replace(window, pattern="plain", background="black", second="")).max(axis=-1, keepdims=True)
    alpha = np.clip((shown.astype(np.float32) - 24) / 136, 0, 1)  # no colour is darker than 160, black is 18
    still = render_clip(replace(texture, frames=1))[0, ::4, ::4]  # a quarter as large, so that it is fine
    paint = np.tile(still, (4, 4, 1))[: CLIP[1], : CLIP[2]].astype(np.float32)
    return (clip + alpha * (paint - clip) + 0.5).astype(np.uint8)


def _recoloured(clip: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One clip in four with its colours exchanged or inverted: a codec should not rely on the demo's palette."""
    if rng.random() >= 0.25:
        return clip
    clip = clip[..., rng.permutation(3)]
    return 255 - clip if rng.random() < 0.5 else clip


def held_out_specs(count: int, seed: int, withheld: Withheld) -> list[ClipSpec]:
    """Clips that training never shows: their shapes have withheld combinations only (any, where the list is empty)."""
    rng = np.random.default_rng([seed, 1 << 40])  # no batch has this number
    return [sample_spec(rng, *CLIP, withheld=withheld, only_withheld=bool(withheld)) for _ in range(count)]


class ClipFeed:
    """Batches in the order in which they were asked for.

    Args:
        workers: processes; 0 renders in this one, when a batch is taken.
        slots: batches that may wait or be in the making.
        slot_bytes: the largest batch.
    """

    def __init__(self, workers: int, slots: int, slot_bytes: int, seed: int, withheld: Withheld) -> None:
        self.seed, self.withheld, self.waited = seed, withheld, 0.0
        self._asked: deque[tuple[int, BatchShape]] = deque()
        self._next, self._limit = 0, slots
        self._workers: list = []
        if not workers:
            return
        context = get_context("spawn")
        # multiprocessing puts it in /dev/shm, or in a temporary file where that is too small
        self._memory, self._slot_bytes = RawArray("B", slots * slot_bytes), slot_bytes
        self._free, self._ready = list(range(slots)), {}
        self._tasks, self._done = context.Queue(), context.Queue()
        arguments = (self._memory, slot_bytes, self._tasks, self._done, seed, withheld, os.getpid())
        self._workers = [context.Process(target=_work, args=arguments, daemon=True) for _ in range(workers)]
        for worker in self._workers:
            worker.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def room(self) -> int:
        """Batches that may still be asked for before one is taken."""
        return self._limit - len(self._asked)

    @property
    def pending(self) -> int:
        """Batches that were asked for and not taken."""
        return len(self._asked)

    def ask(self, shape: BatchShape) -> None:
        """Order the next batch. Raises FeedError where there is no room, or the batch is too large for a slot."""
        if not self.room:
            raise FeedError(f"{self._limit} batches wait already: take one first")
        if self._workers:
            if shape.nbytes > self._slot_bytes:
                raise FeedError(f"{shape} takes {shape.nbytes} bytes, a slot has {self._slot_bytes}")
            self._tasks.put((self._next, self._free.pop(), shape))
        self._asked.append((self._next, shape))
        self._next += 1

    def take(self) -> np.ndarray:
        """The oldest batch that was asked for, uint8 (b, f, h, w, 3), the caller's own."""
        index, shape = self._asked.popleft()
        if not self._workers:
            return make_batch(index, shape, self.seed, self.withheld)
        began = time.perf_counter()
        while index not in self._ready:
            self._collect()
        self.waited += time.perf_counter() - began
        slot = self._ready.pop(index)
        start = slot * self._slot_bytes
        batch = np.frombuffer(self._memory, np.uint8, shape.nbytes, start).reshape(shape.size).copy()
        self._free.append(slot)
        return batch

    def close(self) -> None:
        """End the workers."""
        if self._workers:
            self._tasks.cancel_join_thread()  # nobody will read what is still in it
        for worker in self._workers:
            worker.terminate()
        for worker in self._workers:
            worker.join()
        self._workers = []

    def _collect(self) -> None:
        try:
            index, slot, failure = self._done.get(timeout=POLL)
        except queue.Empty:
            dead = [worker.exitcode for worker in self._workers if not worker.is_alive()]
            if dead:
                raise FeedError(f"{len(dead)} of {len(self._workers)} workers ended, exit codes {dead}") from None
            return
        if failure:
            raise FeedError(f"batch {index} could not be rendered:\n{failure}")
        self._ready[index] = slot


def _work(memory, slot_bytes: int, tasks, done, seed: int, withheld: Withheld, parent: int) -> None:
    """A worker: render what is asked for until the parent is gone."""
    while os.getppid() == parent:
        try:
            index, slot, shape = tasks.get(timeout=POLL)
        except queue.Empty:
            continue
        failure = ""
        try:
            place = np.frombuffer(memory, np.uint8, shape.nbytes, slot * slot_bytes).reshape(shape.size)
            place[...] = make_batch(index, shape, seed, withheld)
        except Exception:  # noqa: BLE001  whatever it was, the parent raises it
            failure = traceback.format_exc()
        done.put((index, slot, failure))

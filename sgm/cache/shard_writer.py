"""Writing a cache's shards while the next encodings are made."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Self

from torch import Tensor

from sgm.cache.shards import CacheError
from sgm.cache.store import CacheStore, FileStamp, Seen

SHARD_BYTES = 256 << 20
SHARD_SECONDS = 120.0  # longest time of work that an interruption can cost


class ShardWriter:
    """Collects tensors into shards, which one thread writes while the next one fills; on leaving, all is on the disk.

    What is noted of files goes to the disk together with the shard in hand. A note whose moments come later, or never
    come, does no harm: a clip counts as cached only when its moments are there.
    """

    def __init__(self, store: CacheStore, kind: str):
        self._store, self._kind = store, kind
        self._tensors: dict[str, Tensor] = {}
        self._notes: list[tuple[int, FileStamp, Seen]] = []
        self._bytes, self._since = 0, time.monotonic()
        self._thread = ThreadPoolExecutor(1, "shard")
        self._running: Future | None = None

    def put(self, name: str, tensor: Tensor) -> None:
        """Take a tensor; raises what an earlier shard's writing raised."""
        self._tensors[name] = tensor
        self._bytes += tensor.nbytes
        if self._bytes >= SHARD_BYTES or time.monotonic() - self._since > SHARD_SECONDS:
            self.flush()

    def note(self, rank: int, stamp: FileStamp, seen: Seen) -> None:
        """Record what a file holds, with the shard in hand."""
        self._notes.append((rank, stamp, seen))

    def flush(self) -> None:
        """Start to write what was collected."""
        self._wait()
        tensors, notes = self._tensors, self._notes
        self._tensors, self._notes, self._bytes, self._since = {}, [], 0, time.monotonic()
        self._running = self._thread.submit(partial(self._write, tensors, notes))

    def _write(self, tensors: dict[str, Tensor], notes: list[tuple[int, FileStamp, Seen]]) -> None:
        if tensors:
            self._store.add(self._kind, tensors)
        for rank in {rank for rank, _, _ in notes}:
            self._store.record(rank, [(stamp, seen) for r, stamp, seen in notes if r == rank])

    def _wait(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None or not issubclass(kind, CacheError):
                self.flush()  # what is encoded is kept, also when interrupted
            self._wait()
        finally:
            self._thread.shutdown()

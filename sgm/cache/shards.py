"""A cache's shards: safetensors files with the encodings of many clips or captions, indexed by their headers."""

from __future__ import annotations

import json
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sgm.errors import SgmError

OPEN_FILES = 64  # shards a process keeps open
_TYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


class CacheError(SgmError):
    """A cache that cannot be used: of another configuration, damaged, or incomplete. The message says which."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: number of the shard, first byte, shape, type."""

    shard: int
    begin: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_index(path: Path, shard: int) -> tuple[dict[str, Entry], str | None]:
    """(what a shard holds by name, the digest of the cache that it was written for).

    Args:
        shard: the number that its entries get.

    Raises:
        CacheError: it is damaged.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            size = os.fstat(file.fileno()).st_size
        identity = header.pop("__metadata__", {}).get("identity")
        entries = {
            name: Entry(shard, 8 + length + v["data_offsets"][0], tuple(v["shape"]), _TYPES[v["dtype"]])
            for name, v in header.items()
        }
        end = 8 + length + max((v["data_offsets"][1] for v in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, MemoryError, OverflowError) as error:
        raise CacheError(f"{path} is damaged ({error}); delete it and fill the cache again") from error
    if size != end:
        raise CacheError(f"{path} has {size} bytes in place of {end}; delete it and fill the cache again")
    return entries, identity


class ShardReader:
    """Tensors out of shards, one `pread` each. Safe in threads and after a fork; files are opened when needed."""

    def __init__(self, shards: Iterable[Path | str]):
        self.shards = [str(path) for path in shards]
        self._open: OrderedDict[int, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, entry: Entry) -> Tensor:
        """The tensor of an entry, in its stored type. Raises CacheError, see `read_into`."""
        buffer = bytearray(entry.nbytes)
        self.read_into(entry, memoryview(buffer))
        return torch.frombuffer(buffer, dtype=entry.dtype).view(entry.shape)

    def read_into(self, entry: Entry, place: memoryview) -> None:
        """Put an entry's bytes, `entry.nbytes` of them, into `place`. Other threads run meanwhile.

        Raises:
            CacheError: the shard has gone or was shortened since the cache was opened.
        """
        done = 0
        try:
            file = self._file(entry.shard)
            while done < entry.nbytes:  # once, except on some network drives
                count = os.preadv(file.descriptor, [place[done:]], entry.begin + done)
                if count == 0:
                    raise CacheError(f"{self.shards[entry.shard]} ends too early; delete it and fill the cache again")
                done += count
        except OSError as error:
            raise CacheError(f"{self.shards[entry.shard]}: {error.strerror}; was the cache moved?") from error

    def close(self) -> None:
        with self._lock:
            self._open.clear()

    def __reduce__(self) -> tuple[type, tuple[list[str]]]:
        return type(self), (self.shards,)

    def _file(self, shard: int) -> _OpenFile:
        with self._lock:
            found = self._open.get(shard)
            if found is None:
                if len(self._open) >= OPEN_FILES:
                    self._open.popitem(last=False)
                found = self._open[shard] = _OpenFile(self.shards[shard])
            self._open.move_to_end(shard)
            return found


class _OpenFile:
    """A descriptor that is closed when the last one who reads from it has let go."""

    def __init__(self, path: str):
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)

"""A cache's shards: safetensors files with the encodings of many clips or captions, indexed by their headers."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from sgm.errors import SgmError
from sgm.weights.checksums import OpenFile, WeightsError, crc32, read_header

OPEN_FILES = 64  # shards a process keeps open
_AGAIN = "delete it and fill the cache again"
_TYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "U8": torch.uint8}


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
        header = read_header(path)
        entries = {
            name: Entry(shard, header.begin + v["data_offsets"][0], tuple(v["shape"]), _TYPES[v["dtype"]])
            for name, v in header.tensors.items()
        }
        end = header.begin + max((v["data_offsets"][1] for v in header.tensors.values()), default=0)
    except (WeightsError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error
    if (size := path.stat().st_size) != end:
        raise CacheError(f"{path} has {size} bytes in place of {end}; {_AGAIN}")
    return entries, header.metadata.get("identity")


def _damaged(path: str | Path, error: Exception) -> CacheError:
    return CacheError(f"{path} is damaged ({getattr(error, 'reason', error)}); {_AGAIN}")


class ShardReader:
    """Tensors out of shards, one `pread` each. Safe in threads and after a fork; files are opened when needed."""

    def __init__(self, shards: Iterable[Path | str]):
        self.shards = [str(path) for path in shards]
        self._open = lru_cache(OPEN_FILES)(_OpenFile)

    def read(self, entry: Entry) -> Tensor:
        """The tensor of an entry, in its stored type. Raises CacheError, see `read_into`."""
        buffer = bytearray(entry.nbytes)
        self.read_into(entry, memoryview(buffer))
        return torch.frombuffer(buffer, dtype=entry.dtype).view(entry.shape)

    def read_into(self, entry: Entry, place: memoryview) -> None:
        """Put an entry's bytes, `entry.nbytes` of them, into `place`. Other threads run meanwhile.

        Raises:
            CacheError: the shard has gone, was shortened since the cache was opened, or is damaged here.
        """
        done, path = 0, self.shards[entry.shard]
        try:
            file = self._open(path)
            while done < entry.nbytes:  # once, except on some network drives
                count = os.preadv(file.descriptor, [place[done:]], entry.begin + done)
                if count == 0:
                    raise CacheError(f"{path} ends too early; {_AGAIN}")
                done += count
            if entry.begin not in file.stretches:
                return  # of a time before checksums
            name, begin, size, crc = file.stretches[entry.begin]
            rest = begin + done, size - done  # some, where fewer latent frames are wanted
            if file.crc(*rest, crc32(place)) != crc:
                raise CacheError(f"{path} is damaged ({name} has another checksum than it states); {_AGAIN}")
        except WeightsError as error:
            raise _damaged(path, error) from error
        except OSError as error:
            raise CacheError(f"{path}: {error.strerror}; was the cache moved?") from error

    def close(self) -> None:
        self._open.cache_clear()

    def __reduce__(self) -> tuple[type, tuple[list[str]]]:
        return type(self), (self.shards,)


class _OpenFile(OpenFile):
    """With its checksums by where they begin."""

    def __init__(self, path: str):
        super().__init__(path)
        with open(self.descriptor, "rb", closefd=False) as file:
            self.stretches = {part[1]: part for part in read_header(self.path, file).stretches}

"""A folder of encoded clips on disk: VAE moments and text embeddings by content, read with one system call each.

    cache.json               what determines the values (`identity`), their type, and the type they were computed in
    video-*.safetensors      moments (t, 2c, h, w) of many clips, named by the SHA-256 of the video file
    text-*.safetensors       embeddings (l, d) of many captions, named by the SHA-256 of the text
    files-*.jsonl            which file had which content: size, time of change and SHA-256, or why it gives no clip

Shards are written whole or not at all, so an interrupted filling loses the shard in hand and nothing else; the index is
read from their headers. The `.jsonl` files spare reading a video again as long as its size and time stand.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgm.data.sources import Place
from sgm.errors import SgmError
from sgm.files import SaveError, write_failed, write_json
from sgm.weights.save import save_safetensors

FORMAT = 1
KINDS = ("video", "text")
STORAGE = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
KEY_DIGITS = 32
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


@dataclass(frozen=True)
class FileStamp:
    """A file as it was seen: its absolute path, size in bytes, time of change in nanoseconds.

    For a clip inside an archive, size and time are the archive's.
    """

    path: str
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: str | Path) -> FileStamp:
        """Raises OSError where there is no such file."""
        stat = os.stat(Place.of(path).file)
        return cls(os.path.abspath(path), stat.st_size, stat.st_mtime_ns)


@dataclass(frozen=True)
class Seen:
    """What a file was found to hold: the key of its content, or why no clip can be taken from it.

    A reason that is `passing` (see `sgm.data.video_io.VideoError`) counts until the cache is opened again.
    """

    key: str | None
    rejected: str | None = None
    passing: bool = False


class CacheStore:
    """The folder, opened for one configuration.

    Args:
        folder: made if absent.
        identity: everything that determines the values, name -> plain value. Values of None (a weight file that is not
            at hand) are not compared.
        storage: "fp16", "bf16" or "fp32", for a new cache; an old one keeps its own.
        encoded_as: type of the encoders' arithmetic, for a new cache; an old one keeps its own.

    Raises:
        CacheError: the folder was filled under another identity, or holds something else or damaged files.
        SaveError: it cannot be made.
    """

    def __init__(
        self, folder: str | Path, identity: Mapping[str, Any], storage: str = "fp16", encoded_as: str = "fp32"
    ):
        self.folder = Path(folder).expanduser()
        self.storage, self.encoded_as = storage, encoded_as
        self.identity = json.loads(json.dumps(dict(identity)))  # as it comes back from the file
        self._claim()
        self.shards: list[Path] = []
        self._entries: dict[str, Entry] = {}
        self._seen: dict[FileStamp, Seen] = {}
        self._paths: set[str] = set()
        self._found = {path: path.stat().st_size for path in self.folder.glob("files-*.jsonl")}
        self.refresh()

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def entry(self, name: str) -> Entry:
        """Where `video_key(...)` or `text_key(...)` is stored. Raises KeyError."""
        return self._entries[name]

    def seen(self, stamp: FileStamp) -> Seen | None:
        """What is known of a file in its present state."""
        return self._seen.get(stamp)

    def was_seen_before(self, path: str | Path) -> bool:
        """Whether some state of the file was recorded."""
        return os.path.abspath(path) in self._paths

    def names(self, kind: str) -> frozenset[str]:
        """All stored names of "video" or "text"."""
        return frozenset(name for name in self._entries if name.startswith(f"{kind}:"))

    def refresh(self) -> None:
        """Take in what other processes have added."""
        known = set(self.shards)
        for kind in KINDS:
            for path in sorted(self.folder.glob(f"{kind}-*.safetensors")):
                if path not in known:
                    self._entries.update(self._index(path, len(self.shards)))
                    self.shards.append(path)
        for path in sorted(self.folder.glob("files-*.jsonl")):
            self._read_files(path)

    def add(self, kind: str, tensors: Mapping[str, Tensor]) -> None:
        """Write one shard, converted to the storage type.

        Raises:
            CacheError: a value leaves the storage type's range.
            SaveError: it cannot be written.
        """
        dtype = STORAGE[self.storage]
        # In an order that the file's name tells: another process that encodes the same clips replaces this file by one
        # with the same layout, so that whoever has read its head goes on reading the right places.
        stored = {name: tensors[name].to(dtype) for name in sorted(tensors)}
        for name, tensor in stored.items():
            if not bool(torch.isfinite(tensor).all()):
                raise CacheError(
                    f"{name} has values outside {self.storage}; make a new cache with --storage bf16 or fp32"
                )
        digest = hashlib.sha256("\n".join([self.storage, *stored]).encode()).hexdigest()[:16]
        path = self.folder / f"{kind}-{digest}.safetensors"
        save_safetensors(path, stored, {"identity": self._digest()})
        if path not in self.shards:
            self._entries.update(self._index(path, len(self.shards)))
            self.shards.append(path)

    def record(self, rank: int, found: Iterable[tuple[FileStamp, Seen]]) -> None:
        """Note what files hold. Each rank appends to a file of its own. Raises SaveError."""
        lines = []
        for stamp, seen in found:
            content: dict[str, Any] = {"rejected": seen.rejected} if seen.key is None else {"key": seen.key}
            if seen.passing:
                content["passing"] = True
            lines.append(json.dumps({"path": stamp.path, "size": stamp.size, "mtime_ns": stamp.mtime_ns, **content}))
            self._remember(stamp, seen)
        path = self.folder / f"files-{rank:05d}.jsonl"
        try:
            with path.open("ab") as file:
                # a line cut off by a full disk or a crash ends here, and is passed over when read
                file.write(("\n" + "\n".join(lines) + "\n").encode())
        except OSError as error:
            raise write_failed(path, error) from error

    # --- the folder -----------------------------------------------------------------------------------------------

    def _claim(self) -> None:
        head = self.folder / "cache.json"
        if not head.is_file():
            self._create(head)
            return
        try:
            content = json.loads(head.read_text(encoding="utf-8"))
            found, version = dict(content["identity"]), content["format"]
            self.storage, self.encoded_as = content["storage"], content["encoded_as"]
        except (ValueError, KeyError, TypeError) as error:
            raise CacheError(f"{head} is not the head of a cache ({error}); give another folder") from error
        if version != FORMAT or self.storage not in STORAGE:
            raise CacheError(f"{head} has format {version}, this program reads {FORMAT}; fill a new folder")
        self._compare(found)
        self.identity = found

    def _create(self, head: Path) -> None:
        if self.storage not in STORAGE:
            raise CacheError(f"unknown storage type {self.storage!r}; choose one of {', '.join(STORAGE)}")
        absent = sorted(name for name, value in self.identity.items() if value is None)
        if absent:
            raise CacheError(
                f"cannot start a cache in {self.folder}: the files behind {', '.join(absent)} are missing; set "
                "ckpt_path and model_dir of the configuration"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SaveError(f"cannot make the cache folder {self.folder}: {error.strerror}") from error
        content = {"format": FORMAT, "storage": self.storage, "encoded_as": self.encoded_as, "identity": self.identity}
        write_json(head, content)

    def _compare(self, found: Mapping[str, Any]) -> None:
        known = {name: value for name, value in self.identity.items() if value is not None}
        compared = {*found, *known} - {name for name, value in self.identity.items() if value is None}
        other = [
            f"{name} (cache: {found.get(name)}; this run: {known.get(name)})"
            for name in sorted(compared)
            if found.get(name) != known.get(name)
        ]
        if other:
            raise CacheError(
                f"{self.folder} was filled under another configuration: {'; '.join(other)}. Give another --cache-dir "
                "(one folder for each configuration), or the configuration that filled this one."
            )

    def _digest(self) -> str:
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]

    def _index(self, path: Path, shard: int) -> dict[str, Entry]:
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
        if identity != self._digest():
            raise CacheError(f"{path} comes from another cache; delete it and fill the cache again")
        return entries

    def _read_files(self, path: Path) -> None:
        place = 0
        for line in path.read_bytes().splitlines(keepends=True):
            place += len(line)
            try:
                said = json.loads(line)
                stamp = FileStamp(said["path"], said["size"], said["mtime_ns"])
                seen = Seen(said.get("key"), said.get("rejected"), said.get("passing", False))
                if not (seen.passing and place <= self._found.get(path, 0)):  # of an earlier run: it may be over
                    self._remember(stamp, seen)
            except (ValueError, KeyError, TypeError):
                continue  # cut off by a crash: the file is looked at again

    def _remember(self, stamp: FileStamp, seen: Seen) -> None:
        self._seen[stamp] = seen
        self._paths.add(stamp.path)


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


def text_key(text: str) -> str:
    """Name under which a caption's embedding is stored."""
    return "text:" + hashlib.sha256(text.encode()).hexdigest()[:KEY_DIGITS]


def video_key(path: str | Path) -> str:
    """Name under which a video's moments are stored. Reads the whole file; raises OSError."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with Place.of(path).open() as file:
        while count := file.readinto(buffer):  # type: ignore[attr-defined]
            digest.update(buffer[:count])
    return "video:" + digest.hexdigest()[:KEY_DIGITS]

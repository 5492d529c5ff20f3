"""A folder of encoded clips on disk: VAE moments and text embeddings by content, read with one system call each.

    cache.json               what determines the values (`identity`), their type, and the type they were computed in
    video-*.safetensors      moments (t, 2c, h, w) of many clips, named by the SHA-256 of the video file
    text-*.safetensors       embeddings (l, d) of many captions, named by the SHA-256 of the text
    frame-*.safetensors      first frames of many clips as they are, uint8 (3, h, w), for models that start from one
    files-*.jsonl            which file had which content: size, time of change and SHA-256, or why it gives no clip

Shards are written whole or not at all, so an interrupted filling loses the shard in hand and nothing else; the index is
read from their headers. The `.jsonl` files spare reading a video again as long as its size and time stand.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from sgm.cache.shards import CacheError, Entry, read_index
from sgm.data.clips import CaptionError, caption_of
from sgm.data.dataset import ClipSource
from sgm.data.frames import DatasetError
from sgm.data.report import Rejection, nothing_in, require_captions
from sgm.data.sources import Place
from sgm.files import SaveError, refuse_lfs_pointer, write_failed, write_json
from sgm.weights import DTYPES
from sgm.weights.checksums import read_json
from sgm.weights.save import is_finite, save_safetensors

FORMAT = 1
KINDS = ("video", "text", "frame")
KEY_DIGITS = 32


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
    """The folder, opened for one configuration. Several threads may add to it.

    Args:
        identity: everything that determines the values, name -> plain value. Values of None (a weight file that is not
            at hand) are not compared.
        storage: "fp16", "bf16" or "fp32", for a new cache; an old one keeps its own.
        encoded_as: type of the encoders' arithmetic, for a new cache; an old one keeps its own.
        first_frames: a clip counts as held only where its first frame is, too.

    Raises:
        CacheError: the folder was filled under another identity, or holds something else or damaged files.
        SaveError: it cannot be made.
    """

    def __init__(
        self,
        folder: str | Path,
        identity: Mapping[str, Any],
        storage: str = "fp16",
        encoded_as: str = "fp32",
        first_frames: bool = False,
    ):
        self.folder, self.first_frames = Path(folder).expanduser(), first_frames
        self.storage, self.encoded_as = storage, encoded_as
        self.uncompared = [name for name, value in identity.items() if value is None]
        self.identity = json.loads(json.dumps(dict(identity)))  # as it comes back from the file
        self._claim()
        self.shards: list[Path] = []
        self._taking_in = threading.Lock()  # a shard's entries hold its place in `shards`, and several threads add
        self._entries: dict[str, Entry] = {}
        self._seen: dict[FileStamp, Seen] = {}
        self._paths: set[str] = set()
        self._found = {path: path.stat().st_size for path in self.folder.glob("files-*.jsonl")}
        self.refresh()

    def __contains__(self, name: str | None) -> bool:
        return name in self._entries

    def holds_clip(self, key: str | None) -> bool:
        """Whether all is there that is wanted of a video's content."""
        return key in self and (not self.first_frames or frame_key(str(key)) in self)

    def entry(self, name: str) -> Entry:
        """Where `video_key(...)`, `text_key(...)` or `frame_key(...)` is stored. Raises KeyError."""
        return self._entries[name]

    def seen(self, stamp: FileStamp) -> Seen | None:
        """What is known of a file in its present state."""
        return self._seen.get(stamp)

    def was_seen_before(self, path: str | Path) -> bool:
        """Whether some state of the file was recorded."""
        return os.path.abspath(path) in self._paths

    def names(self, kind: str) -> frozenset[str]:
        """All stored names of a kind, one of `KINDS`."""
        return frozenset(name for name in self._entries if name.startswith(f"{kind}:"))

    def refresh(self) -> None:
        """Take in what other processes have added."""
        self._take_in(path for kind in KINDS for path in sorted(self.folder.glob(f"{kind}-*.safetensors")))
        for path in sorted(self.folder.glob("files-*.jsonl")):
            self._read_files(path)

    def add(self, kind: str, tensors: Mapping[str, Tensor]) -> None:
        """Write one shard; what is not in whole numbers is converted to the storage type.

        Raises:
            CacheError: a value leaves the storage type's range.
            SaveError: it cannot be written.
        """
        dtype = DTYPES[self.storage]
        # In an order that the file's name tells: another process that encodes the same clips replaces this file by one
        # with the same layout, so that whoever has read its head goes on reading the right places.
        ordered = {name: tensors[name] for name in sorted(tensors)}
        stored = {name: t.to(dtype) if t.is_floating_point() else t for name, t in ordered.items()}
        for name, tensor in stored.items():
            if not is_finite(tensor):
                raise CacheError(
                    f"{name} has values outside {self.storage}; make a new cache in bf16 or fp32 "
                    "(args.cache_dtype; tools/precompute_cache.py --storage)"
                )
        digest = hashlib.sha256("\n".join([self.storage, *stored]).encode()).hexdigest()[:16]
        path = self.folder / f"{kind}-{digest}.safetensors"
        save_safetensors(path, stored, {"identity": self._digest()})
        self._take_in([path])

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
            content = read_json(head)
            found, version = dict(content["identity"]), content["format"]
            self.storage, self.encoded_as = content["storage"], content["encoded_as"]
            known = version == FORMAT and {self.storage, self.encoded_as} <= DTYPES.keys()
        except (ValueError, KeyError, TypeError) as error:
            raise CacheError(f"{head} is not the head of a cache ({error}); give another folder") from error
        if not known:
            raise CacheError(f"{head} has format {version}, this program reads {FORMAT}; fill a new folder")
        self._compare(found)
        self.identity = found

    def _create(self, head: Path) -> None:
        if self.storage not in DTYPES:
            raise CacheError(f"unknown storage type {self.storage!r}; choose one of {', '.join(DTYPES)}")
        if self.uncompared:
            raise CacheError(
                f"cannot start a cache in {self.folder}: the files behind {', '.join(sorted(self.uncompared))} are "
                "missing; set ckpt_path and model_dir of the configuration"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SaveError(f"cannot make the cache folder {self.folder}: {error.strerror}") from error
        content = {"format": FORMAT, "storage": self.storage, "encoded_as": self.encoded_as, "identity": self.identity}
        write_json(head, content)

    def _compare(self, found: Mapping[str, Any]) -> None:
        other = [
            f"{name} (cache: {found.get(name)}; this run: {self.identity.get(name)})"
            for name in sorted({*found, *self.identity} - {*self.uncompared})
            if found.get(name) != self.identity.get(name)
        ]
        if other:
            raise CacheError(
                f"{self.folder} was filled under another configuration: {'; '.join(other)}. Give another --cache-dir "
                "(one folder for each configuration), or the configuration that filled this one."
            )

    def _digest(self) -> str:
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]

    def _take_in(self, paths: Iterable[Path]) -> None:
        """Index those shards that are new."""
        with self._taking_in:
            known = set(self.shards)
            for path in paths:
                if path not in known:
                    self._index(path)

    def _index(self, path: Path) -> None:
        entries, identity = read_index(path, len(self.shards))
        if identity != self._digest():
            raise CacheError(f"{path} comes from another cache; delete it and fill the cache again")
        self._entries.update(entries)
        self.shards.append(path)

    def _read_files(self, path: Path) -> None:
        refuse_lfs_pointer(path, CacheError)
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


def text_key(text: str) -> str:
    """Name under which a caption's embedding is stored."""
    return "text:" + hashlib.sha256(text.encode()).hexdigest()[:KEY_DIGITS]


def video_key(path: str | Path) -> str:
    """Name under which a video's moments are stored. Reads the whole file; raises OSError."""
    with Place.of(path).open() as file:
        return "video:" + hashlib.file_digest(file, "sha256").hexdigest()[:KEY_DIGITS]


def frame_key(video: str) -> str:
    """Name under which the first frame is stored of the clip that is `video` (see `video_key`)."""
    return "frame:" + video.removeprefix("video:")


@dataclass(frozen=True)
class ScannedClip:
    """A video with its caption. `key`: of the video's content, "" unless that is encoded."""

    path: str
    caption: str
    key: str


@dataclass
class CacheScan:
    """What a cache knows of a folder's clips.

    Attributes:
        usable: both encodings are there. missing: something has to be encoded. rejected: with reasons.
        changed: how many of `missing` were in the cache, and have changed since.
        passed_over: see `sgm.data.sources.Listing`.
    """

    folder: str
    usable: list[ScannedClip] = field(default_factory=list)
    missing: list[ScannedClip] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)
    changed: int = 0
    passed_over: dict[str, int] = field(default_factory=dict)

    def shortfall(self) -> str:
        """What is missing, in a few words."""
        why = f", of which {self.changed} changed since they were cached" if self.changed else ""
        return f"{len(self.missing)} of the clips in {self.folder}{why} (first: {self.missing[0].path})"


def scan_cached(folder: str | Path, source: ClipSource, store: CacheStore) -> CacheScan:
    """Which clips of a folder (or another source) the cache holds. Reads captions and file times, opens no video.

    Raises:
        DatasetError: no such source, nothing in it, or captions missing where `missing_caption` is "error".
    """
    folder = Path(folder).expanduser().absolute()
    clips = source.list_all(folder)
    missing_caption = source.settings.missing_caption
    scan, faults = CacheScan(str(folder), passed_over=clips.passed_over), []
    for clip in clips:
        try:
            caption = caption_of(clip, missing_caption, source.settings.caption_lines).text
        except CaptionError as fault:
            faults.append(fault)
            scan.rejected.append(Rejection(clip.path, str(fault)))
            continue
        _classify(scan, clip.path, caption, store)
    if missing_caption == "error":
        require_captions(folder, faults, len(clips))
    if not (scan.usable or scan.missing or scan.rejected):
        raise DatasetError(nothing_in(folder, scan.passed_over))
    return scan


def _classify(scan: CacheScan, path: str, caption: str, store: CacheStore) -> None:
    try:
        stamp = FileStamp.of(path)
    except OSError as error:
        scan.rejected.append(Rejection(path, f"it cannot be read: {error.strerror}"))
        return
    seen = store.seen(stamp)
    if seen is not None and seen.rejected is not None:
        scan.rejected.append(Rejection(path, seen.rejected))
        return
    clip = ScannedClip(path, caption, seen.key if seen and seen.key and store.holds_clip(seen.key) else "")
    if clip.key and text_key(caption) in store:
        scan.usable.append(clip)
        return
    scan.changed += seen is None and store.was_seen_before(path)
    scan.missing.append(clip)

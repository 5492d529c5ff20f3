"""Clips out of a cache as a torch data set: no video is opened, no encoder needed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Subset

from sgm.cache.store import CacheStore, Entry, FileStamp, ShardReader, text_key
from sgm.data.clips import CaptionError, ClipSettings, caption_of
from sgm.data.dataset import PackedShapes, PackedStrings
from sgm.data.report import DatasetError, Rejection, Report, first_reasons, nothing_in
from sgm.data.sources import ListedClip, passed_over_of
from sgm.modules.autoencoding.strides import STRIDES

MOMENTS, EMBEDDING = "moments", "txt_embedding"  # entries of a batch


@dataclass(frozen=True)
class CaptionedVideo:
    """A video with its caption, and the key of its content where that is known."""

    path: str
    caption: str
    key: str | None = None


@dataclass
class CacheScan:
    """What a cache knows of a folder's clips.

    Attributes:
        usable: both encodings are there. missing: something has to be encoded. rejected: with reasons.
        changed: how many of `missing` were in the cache, and have changed since.
        passed_over: see `sgm.data.sources.Listing`.
    """

    folder: str
    usable: list[CaptionedVideo] = field(default_factory=list)
    missing: list[CaptionedVideo] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)
    changed: int = 0
    passed_over: dict[str, int] = field(default_factory=dict)

    def shortfall(self) -> str:
        """What is missing, in a few words."""
        why = f", of which {self.changed} changed since they were cached" if self.changed else ""
        return f"{len(self.missing)} of the clips in {self.folder}{why} (first: {self.missing[0].path})"


def scan_cached(
    folder: str | Path, settings: ClipSettings, store: CacheStore, list_all: Callable[[Path], list[ListedClip]]
) -> CacheScan:
    """Which clips of a source the cache holds. Reads captions and file times, opens no video.

    Args:
        list_all: lists a source's clips, see `sgm.data.report.list_source`.

    Raises:
        DatasetError: no such source, nothing in it, or captions missing where `settings.missing_caption` is "error".
    """
    folder = Path(folder).expanduser().absolute()
    clips = list_all(folder)
    scan, unnamed = CacheScan(str(folder), passed_over=passed_over_of(clips)), []
    for clip in clips:
        try:
            caption = caption_of(clip, settings.missing_caption)
        except CaptionError as fault:
            unnamed.append(Rejection(str(fault.path), fault.reason))
            scan.rejected.append(Rejection(clip.path, str(fault)))
            continue
        _sort_in(scan, clip.path, caption, store)
    if unnamed and settings.missing_caption == "error":
        raise DatasetError(
            f"{folder}: {len(unnamed)} captions are missing or unreadable: {first_reasons(unnamed)}; add them, or set "
            "missing_caption to 'skip' or 'empty'"
        )
    if not (scan.usable or scan.missing or scan.rejected):
        raise DatasetError(nothing_in(folder, scan.passed_over))
    return scan


def _sort_in(scan: CacheScan, path: str, caption: str, store: CacheStore) -> None:
    try:
        stamp = FileStamp.of(path)
    except OSError as error:
        scan.rejected.append(Rejection(path, f"it cannot be read: {error.strerror}"))
        return
    seen = store.seen(stamp)
    if seen is not None and seen.rejected is not None:
        scan.rejected.append(Rejection(path, seen.rejected))
        return
    key = None if seen is None else seen.key
    if key is not None and key in store and text_key(caption) in store:
        scan.usable.append(CaptionedVideo(path, caption, key))
        return
    scan.changed += seen is None and store.was_seen_before(path)
    scan.missing.append(CaptionedVideo(path, caption, key if key in store else None))


class CachedClips(Dataset):
    """Encoded clips of a folder.

    An item holds `moments` (t, 2c, h, w) and `txt_embedding` (l, d) in the cache's type, `txt`, `num_frames` (pixel
    frames), `fps`, `path`, `index`, and `prior`: this object's attribute, whether the clips are to keep what the model
    knows.

    Args:
        report: file of `sgm.data.report` that says what is usable and what is not.
        write_report: write that file (one rank does).

    Raises:
        DatasetError: nothing usable.
    """

    def __init__(
        self,
        scan: CacheScan,
        store: CacheStore,
        settings: ClipSettings,
        report: str | Path | None = None,
        write_report: bool = True,
    ):
        self.data_dir, self.settings, self.report_path = Path(scan.folder), settings, report
        self.report = Report(scan.folder, asdict(settings), [c.path for c in scan.usable], scan.rejected)
        self.report.passed_over = scan.passed_over
        self.report.require_usable()
        if write_report:
            self.report.tell_passed_over()
        if report is not None and write_report:
            self.report.write(report)
        self.report.usable = []
        self._paths = PackedStrings([clip.path for clip in scan.usable])
        self._captions = PackedStrings([clip.caption for clip in scan.usable])
        self._moments = PackedEntries([store.entry(clip.key) for clip in scan.usable])  # type: ignore[arg-type]
        self._texts = PackedEntries([store.entry(text_key(clip.caption)) for clip in scan.usable])
        self.shapes = PackedShapes([self._moments[k].shape for k in range(len(scan.usable))])
        self.reader = ShardReader(store.shards)
        self.prior = False

    def first_frames(self, frames: int) -> Dataset:
        """The first `frames` pixel frames, 4k + 1, of each clip that is that long; possibly of none.

        Latent frames are stored one after the other, so less is read. They are those of the whole clip: the encoder
        looked back only, but normalised over all of it.
        """
        latents = STRIDES.latent_frames(frames)
        short = copy.copy(self)
        short._moments = FirstFrames(self._moments, latents)
        short.shapes = PackedShapes([(min(latents, t), *rest) for t, *rest in self.shapes])
        held = [k for k, shape in enumerate(self.shapes) if shape[0] >= latents]
        return short if len(held) == len(self) else Subset(short, held)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Raises IndexError, or CacheError where a shard has gone."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"clip {index} of {len(self)}")
        entry, text = self.entries(index)
        return {MOMENTS: self.reader.read(entry), EMBEDDING: self.reader.read(text), **self.facts(index)}

    def entries(self, index: int) -> tuple[Entry, Entry]:
        """Where a clip's moments and embedding lie, for `reader`."""
        return self._moments[index], self._texts[index]

    def facts(self, index: int) -> dict[str, Any]:
        """What an item holds beside these two."""
        index %= len(self)
        return {
            "txt": self._captions[index],
            "num_frames": STRIDES.pixel_frames(self._moments[index].shape[0]),
            "fps": self.settings.fps,
            "path": self._paths[index],
            "index": index,
            "prior": self.prior,
        }


class FirstFrames(Sequence[Entry]):
    """Entries cut after their first `count` latent frames."""

    def __init__(self, entries: Sequence[Entry], count: int):
        self._entries, self._count = entries, count

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Entry:
        entry = self._entries[index]
        return replace(entry, shape=(min(self._count, entry.shape[0]), *entry.shape[1:]))


class PackedEntries(Sequence[Entry]):
    """Entries in arrays, which forked workers share; see `PackedStrings`."""

    def __init__(self, entries: Sequence[Entry]):
        kinds = list(dict.fromkeys((entry.shape, entry.dtype) for entry in entries))
        number = {kind: k for k, kind in enumerate(kinds)}
        self._kinds: list[tuple[tuple[int, ...], torch.dtype]] = kinds
        self._kind = np.array([number[entry.shape, entry.dtype] for entry in entries], np.int32)
        self._shard = np.array([entry.shard for entry in entries], np.int32)
        self._begin = np.array([entry.begin for entry in entries], np.int64)

    def __len__(self) -> int:
        return len(self._shard)

    def __getitem__(self, index: int) -> Entry:
        shape, dtype = self._kinds[self._kind[index]]
        return Entry(int(self._shard[index]), int(self._begin[index]), shape, dtype)

"""Clips out of a cache as a torch data set: no video is opened, no encoder needed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Subset

from sgm.cache.scan import CacheScan
from sgm.cache.shards import Entry, ShardReader
from sgm.cache.store import CacheStore, frame_key, text_key
from sgm.data.clips import ClipSettings
from sgm.data.packed import Packed, PackedShapes, PackedStrings
from sgm.data.report import Report, UsableClip
from sgm.modules.autoencoding.strides import STRIDES

MOMENTS, EMBEDDING, FIRST_FRAME = "moments", "txt_embedding", "first_frame"  # entries of a batch


class CachedClips(Dataset):
    """Encoded clips of a folder.

    An item holds `moments` (t, 2c, h, w) and `txt_embedding` (l, d) in the cache's type, where the store holds them
    `first_frame`, uint8 (3, 8h, 8w), and `txt`, `num_frames` (pixel frames), `fps`, `path`, `index`, and `prior`: this
    object's attribute, whether the clips are to keep what the model knows.

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
        usable = [UsableClip(clip.path) for clip in scan.usable]
        self.report = Report(scan.folder, asdict(settings), usable, scan.rejected, scan.passed_over)
        self.report.require_usable()
        if write_report:
            self.report.warn_of_passed_over()
        if report is not None and write_report:
            self.report.write(report)
        self.report.usable = []
        self._paths = PackedStrings([clip.path for clip in scan.usable])
        self._captions = PackedStrings([clip.caption for clip in scan.usable])
        names = {
            MOMENTS: [clip.key for clip in scan.usable],
            EMBEDDING: [text_key(clip.caption) for clip in scan.usable],
        }
        if store.first_frames:
            names[FIRST_FRAME] = [frame_key(clip.key) for clip in scan.usable]
        self._stored: dict[str, Sequence[Entry]] = {
            part: PackedEntries([store.entry(name) for name in of_clips]) for part, of_clips in names.items()
        }
        self.shapes = PackedShapes([entry.shape for entry in self._stored[MOMENTS]])
        self.reader = ShardReader(store.shards)
        self.prior = False

    def first_frames(self, frames: int) -> CachedClips | Subset:
        """The first `frames` pixel frames, 4k + 1, of each clip that is that long; possibly of none.

        Latent frames are stored one after the other, so less is read. They are those of the whole clip: the encoder
        looked back only, but normalised over all of it.
        """
        latents = STRIDES.latent_frames(frames)
        short = copy.copy(self)
        short._stored = {**self._stored, MOMENTS: FirstFrames(self._stored[MOMENTS], latents)}
        short.shapes = PackedShapes([(min(latents, t), *rest) for t, *rest in self.shapes])
        held = [k for k, shape in enumerate(self.shapes) if shape[0] >= latents]
        return short if len(held) == len(self) else Subset(short, held)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Raises IndexError, or CacheError where a shard has gone."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"clip {index} of {len(self)}")
        tensors = {part: self.reader.read(entry) for part, entry in self.entries(index).items()}
        return {**tensors, **self.facts(index)}

    def entries(self, index: int) -> dict[str, Entry]:
        """Where a clip's tensors lie, for `reader`, by their names in an item."""
        return {part: of_clips[index] for part, of_clips in self._stored.items()}

    def facts(self, index: int) -> dict[str, Any]:
        """What an item holds beside these."""
        index %= len(self)
        return {
            "txt": self._captions[index],
            "num_frames": STRIDES.pixel_frames(self._stored[MOMENTS][index].shape[0]),
            "fps": self.settings.fps,
            "path": self._paths[index],
            "index": index,
            "prior": self.prior,
        }


class FirstFrames(Packed[Entry]):
    """Entries cut after their first `count` latent frames."""

    def __init__(self, entries: Sequence[Entry], count: int):
        self._entries, self._count = entries, count

    def __len__(self) -> int:
        return len(self._entries)

    def item(self, index: int) -> Entry:
        entry = self._entries[index]
        return replace(entry, shape=(min(self._count, entry.shape[0]), *entry.shape[1:]))


class PackedEntries(Packed[Entry]):
    """Places in a cache's shards."""

    def __init__(self, entries: Sequence[Entry]):
        kinds = list(dict.fromkeys((entry.shape, entry.dtype) for entry in entries))
        number = {kind: k for k, kind in enumerate(kinds)}
        self._kinds: list[tuple[tuple[int, ...], torch.dtype]] = kinds
        self._kind = np.array([number[entry.shape, entry.dtype] for entry in entries], np.int32)
        self._shard = np.array([entry.shard for entry in entries], np.int32)
        self._begin = np.array([entry.begin for entry in entries], np.int64)

    def __len__(self) -> int:
        return len(self._shard)

    def item(self, index: int) -> Entry:
        shape, dtype = self._kinds[self._kind[index]]
        return Entry(int(self._shard[index]), int(self._begin[index]), shape, dtype)

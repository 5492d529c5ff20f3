"""Clips out of a cache as a torch data set, and batches of them: no video is opened, no encoder needed.

Batches are read ahead by threads. A clip's bytes come from the file into their place in the batch by one system call,
during which Python goes on. Worker processes would add a copy of every batch into memory shared with them, and another
one out of it.
"""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, default_collate

from sgm.cache.shards import Entry, ShardReader
from sgm.cache.store import CacheScan, CacheStore, frame_key, text_key
from sgm.data.clips import ClipSettings
from sgm.data.dataset import Packed, PackedShapes, PackedStrings
from sgm.data.frames import DatasetError
from sgm.data.loader import require_one_shape
from sgm.data.report import Report
from sgm.data.sampler import ClipSampler
from sgm.data.sources import ListedClip
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
        usable = [ListedClip(clip.path) for clip in scan.usable]
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


class CachedBatches:
    """Endless batches of one rank, as `sgm.data.loader` makes them, in the cache's type.

    For `sgm.data.loader.create_loader` in place of its worker processes.

    Args:
        dataset: a `CachedClips`, or parts (`Subset`) and joins (`ConcatDataset`) of such.
        sampler: which clips, in which order, whatever the number of threads.
        threads: that read, each a batch at a time; 0 reads a batch when it is asked for.
        ahead: batches that each thread reads ahead.
        pin: page-locked memory, for fast copies to the GPU.
    """

    def __init__(self, dataset: Dataset, sampler: ClipSampler, batch_size: int, threads: int, ahead: int, pin: bool):
        self.dataset, self.sampler, self.batch_size = dataset, sampler, batch_size
        self.threads, self.ahead, self.pin = threads, ahead, pin

    def __iter__(self) -> Iterator[dict[str, Any]]:
        numbers = iter(self.sampler)
        if not self.threads:
            while True:
                yield self._read(list(islice(numbers, self.batch_size)))
        pool = ThreadPoolExecutor(self.threads, "cached-clips")
        coming: deque[Future[dict[str, Any]]] = deque()
        try:
            while True:
                while len(coming) < self.threads * self.ahead:
                    coming.append(pool.submit(self._read, list(islice(numbers, self.batch_size))))
                yield coming.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _read(self, numbers: Sequence[int]) -> dict[str, Any]:
        return read_batch([find_clip(self.dataset, number) for number in numbers], self.pin)


def read_batch(clips: Sequence[tuple[CachedClips, int]], pin: bool = False) -> dict[str, Any]:
    """The batch that `collate` makes of these clips (data set, index), read without a copy.

    Raises:
        DatasetError: clips of different sizes.
        CacheError: a shard has gone.
    """
    facts = default_collate([dataset.facts(index) for dataset, index in clips])
    entries = [dataset.entries(index) for dataset, index in clips]
    require_one_shape([of_clip[MOMENTS].shape for of_clip in entries], facts["path"], "encoded ")
    datasets = [dataset for dataset, _ in clips]
    tensors = {name: _read_all(datasets, [of_clip[name] for of_clip in entries], pin) for name in entries[0]}
    return {**tensors, **facts}


def _read_all(datasets: Sequence[CachedClips], entries: Sequence[Entry], pin: bool) -> Tensor:
    """Entries of one shape and type as one tensor (b, ...)."""
    first = entries[0]
    batch = torch.empty(len(entries), *first.shape, dtype=first.dtype, pin_memory=pin)
    rows: np.ndarray = batch.flatten(1).view(torch.uint8).numpy()
    for dataset, entry, row in zip(datasets, entries, rows, strict=True):
        dataset.reader.read_into(entry, memoryview(row))
    return batch


# --- data sets made of others -------------------------------------------------------------------------------------


def in_lengths(dataset: Dataset, lengths: Sequence[int]) -> Dataset:
    """Each cached clip once in every one of `lengths` (pixel frames) that it has, from its beginning.

    Raises:
        DatasetError: no clip has so many frames.
    """
    parts = [part for frames in lengths if len(part := _first_frames(dataset, frames))]
    if not parts:
        raise DatasetError(f"args.cache_lengths is {list(lengths)}, and every cached clip is shorter than that")
    return ConcatDataset(parts)


def _first_frames(dataset: Dataset, frames: int) -> CachedClips | Subset:
    if isinstance(dataset, CachedClips):
        return dataset.first_frames(frames)
    if not isinstance(dataset, Subset):
        raise TypeError(f"{type(dataset).__name__} is neither CachedClips nor a part of them")
    short = _first_frames(dataset.dataset, frames)
    if not isinstance(short, Subset):
        return Subset(short, dataset.indices)
    held = set(short.indices)
    return Subset(short.dataset, [index for index in dataset.indices if index in held])


def find_clip(dataset: Dataset, index: int) -> tuple[CachedClips, int]:
    """The innermost data set that holds clip `index` of `dataset`, and the clip's number there."""
    while not isinstance(dataset, CachedClips):
        if isinstance(dataset, Subset):
            index = dataset.indices[index]
            dataset = dataset.dataset
        elif isinstance(dataset, ConcatDataset):
            part = bisect_right(dataset.cumulative_sizes, index)
            index -= dataset.cumulative_sizes[part - 1] if part else 0
            dataset = dataset.datasets[part]
        else:
            raise TypeError(f"{type(dataset).__name__} does not consist of CachedClips")
    return dataset, index

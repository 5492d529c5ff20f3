"""Batches of cached clips, read ahead by threads.

A clip's bytes come from the file into their place in the batch by one system call, during which Python goes on. Worker
processes would add a copy of every batch into memory shared with them, and another one out of it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, default_collate

from sgm.cache.dataset import MOMENTS, CachedClips
from sgm.cache.shards import Entry
from sgm.data.collate import require_one_shape
from sgm.data.report import DatasetError
from sgm.data.sampler import ClipSampler


class CachedBatches:
    """Endless batches of one rank, as `sgm.data.collate` makes them, in the cache's type.

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
        CollateError: clips of different sizes.
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

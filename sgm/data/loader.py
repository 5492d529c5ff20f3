"""Batches of clips: worker processes, or threads where clips come from a cache, and a position that can be saved."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from sgm.cache.batches import CachedBatches, all_cached
from sgm.data.buckets import BucketSampler
from sgm.data.collate import collate
from sgm.data.sampler import ClipSampler


class ClipLoader:
    """Endless batches of one rank, with the position of what was handed out (not of what was read ahead).

    Iterating again goes on in the same stream. Use as a context manager, or `close()`, to end the workers.
    """

    def __init__(self, build: Callable[[], DataLoader | CachedBatches], sampler: ClipSampler):
        self.sampler = sampler
        self._build = build
        self._loader: DataLoader | CachedBatches | None = build()
        self._iterator: Iterator | None = None
        self._consumed = sampler.consumed
        self.dataset = self._loader.dataset
        self.batch_size = self._loader.batch_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        if self._loader is None:
            raise RuntimeError("this loader was closed")
        if self._iterator is None:
            self._iterator = iter(self._loader)
        batch = next(self._iterator)
        self._consumed += self.batch_size * self.sampler.world_size
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Position after the last batch that was handed out, the same on every rank."""
        return self.sampler.state_dict(self._consumed)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the batch that `state` was taken at; what was read ahead is dropped."""
        self.sampler.load_state_dict(state)
        self._consumed = self.sampler.consumed
        self.close()
        self._loader = self._build()

    def close(self) -> None:
        """End the workers. Only `load_state_dict` opens the loader again."""
        self._iterator = None
        self._loader = None

    def __enter__(self) -> ClipLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def create_loader(
    datasets: Dataset | Sequence[Dataset],
    batch_size: int = 1,
    num_workers: int = 0,
    sampler: ClipSampler | None = None,
    *,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    order: str = "shuffle",
    weights: Sequence[float] | None = None,
    prefetch: int = 2,
    pin_memory: bool | None = None,
    start_method: str | None = None,
) -> ClipLoader:
    """Endless, resumable batches from one or several data sets.

    Args:
        batch_size: clips in a batch of one rank.
        num_workers: decoding workers; 0 decodes in this process (and its decoding process). Cached clips are read by
            as many threads, or when they are asked for.
        sampler: the order; by default `ClipSampler` from `seed`, `rank`, `world_size`, `order` and `weights`, or
            `BucketSampler` where clips of several shapes are to share batches in the order "shuffle".
        prefetch: batches that each worker reads ahead.
        pin_memory: for fast copies to the GPU; by default where CUDA is there.
        start_method: "fork" or "spawn"; by default the platform's.
    """
    sources = [datasets] if isinstance(datasets, Dataset) else list(datasets)
    if not sources:
        raise ValueError("no data sets to load from")
    if batch_size < 1 or num_workers < 0:
        raise ValueError(f"batch_size is {batch_size} and num_workers {num_workers}; at least 1 and 0 are needed")
    if sampler is None:
        sampler = _sampler_for(sources, batch_size, seed, rank, world_size, order, weights)
    dataset = sources[0] if len(sources) == 1 else ConcatDataset(sources)
    pin = torch.cuda.is_available() if pin_memory is None else pin_memory
    if all_cached(dataset):
        return ClipLoader(partial(CachedBatches, dataset, sampler, batch_size, num_workers, prefetch, pin), sampler)
    parallel = {"prefetch_factor": prefetch, "persistent_workers": True, "multiprocessing_context": start_method}
    build = partial(
        DataLoader,
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=pin,
        worker_init_fn=prepare_worker,
        generator=torch.Generator().manual_seed(_worker_seed(sampler)),
        **(parallel if num_workers else {}),
    )
    return ClipLoader(build, sampler)


def _sampler_for(
    sources: Sequence[Dataset],
    batch_size: int,
    seed: int,
    rank: int,
    world_size: int,
    order: str,
    weights: Sequence[float] | None,
) -> ClipSampler:
    shapes = [shapes_of(source) for source in sources]
    if order == "shuffle" and batch_size > 1 and None not in shapes:
        if len({shape for of_source in shapes for shape in of_source}) > 1:  # type: ignore[union-attr]
            return BucketSampler(shapes, batch_size, seed, rank, world_size, weights)  # type: ignore[arg-type]
    return ClipSampler([len(s) for s in sources], seed, rank, world_size, order, weights)  # type: ignore[arg-type]


def shapes_of(dataset: Dataset) -> Sequence[tuple[int, ...]] | None:
    """Shape of each clip of a data set, where it was looked at."""
    if isinstance(dataset, Subset):
        whole = shapes_of(dataset.dataset)
        return None if whole is None else [whole[index] for index in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        parts = [shapes_of(part) for part in dataset.datasets]
        return None if None in parts else [shape for part in parts for shape in part]  # type: ignore[union-attr]
    return getattr(dataset, "shapes", None)


def heed_parent_only() -> None:
    """In a worker: let the parent alone stop this process.

    Schedulers and terminals send SIGTERM and SIGINT to every process of a job; a worker that died of one would take its
    parent along before that has saved. The parent's own SIGTERM (it ends workers so) still counts.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_at_word_of, args=(os.getppid(),), daemon=True).start()


def _end_at_word_of(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def prepare_worker(worker_id: int) -> None:
    """In a worker: heed the parent only, and seed Python's and numpy's generators, too, as torch has seeded its own."""
    heed_parent_only()
    seed = torch.initial_seed()
    random.seed(seed)
    np.random.seed(seed % 2**32)


def _worker_seed(sampler: ClipSampler) -> int:
    words = np.random.SeedSequence([sampler.seed % 2**64, sampler.rank]).generate_state(2)
    return int(words[0]) << 31 | int(words[1]) >> 1

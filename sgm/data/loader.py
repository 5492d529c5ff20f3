"""Endless, resumable batches of clips: their order, worker processes that read them, a position that can be saved."""

from __future__ import annotations

import math
import multiprocessing.util
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, default_collate, get_worker_info

from sgm.data.buckets import BucketSampler
from sgm.data.frames import DatasetError
from sgm.data.sampler import ClipSampler, SamplerState

_SOCKET = len("/pymp-12345678/listener-12345678")  # what multiprocessing puts behind the folder of temporary files
_LONGEST = 100  # bytes of a socket's path; macOS has room for 103


def meet_in_short_folder() -> None:
    """Let this process and its workers exchange tensors although the path of $TMPDIR may be long.

    They do it by sockets in the folder of temporary files. Where its path is too long for one, Python 3.11 raises in a
    thread of the worker, and whoever waits for a batch waits for ever; later releases choose /tmp by themselves, too
    (cpython issue 132124). Without effect where the folder is in use already.
    """
    if len(os.fsencode(tempfile.gettempdir())) + _SOCKET <= _LONGEST:
        return
    before = tempfile.tempdir
    tempfile.tempdir = "/tmp"
    try:
        multiprocessing.util.get_temp_dir()  # made now, known to the workers, removed at the end
    finally:
        tempfile.tempdir = before


def leave_signals_to_parent(worker_id: int) -> None:
    """Let the parent alone stop this worker.

    Schedulers and terminals send SIGTERM and SIGINT to every process of a job; a worker that died of one would take its
    parent along before that has saved. The parent's own SIGTERM (it ends workers so) still counts.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_sigterm_from, args=(os.getppid(),), daemon=True).start()


def _exit_on_sigterm_from(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def empty_to_hand_over(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A contiguous tensor without values; in a worker it lies in memory that its parent gets without a copy."""
    if get_worker_info() is None:
        return torch.empty(tuple(shape), dtype=dtype)
    storage = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize)  # as torch's own collate does
    return torch.empty(0, dtype=dtype).set_(storage).view(*shape)


Batch = dict[str, Any]
Batches = Iterable[Batch]  # endless; iterating starts anew at the sampler's position


# (data set, sampler, clips in a batch, workers, batches that each reads ahead, pin) -> batches, see `read_in_processes`
ReadBatches = Callable[[Dataset, ClipSampler, int, int, int, bool], Batches]


class ClipLoader:
    """Endless batches of one rank, with the position of what was handed out (not of what was read ahead).

    Iterating again goes on in the same stream. Use as a context manager, or `close()`, to end the workers.
    """

    def __init__(self, build: Callable[[], Batches], sampler: ClipSampler, batch_size: int):
        self.sampler, self.batch_size = sampler, batch_size
        self._build = build
        self._batches: Batches | None = build()
        self._iterator: Iterator[Batch] | None = None
        self._consumed = sampler.consumed

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            raise RuntimeError("this loader was closed")
        if self._iterator is None:
            self._iterator = iter(self._batches)
        batch = next(self._iterator)
        self._consumed += self.batch_size * self.sampler.world_size
        return batch

    @property
    def consumed(self) -> int:
        """Clips that all ranks together were handed out so far."""
        return self._consumed

    def state_dict(self) -> SamplerState:
        """Position after the last batch that was handed out, the same on every rank."""
        return self.sampler.state_dict(self._consumed)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the batch that `state` was taken at; what was read ahead is dropped."""
        self.sampler.load_state_dict(state)
        self._consumed = self.sampler.consumed
        self.close()
        self._batches = self._build()

    def close(self) -> None:
        """End the workers. Only `load_state_dict` opens the loader again."""
        self._iterator = None
        self._batches = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def create_loader(
    datasets: Dataset | Sequence[Dataset],
    batch_size: int = 1,
    num_workers: int = 0,
    *,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    order: str = "shuffle",
    weights: Sequence[float] | None = None,
    prefetch: int = 2,
    read: ReadBatches | None = None,
) -> ClipLoader:
    """Endless, resumable batches from one or several data sets.

    Args:
        num_workers: decoding workers; 0 decodes in this process (and its decoding process).
        seed, rank, world_size, order, weights: see `ClipSampler`; where clips of several shapes are to share batches in
            the order "shuffle", it is a `BucketSampler`.
        prefetch: batches that each worker reads ahead.
        read: how batches are read; by default `read_in_processes`.
    """
    sources = [datasets] if isinstance(datasets, Dataset) else list(datasets)
    if not sources:
        raise ValueError("no data sets to load from")
    if batch_size < 1 or num_workers < 0:
        raise ValueError(f"batch_size is {batch_size} and num_workers {num_workers}; at least 1 and 0 are needed")
    shapes = known_shapes(sources) if order == "shuffle" and batch_size > 1 else None
    sampler: ClipSampler
    if shapes and len({shape for of_source in shapes for shape in of_source}) > 1:
        sampler = BucketSampler(shapes, batch_size, seed, rank, world_size, weights)
    else:
        sampler = ClipSampler([clip_count(source) for source in sources], seed, rank, world_size, order, weights)
    dataset = sources[0] if len(sources) == 1 else ConcatDataset(sources)
    pin = torch.cuda.is_available()
    build = partial(read or read_in_processes, dataset, sampler, batch_size, num_workers, prefetch, pin)
    return ClipLoader(build, sampler, batch_size)


def read_in_processes(
    dataset: Dataset, sampler: ClipSampler, batch_size: int, workers: int, ahead: int, pin: bool
) -> Batches:
    """Batches by torch's worker processes, in the order of `sampler`.

    Args:
        workers: that read at the same time; 0 reads when a batch is asked for. ahead: batches that each reads ahead.
        pin: batches in page-locked memory, for fast copies to the GPU.
    """
    words = np.random.SeedSequence([sampler.seed % 2**64, sampler.rank]).generate_state(2)
    if workers:
        meet_in_short_folder()
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin,
        worker_init_fn=leave_signals_to_parent,
        generator=torch.Generator().manual_seed(int(words[0]) << 31 | int(words[1]) >> 1),
        prefetch_factor=ahead if workers else None,
        persistent_workers=workers > 0,
    )


def clip_count(dataset: Dataset) -> int:
    """Length of a data set; every one here has one, although torch's class declares none."""
    return len(dataset)  # type: ignore[arg-type]


def known_shapes(datasets: Sequence[Dataset]) -> list[Sequence[tuple[int, ...]]] | None:
    """Shape of each clip of each data set; None unless all were looked at."""
    shapes = [_shapes_of(dataset) for dataset in datasets]
    known = [of_one for of_one in shapes if of_one is not None]
    return known if len(known) == len(shapes) else None


def _shapes_of(dataset: Dataset) -> Sequence[tuple[int, ...]] | None:
    if isinstance(dataset, Subset):
        whole = _shapes_of(dataset.dataset)
        return None if whole is None else [whole[index] for index in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        parts = known_shapes(dataset.datasets)
        return None if parts is None else [shape for part in parts for shape in part]
    return getattr(dataset, "shapes", None)


def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stack clips: `mp4` (b, f, 3, h, w) or `moments` (b, t, 2c, h, w), `num_frames` and `fps` (b,), texts as lists.

    Raises:
        DatasetError: clips of different sizes; names them.
    """
    kind = "mp4" if "mp4" in items[0] else "moments"
    names = [item.get("path", f"clip {i}") for i, item in enumerate(items)]
    require_one_shape([tuple(item[kind].shape) for item in items], names, "" if kind == "mp4" else "encoded ")
    if len(items) > 1:
        return default_collate(list(items))
    (item,) = items  # its frames as they lie: a copy would be as large again
    rest = default_collate([{name: value for name, value in item.items() if name != kind}])
    return {name: item[kind][None] if name == kind else rest[name] for name in item}


def require_one_shape(shapes: Sequence[tuple[int, ...]], names: Sequence[str], frames: str = "") -> None:
    """Whether clips (frames, ..., h, w) fit into one batch; `frames` is said before that word.

    Raises:
        DatasetError: they do not; names all.
    """
    if len(set(shapes)) <= 1:
        return
    listed = ", ".join(
        f"{name} has {shape[0]} {frames}frames of {shape[-2]}x{shape[-1]}"
        for name, shape in zip(names, shapes, strict=True)
    )
    raise DatasetError(
        f"clips of unequal size cannot share a batch: {listed}; use a batch size of 1 (gradient accumulation makes "
        "up for it), or give all clips one length: videos long enough for max_num_frames, or a smaller one"
    )

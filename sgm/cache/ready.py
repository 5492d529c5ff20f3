"""A cache brought to completeness by all ranks together, and the data sets that read it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sgm.cache.dataset import CachedClips
from sgm.cache.fill import FillSettings, fill
from sgm.cache.identity import cache_identity, cached_source, starts_from_picture
from sgm.cache.scan import CacheScan, scan_cached
from sgm.cache.shards import CacheError
from sgm.cache.store import CacheStore
from sgm.config import AccelerateArgs
from sgm.data.clips import ClipSettings
from sgm.data.section import ClipSource
from sgm.distributed import DistInfo, from_first, wait_for_all
from sgm.modules.ops.choice import choose_kernels


@dataclass(frozen=True)
class CacheRequest:
    """The cache that a run wants.

    Attributes:
        folder: of the cache.
        model, data: sections of the configuration whose encodings it holds.
        clips: data folders (or other sources) whose clips must be in it.
        storage: type of a new cache's values. dtype: of the encoders' arithmetic, for a new cache.
        fill: encode what is missing; False refuses.
        workers, batch_size, low_memory: see `FillSettings`.
        accelerate: chooses the VAE's kernels.
    """

    folder: str
    model: Mapping[str, Any]
    data: Mapping[str, Any] | None
    clips: Sequence[str]
    storage: str
    dtype: str
    fill: bool
    workers: int
    batch_size: int | None
    low_memory: bool
    accelerate: AccelerateArgs


@dataclass(frozen=True)
class ReadyCache:
    """A complete cache. `scans` has what was found in each data folder."""

    store: CacheStore
    settings: ClipSettings
    scans: dict[str, CacheScan]

    def datasets(self, folders: Sequence[str], reports: Path, name: str) -> list[CachedClips]:
        """One data set a folder; rank 0 writes `reports/NAME_k.jsonl`.

        Raises:
            DatasetError: a folder without usable clips.
        """
        writes = dist.get_rank() == 0
        return [
            CachedClips(self.scans[folder], self.store, self.settings, reports / f"{name}_{k}.jsonl", writes)
            for k, folder in enumerate(folders)
        ]


def ready_cache(request: CacheRequest, info: DistInfo, say: Callable[[str], None]) -> ReadyCache:
    """Open a cache and encode what it lacks. Collective.

    Raises:
        CacheError: foreign or damaged; or something is missing and `request.fill` is false.
        WeightsError: something is missing, and an encoder is not there to make it.
    """
    source = cached_source(request.data)
    store = _open(request, source.settings, info.rank)
    if info.rank == 0:
        for note in _differences(store, request.dtype):
            say(f"note: {note}")
    scans = _scan(store, source, request.clips)
    lacking = "; ".join(scan.shortfall() for scan in scans if scan.missing)
    if lacking:
        if not request.fill:
            raise CacheError(
                f"{store.folder} lacks {lacking}. Fill it (tools/precompute_cache.py CONFIG.yaml --cache-dir DIR), or "
                "leave out args.cache_fill"
            )
        say(f"cache: encoding {lacking}")
        _fill(store, request, source.settings, scans, info, say)
        scans = _scan(store, source, request.clips)
        _require_complete(store, scans)
    if info.device.type == "cuda":
        torch.cuda.empty_cache()
    for scan in scans:
        say(f"cache: {scan.folder}: {len(scan.usable)} clips, {len(scan.rejected)} rejected")
    return ReadyCache(store, source.settings, dict(zip(request.clips, scans, strict=True)))


def _open(request: CacheRequest, settings: ClipSettings, rank: int) -> CacheStore:
    """The store; rank 0 makes the folder where there is none."""

    def opened() -> CacheStore:
        identity = cache_identity(request.model, settings)
        pictures = starts_from_picture(request.model)
        return CacheStore(request.folder, identity, request.storage, request.dtype, first_frames=pictures)

    store = opened() if rank == 0 else None
    wait_for_all()
    return store or opened()


def _scan(store: CacheStore, source: ClipSource, folders: Sequence[str]) -> list[CacheScan]:
    # One rank looks: others might see a file system that lags behind, and disagree on the number of clips.
    return from_first(lambda: [scan_cached(folder, source, store) for folder in folders])


def _fill(
    store: CacheStore,
    request: CacheRequest,
    settings: ClipSettings,
    scans: Sequence[CacheScan],
    info: DistInfo,
    say: Callable[[str], None],
) -> None:
    """This rank's share of what is missing, then the others'."""
    fast = request.accelerate
    how = FillSettings(
        info.device, request.workers, request.batch_size, request.low_memory, info.rank, info.world_size,
        choose_kernels(fast.kernels, fast.attention, info.device, fast.cpu_bf16),
    )  # fmt: skip
    missing = [clip for scan in scans for clip in scan.missing]
    fill(store, request.model, missing, settings, how, say)
    wait_for_all()
    store.refresh()


def _require_complete(store: CacheStore, scans: Sequence[CacheScan]) -> None:
    left = [scan.shortfall() for scan in scans if scan.missing]
    if left:
        raise CacheError(f"{store.folder} still lacks {'; '.join(left)}: the files change while they are read")


def _differences(store: CacheStore, dtype: str) -> list[str]:
    """What a user should know of a cache that fits."""
    notes = [f"{store.folder}: {name} cannot be compared, the files are not here" for name in store.uncompared]
    if store.encoded_as != dtype:
        notes.append(f"{store.folder} was encoded in {store.encoded_as}, this run computes in {dtype}")
    return notes

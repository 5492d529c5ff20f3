"""A cache brought to completeness by all ranks together, and the data sets that read it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sgm.cache.dataset import CachedClips
from sgm.cache.fill import FillSettings, fill
from sgm.cache.identity import cache_identity, cached_source, starts_from_picture
from sgm.cache.shards import CacheError
from sgm.cache.store import CacheScan, CacheStore, scan_cached
from sgm.config import RunConfig
from sgm.data.clips import ClipSettings
from sgm.data.dataset import ClipSource
from sgm.distributed import DistInfo, from_first, wait_for_all
from sgm.modules.ops.choice import choose_kernels


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


def ready_cache(
    config: RunConfig[Any], dtype: str, info: DistInfo, say: Callable[[str], None], batch_size: int | None = None
) -> ReadyCache:
    """Open a cache and encode what it lacks. Collective.

    Args:
        config: of a training: its `args` name the folder (`cache_dir`), the data folders whose clips must be in it, the
            type of a new cache's values, and whether what is missing is encoded or refused (`cache_fill`).
        dtype: of the encoders' arithmetic, for a new cache.
        batch_size: see `FillSettings`.
    Raises:
        CacheError: foreign or damaged; or something is missing and is not to be encoded.
        WeightsError: something is missing, and an encoder is not there to make it.
    """
    source = cached_source(config.data)
    store = _open(config, dtype, source.settings, info.rank)
    if info.rank == 0:
        for note in _differences(store, dtype):
            say(f"note: {note}")
    folders = config.args.data_folders
    scans = _scan(store, source, folders)
    lacking = "; ".join(scan.shortfall() for scan in scans if scan.missing)
    if lacking:
        if not config.args.cache_fill:
            raise CacheError(
                f"{store.folder} lacks {lacking}. Fill it (tools/precompute_cache.py CONFIG.yaml --cache-dir DIR), or "
                "leave out args.cache_fill"
            )
        say(f"cache: encoding {lacking}")
        missing = [clip for scan in scans for clip in scan.missing]
        fill(store, config.model, missing, source.settings, _how_to_fill(config, info, batch_size), say)
        wait_for_all()
        store.refresh()
        scans = _scan(store, source, folders)
        if left := [scan.shortfall() for scan in scans if scan.missing]:
            raise CacheError(f"{store.folder} still lacks {'; '.join(left)}: the files change while they are read")
    if info.device.type == "cuda":
        torch.cuda.empty_cache()
    for scan in scans:
        say(f"cache: {scan.folder}: {len(scan.usable)} clips, {len(scan.rejected)} rejected")
    return ReadyCache(store, source.settings, dict(zip(folders, scans, strict=True)))


def _open(config: RunConfig[Any], dtype: str, settings: ClipSettings, rank: int) -> CacheStore:
    """The store; rank 0 makes the folder where there is none."""

    def opened() -> CacheStore:
        identity, pictures = cache_identity(config.model, settings), starts_from_picture(config.model)
        return CacheStore(config.args.cache_dir, identity, config.args.cache_dtype, dtype, first_frames=pictures)

    store = opened() if rank == 0 else None
    wait_for_all()
    return store or opened()


def _how_to_fill(config: RunConfig[Any], info: DistInfo, batch_size: int | None) -> FillSettings:
    args, fast = config.args, config.accelerate
    kernels = choose_kernels(fast.kernels, fast.attention, info.device, fast.cpu_bf16)
    return FillSettings(
        info.device, args.num_workers, batch_size, args.vae_low_memory, info.rank, info.world_size, kernels
    )


def _scan(store: CacheStore, source: ClipSource, folders: Sequence[str]) -> list[CacheScan]:
    # One rank looks: others might see a file system that lags behind, and disagree on the number of clips.
    return from_first(lambda: [scan_cached(folder, source, store) for folder in folders])


def _differences(store: CacheStore, dtype: str) -> list[str]:
    """What a user should know of a cache that fits."""
    notes = [f"{store.folder}: {name} cannot be compared, the files are not here" for name in store.uncompared]
    if store.encoded_as != dtype:
        notes.append(f"{store.folder} was encoded in {store.encoded_as}, this run computes in {dtype}")
    return notes

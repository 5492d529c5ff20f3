"""A cache brought to completeness by all ranks together, and the data sets that read it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from sgm.cache.dataset import CachedClips, CacheScan
from sgm.cache.fill import FillSettings, fill
from sgm.cache.identity import cache_identity, cached_datasets, clip_settings, open_store, scan_folders
from sgm.cache.store import CacheError, CacheStore
from sgm.config import RunConfig
from sgm.data.clips import ClipSettings
from sgm.distributed import DistInfo, from_first, wait_for_all
from sgm.modules.ops.choice import choose_kernels
from sgm.training.options import TrainArgs


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
        scans = [self.scans[folder] for folder in folders]
        return cached_datasets(scans, self.store, self.settings, reports, name, dist.get_rank() == 0)


def ready_cache(
    config: RunConfig[TrainArgs],
    dtype: str,
    info: DistInfo,
    say: Callable[..., None],
    batch_size: int | None = None,
) -> ReadyCache:
    """Open `args.cache_dir` for a configuration and encode what it lacks of the data folders. Collective.

    Args:
        dtype: of the encoders' arithmetic, for a new cache.
        batch_size: clips through the VAE at a time, see `FillSettings`.

    Raises:
        CacheError: foreign or damaged; or something is missing and `args.cache_fill` is false.
        WeightsError: something is missing, and an encoder is not there to make it.
    """
    args = config.args
    settings, _ = clip_settings(config.data)
    store = _open(config, settings, dtype, info.rank)
    if info.rank == 0:
        for note in _differences(store, dtype, cache_identity(config.model, settings)):
            say(f"note: {note}", flush=True)
    folders = args.data_folders
    scans = _scan(store, config, folders)
    short = [scan for scan in scans if scan.missing]
    if short:
        lacking = "; ".join(scan.shortfall() for scan in short)
        if not args.cache_fill:
            raise CacheError(
                f"{store.folder} lacks {lacking}. Fill it with tools/precompute_cache.py, or leave out args.cache_fill"
            )
        say(f"cache: encoding {lacking}", flush=True)
        fast = config.accelerate
        how = FillSettings(
            info.device, args.num_workers, batch_size, args.vae_low_memory, info.rank, info.world_size,
            choose_kernels(fast.kernels, fast.attention, info.device, fast.cpu_bf16),
        )  # fmt: skip
        fill(store, config.model, [clip for scan in short for clip in scan.missing], settings, how,
             lambda line: say(line, flush=True))  # fmt: skip
        wait_for_all()
        store.refresh()
        scans = _scan(store, config, folders)
        _require_complete(store, scans)
    if info.device.type == "cuda":
        torch.cuda.empty_cache()
    for scan in scans:
        say(f"cache: {scan.folder}: {len(scan.usable)} clips, {len(scan.rejected)} rejected", flush=True)
    return ReadyCache(store, settings, dict(zip(folders, scans, strict=True)))


def _open(config: RunConfig[TrainArgs], settings: ClipSettings, dtype: str, rank: int) -> CacheStore:
    """The store; rank 0 makes the folder where there is none."""
    args = config.args

    def opened() -> CacheStore:
        return open_store(args.cache_dir, config.model, settings, args.cache_dtype, dtype)  # type: ignore[arg-type]

    store = opened() if rank == 0 else None
    wait_for_all()
    return store or opened()


def _scan(store: CacheStore, config: RunConfig[TrainArgs], folders: Sequence[str]) -> list[CacheScan]:
    # One rank looks: others might see a file system that lags behind, and disagree on the number of clips.
    return from_first(lambda: scan_folders(store, config.data, folders))


def _require_complete(store: CacheStore, scans: Sequence[CacheScan]) -> None:
    left = [scan.shortfall() for scan in scans if scan.missing]
    if left:
        raise CacheError(f"{store.folder} still lacks {'; '.join(left)}: the files change while they are read")


def _differences(store: CacheStore, dtype: str, identity: dict[str, object]) -> list[str]:
    """What a user should know of a cache that fits."""
    notes = [
        f"{store.folder}: {name} cannot be compared, the files are not here"
        for name, value in identity.items()
        if value is None
    ]
    if store.encoded_as != dtype:
        notes.append(f"{store.folder} was encoded in {store.encoded_as}, this run computes in {dtype}")
    return notes

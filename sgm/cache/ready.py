"""Whose cache it is (all that determines the encodings), and a cache made complete by all ranks together."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sgm.cache.dataset import CachedClips
from sgm.cache.fill import FillSettings, fill
from sgm.cache.shards import CacheError
from sgm.cache.store import CacheScan, CacheStore, scan_cached
from sgm.config import ConfigError, RunConfig
from sgm.data.clips import ClipSettings
from sgm.data.dataset import ClipSource, DataSection
from sgm.distributed import DistInfo, from_first, wait_for_all
from sgm.modules.encoders import t5_files
from sgm.modules.encoders.modules import T5_XXL, FrozenT5Embedder
from sgm.modules.ops.choice import choose_kernels
from sgm.util import get_obj_from_str, split_config
from sgm.weights import weights_fingerprint

TEXT_KEY = "txt"  # entry of a batch with the captions


def cache_identity(model: Mapping[str, Any], settings: ClipSettings) -> dict[str, Any]:
    """Everything that determines the encodings; None for weights that are not at hand.

    Raises:
        ConfigError: parts that no cache can stand for.
    """
    stage, text = encoder_params(model)
    coder_target, coder = split_config(stage["encoder_config"])
    checkpoint = Path(stage.get("ckpt_path") or "").expanduser()
    identity: dict[str, Any] = {
        "vae weights": weights_fingerprint(checkpoint) if checkpoint.is_file() else None,
        "vae encoder": json.dumps([get_obj_from_str(coder_target).__qualname__, coder], sort_keys=True),
        "text encoder weights": _text_fingerprint(text.get("model_dir", T5_XXL), text.get("cache_dir")),
        "max_length": int(text.get("max_length", 77)),
        "video_size": list(settings.video_size),
        "fps": settings.fps,
        "max_num_frames": settings.max_num_frames,
        "skip_frms_num": settings.skip_frames,
        "sampling": settings.sampling,
    }
    if settings.interlaced != "deinterlace":
        identity["interlaced"] = settings.interlaced
    if settings.buckets:
        for name in ("video_size", "max_num_frames"):
            del identity[name]
        identity |= {"buckets": [list(bucket) for bucket in settings.buckets], "max_crop": settings.max_crop}
    return identity


def starts_from_picture(model: Mapping[str, Any]) -> bool:
    """Whether a `model:` section is of an image-to-video model, see `SATVideoDiffusionEngine`."""
    reads = model.get("noised_image_input")
    network = (model.get("network_config") or {}).get("params") or {}
    return bool(network.get("in_channels", 0) > network.get("out_channels", 0) if reads is None else reads)


def cached_source(data: Mapping[str, Any] | None) -> ClipSource:
    """How clips are taken and listed by a `data:` section.

    Raises:
        ConfigError: no such section, one whose clips no cache can hold, or wrong settings.
    """
    if not data:
        raise ConfigError("a cache needs a `data:` section (target: data_video.SFTDataset and its params)")
    source = ClipSource.of(DataSection.parse(data))
    if source.settings.sampling == "random":
        raise ConfigError("data.params.sampling: random gives other frames each time, which no cache can hold")
    return source


def encoder_params(model: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(parameters of the first stage, of the one text embedder) of a `model:` section.

    Raises:
        ConfigError: a cache cannot replace them.
    """
    stage = model.get("first_stage_config")
    embedders = ((model.get("conditioner_config") or {}).get("params") or {}).get("emb_models") or []
    problems = []
    if not stage or model.get("latent_input"):
        problems.append("there is no first stage whose work could be stored")
    if len(embedders) != 1:
        problems.append(f"there are {len(embedders)} embedders, it stands for exactly one")
    for entry in embedders[:1]:
        keys = [entry["input_key"]] if "input_key" in entry else list(entry.get("input_keys") or [])
        if not issubclass(get_obj_from_str(entry["target"]), FrozenT5Embedder) or keys != [TEXT_KEY]:
            problems.append(f"its embedder must be FrozenT5Embedder with the input_key {TEXT_KEY}")
        if entry.get("is_trainable"):
            problems.append("its text encoder is trained, so embeddings change")
    if problems or not stage:
        raise ConfigError(f"args.cache_dir does not fit this model section: {'; '.join(problems)}")
    return split_config(stage)[1], dict(embedders[0].get("params") or {})


def _text_fingerprint(model_dir: str, cache_dir: str | None) -> str | None:
    try:
        files = t5_files.resolve(model_dir, cache_dir) if t5_files.is_local(model_dir, cache_dir) else None
    except t5_files.EncoderFilesError:
        return None
    if files is None:
        return None
    parts = [*files.weights, files.config, files.vocabulary]
    return "-".join(weights_fingerprint(path)[:8] for path in parts)


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
        for name in store.uncompared:
            say(f"note: {store.folder}: {name} cannot be compared, the files are not here")
        if store.encoded_as != dtype:
            say(f"note: {store.folder} was encoded in {store.encoded_as}, this run computes in {dtype}")
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
        args, fast = config.args, config.accelerate
        kernels = choose_kernels(fast.kernels, fast.attention, info.device, fast.cpu_bf16)
        how = FillSettings(
            info.device, args.num_workers, batch_size, args.vae_low_memory, info.rank, info.world_size, kernels
        )
        fill(store, config.model, missing, source.settings, how, say)
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


def _scan(store: CacheStore, source: ClipSource, folders: Sequence[str]) -> list[CacheScan]:
    # One rank looks: others might see a file system that lags behind, and disagree on the number of clips.
    return from_first(lambda: [scan_cached(folder, source, store) for folder in folders])

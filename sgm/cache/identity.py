"""Training from encoded clips: whose cache it is, the model section without encoders, the data sets."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from sgm.cache.dataset import EMBEDDING, MOMENTS, CachedClips, CacheScan, scan_cached
from sgm.cache.store import CacheStore
from sgm.config import ConfigError
from sgm.data.buckets import parse_buckets
from sgm.data.clips import ClipSettings
from sgm.data.dataset import SFTDataset
from sgm.data.report import list_source
from sgm.data.sources import ListedClip
from sgm.modules.encoders import t5_files
from sgm.modules.encoders.modules import T5_XXL, FrozenT5Embedder
from sgm.util import check_params, get_obj_from_str, split_config
from sgm.weights import weights_fingerprint

_TEXT_KEY = "txt"


def clip_settings(data: Mapping[str, Any] | None) -> tuple[ClipSettings, Callable[[Path], list[ListedClip]]]:
    """(how clips are taken, how a source's clips are listed) of a `data:` section.

    Raises:
        ConfigError: no such section, one of another class, or wrong settings.
    """
    if not data:
        raise ConfigError("a cache needs a `data:` section (target: data_video.SFTDataset and its params)")
    target, params = split_config(data)
    cls = get_obj_from_str(target)
    if cls is not SFTDataset:
        hint = "; it reads shards too (set txt_key)" if issubclass(cls, SFTDataset) else ""
        raise ConfigError(f"args.cache_dir holds clips of data_video.SFTDataset{hint}; data.target is {target}")
    given = check_params(target, cls, params)
    if given.get("sampling") == "random":
        raise ConfigError("data.params.sampling: random gives other frames each time, which no cache can hold")
    listing = {name: given[name] for name in ("images", "txt_key") if name in given}
    listing["order"] = given.get("file_order", "sorted")
    return _settings(given), partial(list_source, **listing)


def settings_of(data: Mapping[str, Any]) -> ClipSettings | None:
    """How clips are taken by a `data:` section's class; None where that is none of ours.

    Raises:
        ConfigError: wrong settings.
    """
    target, params = split_config(data)
    cls = get_obj_from_str(target)
    return _settings(check_params(target, cls, params)) if issubclass(cls, SFTDataset) else None


def _settings(params: Mapping[str, Any]) -> ClipSettings:
    renamed = {{"skip_frms_num": "skip_frames"}.get(name, name): value for name, value in params.items()}
    given = {field.name: renamed[field.name] for field in fields(ClipSettings) if field.name in renamed}
    try:
        if "video_size" in given:
            given["video_size"] = tuple(given["video_size"])
        given["buckets"] = parse_buckets(given.get("buckets") or ())
        return ClipSettings(**given)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    except TypeError as error:
        raise ConfigError(f"data.params: a value of another kind than expected ({error})") from error


def cache_identity(model: Mapping[str, Any], settings: ClipSettings) -> dict[str, Any]:
    """Everything that determines the encodings; None for weights that are not at hand.

    Raises:
        ConfigError: parts that no cache can stand for.
    """
    stage, text = _parts(model)
    coder_target, coder = split_config(stage["encoder_config"])
    checkpoint = stage.get("ckpt_path")
    found = checkpoint and Path(checkpoint).expanduser().is_file()
    identity = {
        "vae weights": weights_fingerprint(Path(checkpoint).expanduser()) if found else None,
        "vae encoder": json.dumps([get_obj_from_str(coder_target).__qualname__, coder], sort_keys=True),
        "text encoder weights": _text_fingerprint(text.get("model_dir", T5_XXL), text.get("cache_dir")),
        "max_length": int(text.get("max_length", 77)),
        "video_size": list(settings.video_size),
        "fps": settings.fps,
        "max_num_frames": settings.max_num_frames,
        "skip_frms_num": settings.skip_frames,
        "sampling": settings.sampling,
    }
    if settings.buckets:
        for name in ("video_size", "max_num_frames"):
            del identity[name]
        identity |= {"buckets": [list(bucket) for bucket in settings.buckets], "max_crop": settings.max_crop}
    return identity


def cached_model_section(model: Mapping[str, Any]) -> dict[str, Any]:
    """The `model:` section with stand-ins for VAE and text encoder, which take what the cache holds."""
    _parts(model)
    model = copy.deepcopy(dict(model))
    regularizer = model["first_stage_config"]["params"].get("regularizer_config")
    model["first_stage_config"] = {
        "target": "sgm.cache.stand_ins.CachedFirstStage",
        "params": {"regularizer_config": regularizer},
    }
    embedder = model["conditioner_config"]["params"]["emb_models"][0]
    embedder.pop("input_key", None)
    embedder |= {
        "target": "sgm.cache.stand_ins.CachedTextEmbedder",
        "input_keys": [_TEXT_KEY, EMBEDDING],
        "params": {},
    }
    model["input_key"] = MOMENTS
    return model


def open_store(
    folder: str, model: Mapping[str, Any], settings: ClipSettings, storage: str, encoded_as: str
) -> CacheStore:
    """The cache of a configuration, opened by this process."""
    return CacheStore(folder, cache_identity(model, settings), storage, encoded_as)


def scan_folders(store: CacheStore, data: Mapping[str, Any] | None, folders: Sequence[str]) -> list[CacheScan]:
    """What the cache knows of each folder; see `scan_cached`."""
    settings, list_all = clip_settings(data)
    return [scan_cached(folder, settings, store, list_all) for folder in folders]


def cached_datasets(
    scans: Sequence[CacheScan], store: CacheStore, settings: ClipSettings, reports: Path | None, name: str, writes: bool
) -> list[CachedClips]:
    """One data set a folder; `reports/NAME_k.jsonl` says what is usable (None: no file), written if this rank does."""
    files = [reports / f"{name}_{k}.jsonl" if reports else None for k in range(len(scans))]
    return [CachedClips(scan, store, settings, file, writes) for scan, file in zip(scans, files, strict=True)]


def _parts(model: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(parameters of the first stage, of the one text embedder); ConfigError where a cache cannot replace them."""
    stage = model.get("first_stage_config")
    embedders = ((model.get("conditioner_config") or {}).get("params") or {}).get("emb_models") or []
    problems = []
    if not stage or model.get("latent_input"):
        problems.append("there is no first stage whose work could be stored")
    if len(embedders) != 1:
        problems.append(f"there are {len(embedders)} embedders, it stands for exactly one")
    for entry in embedders[:1]:
        keys = [entry["input_key"]] if "input_key" in entry else list(entry.get("input_keys") or [])
        if not issubclass(get_obj_from_str(entry["target"]), FrozenT5Embedder) or keys != [_TEXT_KEY]:
            problems.append(f"its embedder must be FrozenT5Embedder with the input_key {_TEXT_KEY}")
        if entry.get("is_trainable"):
            problems.append("its text encoder is trained, so embeddings change")
    if problems:
        raise ConfigError(f"args.cache_dir does not fit this model section: {'; '.join(problems)}")
    return split_config(stage)[1], dict(embedders[0].get("params") or {})


def text_encoder_params(model: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of the first text encoder of a model section; none where there is none."""
    embedders = ((model.get("conditioner_config") or {}).get("params") or {}).get("emb_models") or []
    return dict(embedders[0].get("params") or {}) if embedders else {}


def _text_fingerprint(model_dir: str, cache_dir: str | None) -> str | None:
    try:
        files = t5_files.resolve(model_dir, cache_dir) if t5_files.is_local(model_dir, cache_dir) else None
    except t5_files.EncoderFilesError:
        return None
    if files is None:
        return None
    parts = [*files.weights, files.config, files.tokenizer / t5_files.VOCABULARY]
    return "-".join(weights_fingerprint(path)[:8] for path in parts)

"""Whose cache it is: everything that determines the encodings, and what of a configuration no cache can stand for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sgm.config import ConfigError
from sgm.data.clips import ClipSettings
from sgm.data.dataset import ClipSource, DataSection
from sgm.modules.encoders import t5_files
from sgm.modules.encoders.modules import T5_XXL, FrozenT5Embedder
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
    identity: dict[str, Any] = {
        "vae weights": _stage_fingerprint(stage.get("ckpt_path")),
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


def _stage_fingerprint(checkpoint: str | None) -> str | None:
    path = Path(checkpoint).expanduser() if checkpoint else None
    return weights_fingerprint(path) if path is not None and path.is_file() else None


def _text_fingerprint(model_dir: str, cache_dir: str | None) -> str | None:
    try:
        files = t5_files.resolve(model_dir, cache_dir) if t5_files.is_local(model_dir, cache_dir) else None
    except t5_files.EncoderFilesError:
        return None
    if files is None:
        return None
    parts = [*files.weights, files.config, files.vocabulary]
    return "-".join(weights_fingerprint(path)[:8] for path in parts)

"""What a configuration leaves to its user: paths that are still placeholders, and which configuration runs then."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sgm.config import merge_yaml
from sgm.places import INSTALLED, found_path, shown

SHIPPED_T5 = "google/t5-v1_1-xxl"
_PLACEHOLDER = re.compile(r"\{your_[^}]*\}|^your .* path$")


def weight_paths(model: Mapping[str, Any], load: str | None) -> dict[str, str]:
    """Place in the YAML -> value, for the weights that a configuration names."""
    found = {"args.load": load} if load else {}
    stage = (model.get("first_stage_config") or {}).get("params") or {}
    for name in ("ckpt_path", "small_decoder"):
        if stage.get(name):
            found[f"model.first_stage_config.params.{name}"] = str(stage[name])
    conditioner = (model.get("conditioner_config") or {}).get("params") or {}
    for k, embedder in enumerate(conditioner.get("emb_models") or []):
        folder = ((embedder or {}).get("params") or {}).get("model_dir")
        if folder:
            found[f"model.conditioner_config.params.emb_models.{k}.params.model_dir"] = str(folder)
    return found


def unedited(paths: Mapping[str, str]) -> list[str]:
    """Places that still hold what the shipped file says, including the text encoder's hub name if it is not cached."""
    return [
        place
        for place, value in paths.items()
        if _PLACEHOLDER.search(value) or (value == SHIPPED_T5 and not Path(value).exists() and not _cached(value))
    ]


def _cached(repository: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repository, "config.json"), str)


def placeholders_in(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """(place, text) of every placeholder below a configuration node (data paths of training files)."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from placeholders_in(inner, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list | tuple):
        for k, inner in enumerate(value):
            yield from placeholders_in(inner, f"{place}.{k}")
    elif isinstance(value, str) and _PLACEHOLDER.search(value):
        yield place, value


def config_files(named: Sequence[str], default: Path, fallback: Path) -> list[str | Path]:
    """The configuration files that a command line names, from here or the project; if none, the one of `choose_config`.

    Why it is the fallback is said on the standard error, by the first rank.
    """
    if named:
        return [found_path(file) for file in named]
    chosen, why = choose_config(default, fallback)
    if why and os.environ.get("RANK", "0") == "0":
        print(why, file=sys.stderr, flush=True)
    return [chosen]


def choose_config(default: Path, fallback: Path) -> tuple[Path, str | None]:
    """(configuration to run when none is named, line that explains a fallback).

    The shipped file with all its placeholders unedited means a first trial: then the demo runs. With some edited it
    is the user's file, and `check_paths` speaks of the rest.
    """
    content = merge_yaml([default])
    paths = weight_paths(content.get("model") or {}, (content.get("args") or {}).get("load"))
    if paths and len(unedited(paths)) == len(paths):
        how = "copy the file, edit these in the copy and name it" if INSTALLED else "edit these"
        return fallback, (
            f"{shown(default)} still has its placeholder paths, so the bundled demo runs ({shown(fallback)}). "
            f"To run CogVideoX-2B, {how}: {', '.join(paths)}."
        )
    return default, None

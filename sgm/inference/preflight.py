"""Before anything heavy: which configuration runs, are its paths edited, do they exist."""

from __future__ import annotations

import copy
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from sgm.config import ConfigError, RunConfig, merge_yaml
from sgm.places import INSTALLED, found_path, shown
from sgm.weights.release import how_to_get, newest_run

Args = TypeVar("Args")
SHIPPED_T5 = "google/t5-v1_1-xxl"
_PLACEHOLDER = re.compile(r"\{your_[^}]*\}|^your .* path$")
HOW_TO_GET_T5 = (
    "The text encoder is one folder with what text_encoder/ and tokenizer/ of the diffusers release hold (config.json, "
    "two safetensors shards with their index, spiece.model and three small JSON files), or a hub id that lies in the "
    f"Hugging Face cache (`hf download {SHIPPED_T5}`; about 45 GB, since that repository holds the decoder too)."
)
HOW_TO_GET_ADAPTER = (
    "An adapter (PATH or PATH:SCALE) is the folder of a LoRA run, one of its iterations or a file of it; one in "
    "diffusers' form is converted by tools/convert_weight_hf2sat.py --lora_only. docs/sampling.md, 'LoRA', has the "
    "steps."
)


class PathError(ConfigError):
    """A path in the configuration is unedited or wrong; the message names each and says how to get the weights."""


def weight_paths(model: Mapping[str, Any], load: str | None) -> dict[str, str]:
    """Place in the YAML -> value, for the three kinds of weights a configuration names."""
    found = {"args.load": load} if load else {}
    stage = (model.get("first_stage_config") or {}).get("params") or {}
    if stage.get("ckpt_path"):
        found["model.first_stage_config.params.ckpt_path"] = str(stage["ckpt_path"])
    conditioner = (model.get("conditioner_config") or {}).get("params") or {}
    for k, embedder in enumerate(conditioner.get("emb_models") or []):
        folder = ((embedder or {}).get("params") or {}).get("model_dir")
        if folder:
            found[f"model.conditioner_config.params.emb_models.{k}.params.model_dir"] = str(folder)
    return found


def with_found_paths(config: RunConfig[Args]) -> RunConfig[Args]:
    """`config` with relative weight paths that do not exist from the current folder taken from the project's.

    A training run's folder may be given without its date: the newest run is taken.
    """
    model = copy.deepcopy(config.model)
    for place, value in weight_paths(model, None).items():
        *parents, leaf = place.removeprefix("model.").split(".")
        node: Any = model
        for key in parents:
            node = node[int(key)] if isinstance(node, list) else node[key]
        node[leaf] = found_path(value)
    load = config.args.load and found_path(config.args.load)
    if load and not Path(load).expanduser().exists():
        load = str(newest_run(Path(load).expanduser()) or load)
    return replace(config, model=model, args=replace(config.args, load=load))


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


def check_paths(model: Mapping[str, Any], load: str | None, lora: Sequence[str] = ()) -> None:
    """Demand that every weight path is edited and exists.

    Raises:
        PathError: naming every offending place, and how to get what is missing.
    """
    paths = weight_paths(model, load)
    left = unedited(paths)
    problems = {place: f"{place} is still the placeholder {paths[place]!r}" for place in left}
    problems |= {
        place: f"{place}: {value} does not exist"
        for place, value in paths.items()
        if place not in left
        and not Path(value).expanduser().exists()
        and not (place.endswith("model_dir") and _is_hub_name(value))
    }
    for text, path in zip(lora, map(adapter_path, lora)):
        if not path.exists() and newest_run(path) is None:
            problems[f"args.lora {text}"] = f"args.lora: {path} does not exist"
    if problems:
        title = f"{len(problems)} weight path{'s' if len(problems) > 1 else ''} to set:"
        raise PathError("\n".join([title, *(f"  - {p}" for p in problems.values()), *_remedies(problems)]))


def _remedies(places: Iterable[str]) -> list[str]:
    """How to get the weights that are missing at these places, and no others."""
    lacking = list(places)
    archives = {"args.load": "transformer.zip", "model.first_stage_config.params.ckpt_path": "vae.zip"}
    wanted = [archive for place, archive in archives.items() if place in lacking]
    lines = [how_to_get(*wanted)] if wanted else []
    lines += [HOW_TO_GET_T5] if any(place.endswith("model_dir") for place in lacking) else []
    return lines + ([HOW_TO_GET_ADAPTER] if any(place.startswith("args.lora") for place in lacking) else [])


def adapter_path(text: str) -> Path:
    """The path in `PATH` or `PATH:SCALE`."""
    path, colon, _ = text.rpartition(":")
    return Path(path if colon and not Path(text).expanduser().exists() else text).expanduser()


def _is_hub_name(value: str) -> bool:
    """`owner/name` that is no path here: the text encoder may be fetched by such a name."""
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", value)) and not value.startswith(".") and not Path(value).exists() \
        and not value.endswith((".pt", ".safetensors")) and not Path(value).parent.exists()  # fmt: skip


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

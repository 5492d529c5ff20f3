"""Before anything heavy: are a configuration's weight paths edited, do they exist, and how to get what is missing."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from glob import escape
from pathlib import Path
from typing import Any

from sgm.config import ConfigError, RunConfig
from sgm.files import refuse_lfs_pointer
from sgm.placeholders import SHIPPED_T5, unedited, weight_paths
from sgm.places import found_path
from sgm.weights.checksums import WeightsError
from sgm.weights.identify import shape_of_model
from sgm.weights.release import how_to_get, locate, newest_run

HOW_TO_GET_T5 = (
    "The text encoder is one folder with what text_encoder/ and tokenizer/ of the diffusers release hold (config.json, "
    "two safetensors shards with their index, spiece.model and three small JSON files), or a hub id that lies in the "
    f"Hugging Face cache (`hf download {SHIPPED_T5}`; about 45 GB, since that repository holds the decoder too)."
)
HOW_TO_GET_ADAPTER = (
    "An adapter (PATH or PATH:SCALE) is the folder of a LoRA run, one of its iterations or a file of it, a file or "
    "folder of another trainer, or a name in the hub (OWNER/NAME). docs/sampling.md, 'LoRA', has the steps."
)

HOW_TO_GET_SMALL_DECODER = (
    "`python tools/train_decoder.py CONFIG.yaml OUT --latents FOLDER --seconds 3600` learns a small decoder from the "
    "VAE (docs/speed.md, 'Small decoder'); --decoder full does without."
)
SMALL_DECODER = "model.first_stage_config.params.small_decoder"


def with_found_paths(config: RunConfig[Any], find: Callable[[str], str] = found_path) -> RunConfig[Any]:
    """`config` with its weight paths as `find` gives them: by default the project's where only these are.

    A training run's folder may be given without its date: the newest run is taken.
    """
    model = with_paths(config.model, find)
    load = config.args.load and find(config.args.load)
    if load and not Path(load).expanduser().exists():
        load = str(newest_run(Path(load).expanduser()) or load)
    lora = getattr(config.args, "lora", None)
    found = {"load": load} | ({"lora": [_found_adapter(text, find) for text in lora]} if lora is not None else {})
    if getattr(config.args, "student", None):
        found["student"] = find(config.args.student)
    return replace(config, model=model, args=replace(config.args, **found))


def _found_adapter(text: str, find: Callable[[str], str]) -> str:
    """`PATH[:SCALE]` with its path found."""
    path = str(adapter_path(text))
    return find(path) + text[len(path) :] if text.startswith(path) else find(text)


def with_paths(model: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """A copy of a model section with each path of weights changed."""
    changed = copy.deepcopy(dict(model))
    for place, value in weight_paths(changed, None).items():
        *parents, leaf = place.removeprefix("model.").split(".")
        node: Any = changed
        for key in parents:
            node = node[int(key)] if isinstance(node, list) else node[key]
        node[leaf] = change(value)
    return changed


def check_paths(
    model: Mapping[str, Any], load: str | None, lora: Sequence[str] = (), *, small_decoder: bool = False
) -> None:
    """Demand that every weight path is edited and exists; a small decoder's only where it is used.

    Raises:
        ConfigError: naming every offending place, and how to get what is missing.
    """
    paths = weight_paths(model, load)
    if not small_decoder:
        paths.pop(SMALL_DECODER, None)
    left = unedited(paths)
    problems = {place: f"{place} is still the placeholder {paths[place]!r}" for place in left}
    problems |= {
        place: f"{place}: {value} does not exist{_beside(Path(value).expanduser())}"
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
        raise ConfigError("\n".join([title, *(f"  - {p}" for p in problems.values()), *_remedies(problems, model)]))
    for value in [v for place, v in paths.items() if not place.endswith("model_dir")] + [*map(adapter_path, lora)]:
        with suppress(WeightsError):  # of what else is wrong its reader speaks; the text encoder looks at its own
            for file in locate(value)[0]:
                refuse_lfs_pointer(file, ConfigError)


def _beside(path: Path) -> str:
    """What is there in place of an absent path: 1.5's release has `transformer_t2v` and `transformer_i2v`."""
    there = sorted(map(str, path.parent.glob(f"{escape(path.name)}_*")))
    return f"; there are {', '.join(there)}" if there else ""


def _remedies(places: Iterable[str], model: Mapping[str, Any]) -> list[str]:
    """How to get the weights that are missing at these places of a model, and no others."""
    lacking, shape = list(places), shape_of_model(model)
    named = {"repository": shape.published.repository} if shape and shape.published else {}
    archives = {"args.load": "transformer.zip", "model.first_stage_config.params.ckpt_path": "vae.zip"}
    wanted = [archive for place, archive in archives.items() if place in lacking]
    lines = [how_to_get(*wanted, **named)] if wanted else []
    lines += [HOW_TO_GET_SMALL_DECODER] if SMALL_DECODER in lacking else []
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

"""What makes two configurations one run, and in what they differ where they do not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sgm.config import RunConfig
from sgm.training.options import RESUME_MAY_CHANGE

CONFIG_FILE = "training_config.yaml"  # of a run's folder
_SECTIONS = ("args", "model", "data", "deepspeed")


def resume_hash(config: RunConfig[Any]) -> str:
    """Identity of what a run learns: equal for a run and its continuation."""
    return config.hash(_SECTIONS, ignore=_does_not_count(config))


def differences(run: Path, config: RunConfig[Any]) -> list[str]:
    """The keys, with both values, in which what a run's folder says it learns is not what `config` does; none where
    the folder does not tell."""
    from omegaconf import OmegaConf
    from yaml import YAMLError

    try:
        there = OmegaConf.to_container(OmegaConf.load(run / CONFIG_FILE))
    except (OSError, YAMLError, ValueError):
        return []
    here = json.loads(json.dumps(config.as_dict(), default=str))
    old, new = (dict(_leaves(content, _does_not_count(config))) for content in (there, here))
    return [
        f"{key}: {old.get(key, 'absent')} there, {new.get(key, 'absent')} here"
        for key in sorted({*old, *new})
        if old.get(key, _ABSENT) != new.get(key, _ABSENT)
    ]


_ABSENT = object()


def _does_not_count(config: RunConfig[Any]) -> frozenset[str]:
    """Keys of `args`. With `epochs` the number of iterations follows from the data."""
    return RESUME_MAY_CHANGE | ({"train_iters"} if getattr(config.args, "epochs", None) else set())


def _leaves(content: Any, left: frozenset[str]) -> Iterator[tuple[str, Any]]:
    for section in _SECTIONS:
        values = (content or {}).get(section) or {}
        if section == "args":
            values = {name: value for name, value in values.items() if name not in left}
        yield from _flat(section, values)


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _flat(f"{prefix}.{name}", inner)
    else:
        yield prefix, value

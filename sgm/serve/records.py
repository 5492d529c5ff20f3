"""From the JSON of a clip back to the fields that ask for it again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sgm.errors import SgmError
from sgm.modules.autoencoding.strides import STRIDES
from sgm.serve.jobs import FAST, FEW_STEPS, FULL
from sgm.serve.parameters import Offer, split_scale


class RecordError(SgmError):
    """A file that is no record of a clip; says what is missing."""


def read_fields(path: Path, offer: Offer) -> dict[str, Sequence[str]]:
    """The fields of a record that sampling, the Python interface or this server has written.

    Raises:
        RecordError: it is none, or an adapter of it is not offered.
    """
    try:
        return _fields(json.loads(path.read_text(encoding="utf-8")), offer)
    except RecordError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecordError(f"{path.name} is no record of a clip ({type(error).__name__}: {error}).") from error


def _fields(record: Mapping[str, Any], offer: Offer) -> dict[str, Sequence[str]]:
    if record.get("extend"):
        raise RecordError("the clip goes on with another one (extend), which this server does not do.")
    height, width = record["size"]
    frames = STRIDES.pixel_frames(int(record["latent_frames"]))
    mode, adapters = _mode_and_adapters(record, offer)
    fields: dict[str, Sequence[str]] = {
        "prompt": [str(record["prompt"])],
        "negative_prompt": [str(record.get("negative_prompt") or "")],
        "seed": [str(int(record["seed"]))],
        "mode": [mode],
        "size": [f"{width}x{height}"],
        "seconds": [f"{(frames - 1) / float(record['fps']):g}"],
        "refine": [str(bool(record.get("refine"))).lower()],
        "lora": adapters,
    }
    guidance = record.get("guidance") or {}
    numbers = {"guidance_scale": guidance.get("scale"), "strength": record.get("strength")}
    if mode != FEW_STEPS:
        numbers["steps"] = record["num_steps"]
    return fields | {name: [f"{float(value):g}"] for name, value in numbers.items() if value is not None}


def left_out(fields: Mapping[str, Sequence[str]], started: bool) -> str:
    """What a form with one adapter and one start cannot show of a request; "" where it shows all of it.

    Args:
        started: whether the file that the clip began with is there.
    """
    adapters = fields.get("lora") or []
    told = [f"Of the adapters {', '.join(adapters)} the form takes the first alone."] if len(adapters) > 1 else []
    told += ["The clip began with a video: choose it, too."] if fields.get("strength") and not started else []
    return " ".join(told)


def _mode_and_adapters(record: Mapping[str, Any], offer: Offer) -> tuple[str, list[str]]:
    mode = FAST if "reuse_error" in (record.get("approximate") or {}) else FULL
    students = {facts.student for facts in offer.models.values()} - {None}
    adapters = []
    for text in map(str, record.get("lora") or []):
        path, scale = split_scale(text)
        name = next((n for n, adapter in offer.adapters.items() if adapter.path == path), None)
        if name is not None:
            adapters.append(f"{name}:{scale:g}")
        elif path in students:
            mode = FEW_STEPS
        else:
            has = ", ".join(offer.adapters) or "none"
            raise RecordError(
                f"the clip was made with {path}, which this server does not offer (--lora); it has {has}."
            )
    return mode, adapters

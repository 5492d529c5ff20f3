"""From the fields of a request, all of them texts, to a `ClipRequest`."""

from __future__ import annotations

import difflib
import math
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sgm.serve.answers import ApiError
from sgm.serve.jobs import ClipRequest, ModelFacts
from sgm.serve.limits import Limits
from sgm.serve.uploads import Upload

LONGEST_PROMPT = 10_000  # characters; the text encoder reads far fewer
SEEDS = 1 << 31
SCALES = (-10, 10)  # of an adapter
STRENGTHS = (0.01, 1)
FIELDS = (
    "prompt", "model", "seconds", "size", "input_reference", "seed", "steps", "negative_prompt", "guidance_scale",
    "strength", "lora", "refine", "mode",
)  # fmt: skip
_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off", "")


@dataclass(frozen=True)
class OfferedAdapter:
    """Its file or folder, and its scale where a client gives none."""

    path: str
    scale: float


@dataclass(frozen=True)
class Offer:
    """What may be asked for.

    Attributes:
        models: by name, the first of them when none is named.
        adapters: by name.
        refines: whether an endpoint for the refinement of prompts is configured.
    """

    models: Mapping[str, ModelFacts]
    adapters: Mapping[str, OfferedAdapter]
    refines: bool = False


class Fields:
    """Reads the fields of one request; each fault is an `ApiError` that names its field."""

    def __init__(self, given: Mapping[str, Sequence[str]]):
        self.given: dict[str, list[str]] = {}
        for name, values in given.items():
            self.given.setdefault(name.removesuffix("[]"), []).extend(values)
        for name in self.given:
            if name not in FIELDS:
                near = difflib.get_close_matches(name, FIELDS, 1)
                hint = f" Did you mean {near[0]!r}?" if near else f" There are {', '.join(FIELDS)}."
                raise ApiError(400, f"Unknown parameter: {name!r}.{hint}", name, "unknown_parameter")
            if any("\ud800" <= letter <= "\udfff" for text in self.given[name] for letter in text):
                raise ApiError(400, f"{name} holds half a character (a lone surrogate), which no text has.", name)

    def texts(self, name: str) -> list[str]:
        return self.given.get(name, [])

    def text(self, name: str, default: str = "") -> str:
        values = self.texts(name)
        if len(values) > 1:
            raise ApiError(400, f"{name} is given {len(values)} times.", name)
        return values[0] if values else default

    def number(self, name: str, low: float, high: float) -> float | None:
        text = self.text(name).strip()
        if not text:
            return None
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise ApiError(400, f"{name} is {text!r}; it must be a number from {low} to {high}.", name)
        return value

    def whole(self, name: str, low: int, high: int) -> int | None:
        value = self.number(name, low, high)
        if value is not None and value != int(value):
            raise ApiError(400, f"{name} is {self.text(name)!r}; it must be a whole number.", name)
        return None if value is None else int(value)

    def switch(self, name: str) -> bool:
        text = self.text(name).lower()
        if text not in (*_TRUE, *_FALSE):
            raise ApiError(400, f"{name} is {text!r}; it must be true or false.", name)
        return text in _TRUE


def clip_request(
    given: Mapping[str, Sequence[str]], upload: Upload | None, offer: Offer, limits: Limits
) -> ClipRequest:
    """What the fields of a request ask for.

    Raises:
        ApiError: names the field at fault and what it may be.
    """
    fields = Fields(given)
    facts = _model(fields.text("model"), offer)
    size, frames = _size(fields.text("size"), facts), _frames(fields, facts)
    most = limits.clip * facts.size[0] * facts.size[1] * facts.num_frames
    if size[0] * size[1] * frames > most:
        raise ApiError(
            400,
            f"{frames} frames of {size[1]}x{size[0]} are more than this server makes; the most is {limits.clip:g} times"
            f" the {facts.num_frames} frames of {facts.size[1]}x{facts.size[0]} that {facts.name} makes by itself.",
            "size" if fields.text("size") else "seconds",
            "video_too_large",
        )
    seed = fields.whole("seed", 0, SEEDS - 1)
    _check_start(upload, fields, facts)
    if fields.switch("refine") and not offer.refines:
        raise ApiError(400, "refine: this server knows no language model (OPENAI_API_KEY, OPENAI_BASE_URL).", "refine")
    mode = fields.text("mode")
    if mode and mode not in facts.modes:
        raise ApiError(400, f"mode is {mode!r}; {facts.name} has {', '.join(facts.modes)}.", "mode")
    return ClipRequest(
        model=facts.name,
        prompt=_prompt(fields, "prompt", needed=True),
        negative_prompt=_prompt(fields, "negative_prompt"),
        seed=secrets.randbelow(SEEDS) if seed is None else seed,
        size=size,
        num_frames=frames,
        fps=facts.fps,
        steps=fields.whole("steps", 2, limits.steps),
        guidance_scale=fields.number("guidance_scale", 0, 100),
        strength=fields.number("strength", *STRENGTHS),
        image=upload.name if upload and upload.kind == "image" else None,
        video=upload.name if upload and upload.kind == "video" else None,
        lora=_adapters(fields.texts("lora"), offer.adapters),
        refine=fields.switch("refine"),
        mode=mode or facts.modes[0],
    )


def _prompt(fields: Fields, name: str, needed: bool = False) -> str:
    text = fields.text(name).strip()
    if needed and not text:
        raise ApiError(400, f"Missing required parameter: {name!r}.", name, "missing_required_parameter")
    if len(text) > LONGEST_PROMPT:
        raise ApiError(400, f"{name} has {len(text)} characters; the most is {LONGEST_PROMPT}.", name)
    if "\0" in text or "@@" in text:
        raise ApiError(400, f"{name} holds '@@' or a zero byte; a picture is sent as input_reference.", name)
    return text


def _model(name: str, offer: Offer) -> ModelFacts:
    if not name:
        return next(iter(offer.models.values()))
    if name not in offer.models:
        message = f"The model {name!r} does not exist; this server has {', '.join(offer.models)}."
        raise ApiError(400, message, "model", "model_not_found")
    return offer.models[name]


def _size(text: str, facts: ModelFacts) -> tuple[int, int]:
    if not text:
        return facts.size
    step = facts.size_step
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text.strip())
    height, width = (int(match[2]), int(match[1])) if match else (0, 0)
    if not (height and width) or height % step or width % step:
        example = f"{facts.size[1]}x{facts.size[0]}"
        raise ApiError(
            400, f"size is {text!r}; it must be WIDTHxHEIGHT, both multiples of {step}, as {example}.", "size"
        )
    return height, width


def _frames(fields: Fields, facts: ModelFacts) -> int:
    """Of the length asked for: 1 above a multiple of `frame_step`, within half a frame."""
    seconds = fields.number("seconds", 0, 3600)
    if seconds is None:
        return facts.num_frames
    intervals, step = round(seconds * facts.fps), facts.frame_step
    if abs(seconds * facts.fps - intervals) < 0.01 and intervals % step == 0:
        return intervals + 1
    near = sorted({step * (intervals // step), step * (intervals // step + 1)})
    lengths = " and ".join(f"{n / facts.fps:g}" for n in near)
    raise ApiError(
        400,
        f"seconds is {fields.text('seconds')!r}; {facts.name} makes {facts.fps} frames a second in steps of {step} "
        f"frames: the nearest lengths are {lengths} seconds.",
        "seconds",
    )


def _check_start(upload: Upload | None, fields: Fields, facts: ModelFacts) -> None:
    given = upload.kind if upload else None
    if facts.start == "image" and given is None:
        raise ApiError(400, f"{facts.name} begins its videos with a picture; send it as input_reference.",
                       "input_reference", "missing_required_parameter")  # fmt: skip
    if given not in (None, facts.start):
        raise ApiError(
            400, f"input_reference is {_article(given)}; {facts.name} starts from {_article(facts.start)}.",
            "input_reference",
        )  # fmt: skip
    if given != "video" and fields.text("strength"):
        raise ApiError(400, "strength says how much of a start video goes; send one as input_reference.", "strength")


def _article(kind: str | None) -> str:
    return "an image" if kind == "image" else f"a {kind}"


def _adapters(texts: Sequence[str], adapters: Mapping[str, OfferedAdapter]) -> tuple[str, ...]:
    found = tuple(_adapter(text, adapters) for text in texts if text)
    names = [text.partition(":")[0] for text in found]
    for name in names:
        if names.count(name) > 1:
            raise ApiError(400, f"lora names the adapter {name!r} twice; name it once, with its whole scale.", "lora")
    return found


def _adapter(text: str, adapters: Mapping[str, OfferedAdapter]) -> str:
    """`NAME` or `NAME:SCALE` with its scale."""
    name, _, scale = text.partition(":")
    if name not in adapters:
        has = ", ".join(adapters) or "none"
        raise ApiError(400, f"The adapter {name!r} does not exist; this server has {has}.", "lora", "adapter_not_found")
    value = Fields({"lora": [scale]}).number("lora", *SCALES)
    return f"{name}:{adapters[name].scale if value is None else value:g}"


def split_scale(text: str) -> tuple[str, float]:
    """The two parts of `PATH[:SCALE]`; 1 where there is no scale."""
    path, colon, scale = text.rpartition(":")
    try:
        return (path, float(scale)) if colon else (text, 1.0)
    except ValueError:
        return text, 1.0

"""Facts about every clip of a data set: what it is, whether it can be trained on, and if not, why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from sgm.data.buckets import kept_share
from sgm.data.clips import CLIP_FAULTS, CaptionError, ClipSettings, caption_of, load_frames
from sgm.data.decoder import DecodeProcess
from sgm.data.frames import DatasetError
from sgm.data.report import per_thread, reason_of
from sgm.data.sources import ListedClip, Listing, is_image, passed_over_line
from sgm.data.video_io import VideoInfo, probe
from sgm.files import atomic_write
from sgm.modules.encoders.modules import UNKNOWN_SHARE

THUMBNAIL = 160  # pixels, the longer side
SHEET_FRAMES = 4  # of each clip
SHEET_COLUMNS = 2
UNEVEN = 1.0  # frames; times in whole milliseconds are off by less
HEAD = ("", "frames", "fps", "size", "codec", "s", "tokens", "clip", "crop", "path")


@dataclass
class ClipFacts:
    """One clip. What could not be found out is None.

    Attributes:
        frames, fps, height, width, codec, seconds, hidden, turned, pixel_aspect, interlaced, tracks: see `VideoInfo`.
        uneven: how far its frames are from even spacing, in frames (variable frame rate).
        caption: its text. tokens: its length with the end-of-sequence token. cut: tokens beyond the encoder's length.
        unknown: share of its tokens that the encoder does not know. dropped_lines: lines of the caption left out.
        clip: (frames, height, width) that training takes. cropped: share of the picture's area that is lost.
        enlarged: the factor by which training scales the picture up, at least 1. repeats: frames of the clip that
            are the same as the one before.
        notes: what of this wants attention, and what is done about it, in words.
        reason: why it is not usable; "" if it is.
    """

    source: str
    path: str
    reason: str = ""
    frames: int | None = None
    fps: float | None = None
    height: int | None = None
    width: int | None = None
    codec: str | None = None
    seconds: float | None = None
    caption: str | None = None
    tokens: int | None = None
    cut: int | None = None
    clip: tuple[int, int, int] | None = None
    cropped: float | None = None
    hidden: int = 0
    turned: tuple[str, ...] = ()
    pixel_aspect: float = 1.0
    interlaced: bool = False
    tracks: int = 1
    uneven: float = 0.0
    unknown: float = 0.0
    dropped_lines: int = 0
    enlarged: float = 1.0
    repeats: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def usable(self) -> bool:
        return not self.reason


def text_encoder_params(model: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of the first text encoder of a `model:` section; none where there is none."""
    embedders = ((model.get("conditioner_config") or {}).get("params") or {}).get("emb_models") or []
    return dict(embedders[0].get("params") or {}) if embedders else {}


class TokenCounter:
    """Length of captions in the text encoder's tokens.

    Args:
        model_dir: see `FrozenT5Embedder`. max_length: tokens that the encoder takes.
    """

    def __init__(self, model_dir: str, max_length: int):
        from sgm.modules.encoders import t5_files
        from sgm.modules.encoders.modules import T5Tokenizer

        self.max_length = max_length
        self._tokenizer = T5Tokenizer(t5_files.resolve(model_dir).vocabulary)

    def __call__(self, text: str) -> tuple[int, float]:
        """(tokens with the end of sequence, share of the others that is unknown)."""
        ids = self._tokenizer.encode(text)
        return len(ids), self._tokenizer.unknown_share(ids)


def examine(
    source: Path,
    settings: ClipSettings,
    list_all: Callable[[Path], Listing],
    count_tokens: TokenCounter | None = None,
    workers: int | None = None,
) -> list[ClipFacts]:
    """Look at every clip of a source: opens it and decodes one frame.

    Raises:
        DatasetError: no such source, or nothing in it.
    """
    clips = list_all(source.absolute())
    if not clips:
        besides = f"; {passed_over_line(clips.passed_over)}" if clips.passed_over else ""
        raise DatasetError(f"{source}: no clips in it; expected videos/NAME.mp4, a manifest or shards{besides}")
    facts = per_thread(clips, lambda clip, decoder: _facts_of(source, clip, settings, decoder), workers)
    for fact in facts:
        if fact.caption is not None and count_tokens is not None:
            fact.tokens, fact.unknown = count_tokens(fact.caption)
            fact.cut = max(0, fact.tokens - count_tokens.max_length)
        fact.notes = notes(fact, settings)
    return facts


def _facts_of(source: Path, clip: ListedClip, settings: ClipSettings, decoder: DecodeProcess) -> ClipFacts:
    facts, reasons = ClipFacts(str(source), clip.path), []
    try:
        caption = caption_of(clip, settings.missing_caption, settings.caption_lines)
        facts.caption, facts.dropped_lines = caption.text, caption.dropped
    except CaptionError as fault:
        reasons.append(reason_of(fault))
    try:
        info = probe(clip.path, settings.decode_timeout, decoder)
        _add_info(facts, info)
        plan = settings.plan(clip.path, info)
        facts.clip = (len(plan.indices), *plan.size)
        facts.cropped = 1 - kept_share(info.height, info.width, facts.clip)
        facts.enlarged = max(1.0, plan.size[0] / info.height, plan.size[1] / info.width)
        facts.repeats = len(plan.indices) - len(set(plan.indices))
    except CLIP_FAULTS as fault:
        reasons.append(reason_of(fault))
    facts.reason = "; ".join(reasons)
    return facts


def _add_info(facts: ClipFacts, info: VideoInfo) -> None:
    for known in fields(info):
        if known.name in ClipFacts.__dataclass_fields__:
            setattr(facts, known.name, getattr(info, known.name))
    if is_image(facts.path):
        facts.fps = facts.seconds = None
    even = info.times[0] + np.arange(len(info.times)) / info.fps
    facts.uneven = float(np.abs(info.times - even).max() * info.fps)


# --- for people ---------------------------------------------------------------------------------------------------


def notes(fact: ClipFacts, settings: ClipSettings) -> list[str]:
    """What of a clip wants attention, and what is done about it."""
    by_time = settings.sampling == "timestamps"
    fields_ = {"deinterlace": "deinterlaced", "skip": "left out", "keep": "taken as they are"}[settings.interlaced]
    found = {
        f"{fact.hidden} hidden frames, left out": fact.hidden,
        f"set upright ({', '.join(fact.turned)})": fact.turned,
        f"pixels {fact.pixel_aspect:.4g} times as wide as high, made square": fact.pixel_aspect != 1,
        f"interlaced, {fields_} (data.params.interlaced)": fact.interlaced,
        f"{fact.tracks} video tracks, the one of {fact.width}x{fact.height} is taken": fact.tracks > 1,
        f"variable frame rate{'' if by_time else ' (data.params.sampling: timestamps heeds it)'}": fact.uneven > UNEVEN,
        f"smaller than the training size, enlarged {fact.enlarged:.2f} times": fact.enlarged > 1,
        f"{fact.repeats} frames of the clip repeat the one before": fact.repeats,
        f"{fact.dropped_lines} caption lines left out (data.params.caption_lines: all joins them)": fact.dropped_lines,
        f"{fact.unknown:.0%} of the caption's tokens unknown to the text encoder": fact.unknown >= UNKNOWN_SHARE,
    }
    return [note for note, holds in found.items() if holds]


def table(facts: Sequence[ClipFacts], rows: int = 0) -> list[str]:
    """Lines of a table: unusable clips first, at most `rows` (0: all)."""
    ordered = sorted(facts, key=lambda fact: fact.usable)
    shown = ordered[:rows] if rows else ordered
    cells = [HEAD, *(_row(fact) for fact in shown)]
    widths = [max(len(row[k]) for row in cells) for k in range(len(HEAD) - 1)]
    lines = ["  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]]).rstrip() for row in cells]
    left = len(ordered) - len(shown)
    return [*lines, f"... and {left} more (--rows 0 shows all, --json keeps all)"] if left else lines


def _row(fact: ClipFacts) -> tuple[str, ...]:
    size = f"{fact.width}x{fact.height}" if fact.width else "-"
    tokens = "-" if fact.tokens is None else f"{fact.tokens}{'!' if fact.cut else ''}"
    clip = "x".join(map(str, fact.clip)) if fact.clip else "-"
    crop = f"{fact.cropped:.0%}" if fact.cropped is not None else "-"
    numbers = (_number(fact.frames), _number(fact.fps), size, fact.codec or "-", _number(fact.seconds))
    where = "; ".join(filter(None, [fact.path if fact.usable else f"{fact.path}: {fact.reason}", *fact.notes]))
    return ("ok" if fact.usable else "NO", *numbers, tokens, clip, crop, where)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def summary(facts: Sequence[ClipFacts], counted: bool) -> list[str]:
    """What a data set comes to, in a few lines."""
    usable = [fact for fact in facts if fact.usable]
    seconds = sum(fact.seconds or 0 for fact in usable)
    lines = [f"{len(usable)} of {len(facts)} clips usable, {seconds / 60:.1f} minutes of video"]
    kinds = Counter(fact.clip for fact in usable if fact.clip)
    lines += [f"  {count} of {f} frames, {h}x{w}" for (f, h, w), count in sorted(kinds.items())]
    longest = max((fact.tokens or 0 for fact in usable), default=0)
    cut = sum(bool(fact.cut) for fact in usable)
    if counted:
        lines.append(f"  longest caption {longest} tokens; {cut} captions are cut at the encoder's length")
    else:
        lines.append("  captions not counted in tokens: no text encoder here (give --tokenizer DIR)")
    for what, count in _counts(usable).items():
        lines += [f"  {count} {what}"] if count else []
    return lines


def _counts(usable: Sequence[ClipFacts]) -> dict[str, int]:
    """How many clips show what is worth knowing of a data set as a whole."""
    return {
        "captions occur more than once": len(usable) - len({fact.caption for fact in usable}),
        "captions have lines that are left out": sum(bool(fact.dropped_lines) for fact in usable),
        "captions are partly unknown to the text encoder": sum(fact.unknown >= UNKNOWN_SHARE for fact in usable),
        "clips are smaller than the training size and get enlarged": sum(fact.enlarged > 1 for fact in usable),
        "clips repeat frames": sum(bool(fact.repeats) for fact in usable),
        "clips have hidden frames": sum(bool(fact.hidden) for fact in usable),
        "clips have a variable frame rate": sum(fact.uneven > UNEVEN for fact in usable),
        "clips are interlaced": sum(fact.interlaced for fact in usable),
    }


def as_json(facts: Sequence[ClipFacts], settings: ClipSettings) -> dict[str, Any]:
    """Everything, for programs."""
    clips = [{"usable": fact.usable, **asdict(fact)} for fact in facts]
    return {"settings": asdict(settings), "usable": sum(fact.usable for fact in facts), "clips": clips}


def contact_sheet(facts: Sequence[ClipFacts], settings: ClipSettings, path: Path, count: int) -> None:
    """A PNG of evenly chosen clips as training sees them: some frames of each, with the start of the caption."""
    chosen = [facts[k] for k in sorted({round(k) for k in np.linspace(0, len(facts) - 1, min(count, len(facts)))})]
    strips = [_strip(fact, settings) for fact in chosen]
    width, height = max(s.width for s in strips), max(s.height for s in strips)
    rows = -(-len(strips) // SHEET_COLUMNS)
    sheet = Image.new("RGB", (width * SHEET_COLUMNS, height * rows), "white")
    for k, strip in enumerate(strips):
        sheet.paste(strip, (k % SHEET_COLUMNS * width, k // SHEET_COLUMNS * height))
    atomic_write(path, lambda file: sheet.save(file, "PNG"))


def _strip(fact: ClipFacts, settings: ClipSettings) -> Image.Image:
    strip = Image.new("RGB", (SHEET_FRAMES * (THUMBNAIL + 2), THUMBNAIL + 16), "white")
    try:
        frames = load_frames(fact.path, settings)
    except CLIP_FAULTS as fault:  # it opened, and broke further on
        ImageDraw.Draw(strip).text((2, 2), reason_of(fault)[:100], fill="red")
        return strip
    for k, index in enumerate(np.linspace(0, len(frames) - 1, min(SHEET_FRAMES, len(frames))).round().astype(int)):
        picture = Image.fromarray(frames[index].permute(1, 2, 0).numpy())
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        strip.paste(picture, (k * (THUMBNAIL + 2), 14))
    # Pillow's own font has western letters only
    caption = (fact.caption or "").encode("latin-1", "replace").decode("latin-1")
    ImageDraw.Draw(strip).text((2, 1), f"{len(frames)}f  {caption}"[:105], fill="black")
    return strip

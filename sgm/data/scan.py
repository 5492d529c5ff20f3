"""Looking at every clip of a data set, many at a time: which are usable, and why the others are not."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from sgm.data.clips import CLIP_FAULTS, CaptionError, ClipSettings, caption_of, check_clip
from sgm.data.decoder import DecodeProcess
from sgm.data.frames import ClipShape
from sgm.data.report import DatasetError, Rejection, Report, UsableClip, first_reasons
from sgm.data.sources import ListedClip, Listing, exists, list_clips

T = TypeVar("T")

LEVELS = ("probe", "captions")


def list_source(data_dir: str | Path, order: str = "sorted", images: bool = False, txt_key: str = "txt") -> Listing:
    """All clips of a source, see `sgm.data.sources.list_clips`. DatasetError where there is none so named."""
    if not exists(data_dir):
        raise DatasetError(f"{data_dir}: no such folder, manifest (.csv, .jsonl, .json) or shard (.tar)")
    return list_clips(data_dir, order, images, txt_key)


def scan(data_dir: str | Path, clips: Listing, settings: ClipSettings, level: str = "probe") -> Report:
    """Check the clips of a data set.

    Args:
        data_dir: the source, for the report.
        settings: what a clip must satisfy.
        level: "probe" opens each video, decodes one frame and chooses its frames; "captions" reads the captions only.

    Raises:
        DatasetError: captions are missing and `settings.missing_caption` is "error".
    """
    if level not in LEVELS:
        raise ValueError(f"unknown level {level!r} of checking; choose one of {', '.join(LEVELS)}")
    report = Report(str(Path(data_dir).absolute()), asdict(settings), passed_over=clips.passed_over)
    if level == "captions":
        found = [_shape_or_fault(clip, settings, None) for clip in clips]
    else:
        found = per_thread(clips, lambda clip, decoder: _shape_or_fault(clip, settings, decoder))
    for clip, result in zip(clips, found, strict=True):
        if isinstance(result, Exception):
            report.rejected.append(Rejection(clip.path, reason_of(result)))
        else:
            report.usable.append(UsableClip(clip.path, clip.caption, result))
    unnamed = [Rejection(str(f.path), f.reason) for f in found if isinstance(f, CaptionError)]
    if unnamed and settings.missing_caption == "error":
        raise DatasetError(
            f"{report.data_dir}: {len(unnamed)} of {len(clips)} captions are missing or unreadable: "
            f"{first_reasons(unnamed)}; add them, or set missing_caption to 'skip' or 'empty'"
        )
    return report


def _shape_or_fault(
    clip: ListedClip, settings: ClipSettings, decoder: DecodeProcess | None
) -> ClipShape | Exception | None:
    """What `check_clip` says, or what is wrong with the clip; without a decoder only its caption is read: None."""
    try:
        if decoder is not None:
            return check_clip(clip, settings, decoder).shape
        caption_of(clip, settings.missing_caption, settings.caption_lines)
    except CLIP_FAULTS as fault:
        return fault
    return None


def reason_of(fault: Exception) -> str:
    """A fault's message without the clip's path."""
    # The path stands in the record already; a caption's fault names the caption file, which is another one.
    return str(fault) if isinstance(fault, CaptionError) else getattr(fault, "reason", str(fault))


def per_thread(
    clips: Iterable[ListedClip], look: Callable[[ListedClip, DecodeProcess], T], num_threads: int | None = None
) -> list[T]:
    """`look(clip, decoder)` of every clip, in order, by threads with a decoding process each.

    `num_threads`: by default the number of processors, at most 16.
    """
    local = threading.local()
    decoders: list[DecodeProcess] = []

    def start() -> None:
        local.decoder = DecodeProcess()
        decoders.append(local.decoder)

    try:
        with ThreadPoolExecutor(num_threads or min(16, os.cpu_count() or 1), "scan", initializer=start) as pool:
            return list(pool.map(lambda clip: look(clip, local.decoder), clips))
    finally:
        for decoder in decoders:
            decoder.close()

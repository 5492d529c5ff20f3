"""What is wrong with a data set: every clip looked at before training, many at a time; kept up to date while it runs.

The file is JSON Lines: a head with the counts, then one line for each video, `{"status": "usable" | "rejected", ...}`;
clips that turn out broken during training are appended as `{"status": "broken", ...}`.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from sgm.data.clips import CLIP_FAULTS, CaptionError, ClipSettings, caption_of, check_clip
from sgm.data.decoder import DecodeProcess
from sgm.data.frames import ClipShape, DatasetError
from sgm.data.sources import ListedClip, Listing, exists, list_clips, passed_over_line
from sgm.files import write_text

logger = logging.getLogger(__name__)

REASONS_SHOWN = 5


@dataclass(frozen=True)
class Rejection:
    """A video that is not used, and why."""

    path: str
    reason: str


@dataclass
class Report:
    """Result of a scan.

    `usable` keeps the order in which the videos were listed. `settings` are those under which they were checked.
    `passed_over`: see `sgm.data.sources.Listing`.
    """

    data_dir: str
    settings: dict[str, Any]
    usable: list[ListedClip] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)
    passed_over: dict[str, int] = field(default_factory=dict)

    def summary(self) -> str:
        """One line for the log."""
        line = f"{self.data_dir}: {len(self.usable)} clips usable, {len(self.rejected)} rejected"
        return line + (f" (first: {first_reasons(self.rejected, 1)})" if self.rejected else "")

    def warn_of_passed_over(self) -> None:
        """Log that the folder holds videos or pictures that were not even looked at; they count as nothing."""
        if self.passed_over:
            logger.warning("%s: %s", self.data_dir, passed_over_line(self.passed_over))

    def require_usable(self) -> None:
        """Raises DatasetError, with the first reasons, when there is nothing to train on."""
        if self.usable:
            return
        if not self.rejected:
            raise DatasetError(nothing_in(self.data_dir, self.passed_over))
        raise DatasetError(
            f"{self.data_dir}: none of the {len(self.rejected)} videos is usable: {first_reasons(self.rejected)}"
        )

    def write(self, path: str | Path) -> None:
        """Write the report, all or nothing. Raises SaveError."""
        counts = {"usable": len(self.usable), "rejected": len(self.rejected)}
        head = {"status": "head", "data_dir": self.data_dir, **counts, "settings": self.settings}
        if self.passed_over:
            head["passed_over"] = self.passed_over
        lines = [head]
        for clip in self.usable:
            known = {"path": clip.path, "caption": clip.caption, "clip": clip.shape}
            lines.append({"status": "usable", **{name: value for name, value in known.items() if value is not None}})
        lines += [{"status": "rejected", **asdict(r)} for r in self.rejected]
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(json.dumps(line) + "\n" for line in lines))

    @classmethod
    def read(cls, path: str | Path) -> Report:
        """Read a report; what training has added to it is passed over."""
        path = Path(path)
        if not path.is_file():
            raise DatasetError(f"no data set report at {path}; check the data set first")
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not lines or lines[0].get("status") != "head":
            raise DatasetError(f"{path} is not a data set report: its first line has no head")
        usable = [
            ListedClip(line["path"], line.get("caption"), tuple(line["clip"]) if "clip" in line else None)
            for line in lines
            if line["status"] == "usable"
        ]
        rejected = [Rejection(line["path"], line["reason"]) for line in lines if line["status"] == "rejected"]
        return cls(lines[0]["data_dir"], lines[0]["settings"], usable, rejected, lines[0].get("passed_over", {}))


def append_broken(path: str | Path, video: str | Path, reason: str) -> None:
    """Add a clip found broken to a report file. Safe from many processes: one line, one write, at the end."""
    line = json.dumps({"status": "broken", "path": str(video), "reason": reason}) + "\n"
    try:
        with open(path, "ab", buffering=0) as file:
            file.write(line.encode())
    except OSError as error:  # no reason to end a training
        logger.warning("%s: the broken clip %s is not noted: %s", path, video, error.strerror)


def first_reasons(rejected: Sequence[Rejection], count: int = REASONS_SHOWN) -> str:
    """The first few rejections in one line."""
    shown = "; ".join(f"{r.path}: {r.reason}" for r in rejected[:count])
    more = len(rejected) - count
    return shown + (f"; and {more} more" if more > 0 else "")


def nothing_in(source: str | Path, passed_over: Mapping[str, int]) -> str:
    """What to say of a source without clips."""
    besides = f"; {passed_over_line(passed_over)}" if passed_over else ""
    return f"{source}: no videos in this folder or below it; expected videos/NAME.mp4{besides}"


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
            report.usable.append(clip._replace(shape=result))
    if settings.missing_caption == "error":
        require_captions(report.data_dir, [f for f in found if isinstance(f, CaptionError)], len(clips))
    return report


def require_captions(source: str | Path, faults: Sequence[CaptionError], clips: int) -> None:
    """Raises DatasetError where some of a source's clips have `faults`."""
    if faults:
        unnamed = [Rejection(str(fault.path), fault.reason) for fault in faults]
        raise DatasetError(
            f"{source}: {len(unnamed)} of {clips} captions are missing or unreadable: "
            f"{first_reasons(unnamed)}; add them, or set missing_caption to 'skip' or 'empty'"
        )


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

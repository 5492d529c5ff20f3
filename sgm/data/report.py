"""What is wrong with a data set: checked before training, and kept up to date while it runs.

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
from typing import TypeVar

from sgm.data.clips import CLIP_FAULTS, CaptionError, CheckedClip, ClipSettings, caption_of, check_clip
from sgm.data.decoder import DecodeProcess
from sgm.data.sources import ListedClip, Listing, exists, list_clips, passed_over_line, passed_over_of
from sgm.errors import SgmError
from sgm.files import write_text

T = TypeVar("T")
logger = logging.getLogger(__name__)

LEVELS = ("probe", "captions")
REASONS_SHOWN = 5


class DatasetError(SgmError):
    """A data set that cannot be trained on."""


@dataclass(frozen=True)
class Rejection:
    """A video that is not used, and why."""

    path: str
    reason: str


@dataclass
class Report:
    """Result of a scan. `broken` holds what training added to the file since.

    `usable` keeps the order in which the videos were listed; `captions` and `shapes` go with it: what the source says
    itself (None: a caption file does), and (frames, height, width) of the clip (None: not looked at). `settings` are
    those under which they were checked. `passed_over`: see `sgm.data.sources.Listing`.
    """

    data_dir: str
    settings: dict
    usable: list[str] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)
    broken: list[Rejection] = field(default_factory=list)
    captions: list[str | None] = field(default_factory=list)
    shapes: list[tuple[int, int, int] | None] = field(default_factory=list)
    passed_over: dict[str, int] = field(default_factory=dict)

    def summary(self) -> str:
        """One line for the log."""
        line = f"{self.data_dir}: {len(self.usable)} clips usable, {len(self.rejected)} rejected"
        if self.broken:
            line += f", {len(self.broken)} found broken in training"
        return line + (f" (first: {first_reasons(self.rejected, 1)})" if self.rejected else "")

    def tell_passed_over(self) -> None:
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
        """Write the report, all or nothing."""
        path = Path(path)
        counts = {"usable": len(self.usable), "rejected": len(self.rejected)}
        head = {"status": "head", "data_dir": self.data_dir, **counts, "settings": self.settings}
        if self.passed_over:
            head["passed_over"] = self.passed_over
        lines = [head, *map(_usable_line, self.usable, self._filled(self.captions), self._filled(self.shapes))]
        lines += [{"status": "rejected", **asdict(r)} for r in self.rejected]
        lines += [{"status": "broken", **asdict(r)} for r in self.broken]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(json.dumps(line) + "\n" for line in lines))

    @classmethod
    def read(cls, path: str | Path) -> Report:
        """Read a report with what training has added. A clip that several workers added counts once."""
        path = Path(path)
        if not path.is_file():
            raise DatasetError(f"no data set report at {path}; check the data set first")
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not lines or lines[0].get("status") != "head":
            raise DatasetError(f"{path} is not a data set report: its first line has no head")
        report = cls(lines[0]["data_dir"], lines[0]["settings"])
        usable = [line for line in lines if line["status"] == "usable"]
        report.usable = [line["path"] for line in usable]
        report.captions = [line.get("caption") for line in usable]
        report.shapes = [tuple(line["clip"]) if "clip" in line else None for line in usable]  # type: ignore[misc]
        report.passed_over = lines[0].get("passed_over", {})
        report.rejected = _rejections(lines, "rejected")
        report.broken = _rejections(lines, "broken")
        return report

    def _filled(self, values: list) -> list:
        return values or [None] * len(self.usable)


def _usable_line(path: str, caption: str | None, shape: tuple[int, int, int] | None) -> dict:
    line: dict = {"status": "usable", "path": path}
    if caption is not None:
        line["caption"] = caption
    return {**line, "clip": list(shape)} if shape is not None else line


def append_broken(path: str | Path, video: str | Path, reason: str) -> None:
    """Add a clip found broken to a report file. Safe from many processes: one line, one write, at the end."""
    line = json.dumps({"status": "broken", "path": str(video), "reason": reason}) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def scan(
    data_dir: str | Path,
    settings: ClipSettings,
    order: str = "sorted",
    level: str = "probe",
    num_threads: int | None = None,
    clips: Sequence[ListedClip] | None = None,
) -> Report:
    """Check every video of a data set.

    Args:
        settings: what a clip must satisfy.
        order: see `list_clips`.
        level: "probe" opens each video, decodes one frame and chooses its frames; "captions" reads the captions only.
        num_threads: videos checked at a time, each in a decoding process of its own; by default the number of
            processors, at most 16.
        clips: check these instead of all in `data_dir`.

    Raises:
        DatasetError: no such source, or captions missing where `settings.missing_caption` is "error".
    """
    if level not in LEVELS:
        raise ValueError(f"unknown level {level!r} of checking; choose one of {', '.join(LEVELS)}")
    data_dir = Path(data_dir).absolute()
    clips = list_source(data_dir, order) if clips is None else clips
    report = Report(str(data_dir), asdict(settings), passed_over=passed_over_of(clips))
    found = check_all(clips, settings, level, num_threads or min(16, os.cpu_count() or 1))
    for clip, result in zip(clips, found, strict=True):
        if isinstance(result, Exception):
            report.rejected.append(Rejection(clip.path, reason_of(result)))
            continue
        report.usable.append(clip.path)
        report.captions.append(clip.caption)
        report.shapes.append(result.shape if result else None)
    unnamed = [Rejection(str(f.path), f.reason) for f in found if isinstance(f, CaptionError)]
    if unnamed and settings.missing_caption == "error":
        raise DatasetError(
            f"{data_dir}: {len(unnamed)} of {len(clips)} captions are missing or unreadable: {first_reasons(unnamed)}"
            "; add them, or set missing_caption to 'skip' or 'empty'"
        )
    return report


def first_reasons(rejected: Sequence[Rejection], count: int = REASONS_SHOWN) -> str:
    """The first few rejections in one line."""
    shown = "; ".join(f"{r.path}: {r.reason}" for r in rejected[:count])
    more = len(rejected) - count
    return shown + (f"; and {more} more" if more > 0 else "")


def nothing_in(source: str | Path, passed_over: Mapping[str, int]) -> str:
    """What to say of a source without clips."""
    besides = f"; {passed_over_line(passed_over)}" if passed_over else ""
    return f"{source}: no .mp4 files in this folder or below it; expected videos/NAME.mp4{besides}"


def list_source(data_dir: str | Path, order: str = "sorted", images: bool = False, txt_key: str = "txt") -> Listing:
    """All clips of a source, see `sgm.data.sources.list_clips`. DatasetError where there is none so named."""
    if not exists(data_dir):
        raise DatasetError(f"{data_dir}: no such folder, manifest (.csv, .jsonl) or shard (.tar)")
    return list_clips(data_dir, order, images, txt_key)


def check_all(
    clips: Iterable[ListedClip], settings: ClipSettings, level: str, num_threads: int
) -> list[CheckedClip | Exception | None]:
    """What each clip holds (None at level "captions"), or what is wrong with it."""
    if level == "captions":
        return [_attempt(lambda c: caption_of(c, settings.missing_caption) and None, clip) for clip in clips]
    return per_thread(
        clips, lambda clip, decoder: _attempt(lambda c: check_clip(c, settings, decoder), clip), num_threads
    )


def per_thread(
    clips: Iterable[ListedClip], look: Callable[[ListedClip, DecodeProcess], T], num_threads: int
) -> list[T]:
    """`look(clip, decoder)` of every clip, in order, by threads with a decoding process each."""
    local, decoders = threading.local(), []

    def start() -> None:
        local.decoder = DecodeProcess()
        decoders.append(local.decoder)

    try:
        with ThreadPoolExecutor(num_threads, "scan", initializer=start) as pool:
            return list(pool.map(lambda clip: look(clip, local.decoder), clips))
    finally:
        for decoder in decoders:
            decoder.close()


def _attempt(check, clip: ListedClip) -> CheckedClip | Exception | None:
    try:
        return check(clip)
    except CLIP_FAULTS as fault:
        return fault


def reason_of(fault: Exception) -> str:
    """A fault's message without the clip's path."""
    # The path stands in the record already; a caption's fault names the caption file, which is another one.
    return str(fault) if isinstance(fault, CaptionError) else getattr(fault, "reason", str(fault))


def _rejections(lines: Sequence[dict], status: str) -> list[Rejection]:
    found = (Rejection(line["path"], line["reason"]) for line in lines if line["status"] == status)
    return list({rejection.path: rejection for rejection in found}.values())

"""What is wrong with a data set: checked before training, and kept up to date while it runs.

The file is JSON Lines: a head with the counts, then one line for each video, `{"status": "usable" | "rejected", ...}`;
clips that turn out broken during training are appended as `{"status": "broken", ...}`.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from sgm.data.frames import ClipShape
from sgm.data.sources import passed_over_line
from sgm.errors import SgmError
from sgm.weights.save import save_text

logger = logging.getLogger(__name__)

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
    shapes: list[ClipShape | None] = field(default_factory=list)
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
        """Write the report, all or nothing. Raises SaveError."""
        counts = {"usable": len(self.usable), "rejected": len(self.rejected)}
        head = {"status": "head", "data_dir": self.data_dir, **counts, "settings": self.settings}
        if self.passed_over:
            head["passed_over"] = self.passed_over
        lines = [head, *map(_usable_line, self.usable, self._filled(self.captions), self._filled(self.shapes))]
        lines += [{"status": "rejected", **asdict(r)} for r in self.rejected]
        lines += [{"status": "broken", **asdict(r)} for r in self.broken]
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_text(path, "".join(json.dumps(line) + "\n" for line in lines))

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
        report.shapes = [tuple(line["clip"]) if "clip" in line else None for line in usable]
        report.passed_over = lines[0].get("passed_over", {})
        report.rejected = _rejections(lines, "rejected")
        report.broken = _rejections(lines, "broken")
        return report

    def _filled(self, values: list) -> list:
        return values or [None] * len(self.usable)


def _usable_line(path: str, caption: str | None, shape: ClipShape | None) -> dict:
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


def first_reasons(rejected: Sequence[Rejection], count: int = REASONS_SHOWN) -> str:
    """The first few rejections in one line."""
    shown = "; ".join(f"{r.path}: {r.reason}" for r in rejected[:count])
    more = len(rejected) - count
    return shown + (f"; and {more} more" if more > 0 else "")


def nothing_in(source: str | Path, passed_over: Mapping[str, int]) -> str:
    """What to say of a source without clips."""
    besides = f"; {passed_over_line(passed_over)}" if passed_over else ""
    return f"{source}: no .mp4 files in this folder or below it; expected videos/NAME.mp4{besides}"


def _rejections(lines: Sequence[dict], status: str) -> list[Rejection]:
    found = (Rejection(line["path"], line["reason"]) for line in lines if line["status"] == status)
    return list({rejection.path: rejection for rejection in found}.values())

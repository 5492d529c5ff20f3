"""Captioned clips for training as torch data sets. Batches of them: `sgm.data.loader`."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from sgm.data.clips import CLIP_FAULTS, CaptionError, ClipSettings, list_videos, load_clip
from sgm.data.frames import ClipError, frame_indices
from sgm.data.report import LEVELS, DatasetError, Report, append_broken, scan
from sgm.data.video_io import DECODE_TIMEOUT

__all__ = ["ClipError", "DatasetError", "SFTDataset", "frame_indices"]

VALIDATION = (*LEVELS, "report", "none")
logger = logging.getLogger(__name__)


class SFTDataset(Dataset):
    """Captioned videos of a folder, `videos/*.mp4` and `labels/*.txt`, decoded when asked for.

    A clip that cannot be read is replaced by the next one in order, logged once, and added to the report; see
    `broken_count`. Parameters up to `skip_frms_num` are the original's.

    Args:
        data_dir: folder with the videos, nested folders included.
        video_size: [height, width] of the clips in pixels.
        fps, max_num_frames, skip_frms_num, sampling, missing_caption, decode_timeout: see `ClipSettings`.
        file_order: "sorted", or "walk" for the file system's order, which the original uses.
        validate: "probe" opens every video first; "captions" reads the captions; "none" lists the files only;
            "report" takes the usable videos from the file `report` instead of looking, so that all ranks agree.
        report: file for `sgm.data.report`: written by "probe" and "captions", read by "report", and in all cases added
            to when a clip turns out broken later.

    Raises:
        DatasetError: the folder holds no usable clip, or the report is of other data.
    """

    def __init__(
        self,
        data_dir: str | Path,
        video_size: Sequence[int] = (480, 720),
        fps: float = 8,
        max_num_frames: int = 49,
        skip_frms_num: float = 3.0,
        sampling: str = "upstream",
        missing_caption: str = "skip",
        decode_timeout: float = DECODE_TIMEOUT,
        file_order: str = "sorted",
        validate: str = "probe",
        report: str | Path | None = None,
    ):
        self.data_dir = Path(data_dir)
        self.settings = ClipSettings(
            tuple(video_size), fps, max_num_frames, skip_frms_num, sampling, missing_caption, decode_timeout
        )
        self.report_path = None if report is None else Path(report)
        self.report = self._examine(validate, file_order)
        self.report.require_usable()
        self.paths = PackedStrings([os.path.relpath(path, self.data_dir) for path in self.report.usable])
        # One flag a clip, shared by all workers: none waits for a clip that another has found broken.
        self._broken = torch.zeros(len(self.paths), dtype=torch.uint8).share_memory_()
        self.report.usable = []  # `paths` has them, in a form that forked workers do not copy

    @classmethod
    def create_dataset_function(cls, path: str, args: Any, **kwargs: Any) -> SFTDataset:
        """The original's factory, called by SAT with its arguments, of which none is needed here."""
        return cls(data_dir=path, **kwargs)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A clip: `mp4` float32 (f, 3, h, w) in [-1, 1], `txt`, `num_frames` (f), `fps` (that of the clip), and
        `path` and `index` of the clip that was in fact read.

        Raises:
            IndexError: no such clip.
            DatasetError: no clip at all can be read any more.
            CaptionError: a caption is missing and `missing_caption` is "error".
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"clip {index} of {len(self)}")
        for step in range(len(self)):
            candidate = (index + step) % len(self)
            if self._broken[candidate]:
                continue
            path = self.data_dir / self.paths[candidate]
            try:
                frames, caption = load_clip(path, self.settings)
            except CLIP_FAULTS as fault:
                if isinstance(fault, CaptionError) and self.settings.missing_caption == "error":
                    raise
                self._mark_broken(candidate, path, fault)
                continue
            size = {"num_frames": len(frames), "fps": self.settings.fps}
            return {"mp4": frames, "txt": caption, **size, "path": str(path), "index": candidate}
        where = f"; see {self.report_path}" if self.report_path else ""
        raise DatasetError(f"{self.data_dir}: none of the {len(self)} clips can be read any more{where}")

    @property
    def broken_count(self) -> int:
        """Clips that were usable at the start and have failed since, in any worker."""
        return int(self._broken.sum())

    def _examine(self, validate: str, file_order: str) -> Report:
        if validate not in VALIDATION:
            raise ValueError(f"unknown validation {validate!r}; choose one of {', '.join(VALIDATION)}")
        if validate == "report":
            return self._known_report()
        if validate == "none":
            if not self.data_dir.is_dir():
                raise DatasetError(f"{self.data_dir}: no such folder")
            videos = [str(video) for video in list_videos(self.data_dir, file_order)]
            return Report(str(self.data_dir), asdict(self.settings), videos)
        report = scan(self.data_dir, self.settings, file_order, validate)
        if self.report_path:
            report.write(self.report_path)
        logger.info(report.summary())
        return report

    def _known_report(self) -> Report:
        if self.report_path is None:
            raise ValueError("validate='report' needs the file: give report=PATH")
        report = Report.read(self.report_path)
        if Path(report.data_dir).resolve() != self.data_dir.resolve():
            raise DatasetError(f"{self.report_path} is the report of {report.data_dir}, not of {self.data_dir}")
        settings = {**asdict(self.settings), "video_size": list(self.settings.video_size)}
        other = sorted(name for name in settings if report.settings.get(name) != settings[name])
        if other:
            raise DatasetError(f"{self.report_path} was made with another {', '.join(other)}; check the data set again")
        return report

    def _mark_broken(self, index: int, path: Path, fault: Exception) -> None:
        self._broken[index] = 1
        logger.warning("clip left out: %s", fault)
        if self.report_path:
            append_broken(self.report_path, path, str(fault))


class PackedStrings(Sequence[str]):
    """Strings in two arrays. A list of them would be copied into every forked worker as reference counts change."""

    def __init__(self, strings: Sequence[str]):
        encoded = [os.fsencode(string) for string in strings]
        self._bytes = np.frombuffer(b"".join(encoded), np.uint8)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        index = range(len(self))[index]  # checks the range, counts negative ones from the end
        start, end = self._ends[index], self._ends[index + 1]
        return os.fsdecode(self._bytes[start:end].tobytes())

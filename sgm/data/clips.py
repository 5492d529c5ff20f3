"""One clip's way: a video file and its caption -> frames at the training size, and the text.

Layout of a data set: `.../videos/NAME.mp4` beside `.../labels/NAME.txt`, folders inside `videos` mirrored in `labels`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sgm.data.decoder import DecodeProcess
from sgm.data.frames import ClipError, check_settings, frame_indices
from sgm.data.video_io import DECODE_TIMEOUT, VideoError, VideoInfo, probe, read_frames, resize_crop

VIDEO_SUFFIX = ".mp4"
MISSING_CAPTION = ("skip", "error", "empty")
FILE_ORDERS = ("sorted", "walk")


class CaptionError(ValueError):
    """A clip without a usable caption. `path` is the caption file, `reason` what is wrong with it."""

    def __init__(self, path: str | Path, reason: str):
        super().__init__(f"{path}: {reason}")
        self.path = Path(path)
        self.reason = reason

    def __reduce__(self):
        return type(self), (self.path, self.reason)


CLIP_FAULTS = (VideoError, ClipError, CaptionError)  # what is wrong with one clip and no reason to stop a run


@dataclass(frozen=True)
class ClipSettings:
    """How clips are taken from videos.

    Attributes:
        video_size: (height, width) of the clips in pixels.
        fps, max_num_frames, skip_frames, sampling: see `sgm.data.frames.frame_indices` (`sampling` is its `rule`).
        missing_caption: what an absent or empty caption does: "skip" rejects the clip, "error" stops, "empty" trains
            the clip with the text "". A caption that is not UTF-8 is never read as "".
        decode_timeout: seconds after which decoding one clip is given up.
    """

    video_size: tuple[int, int] = (480, 720)
    fps: float = 8
    max_num_frames: int = 49
    skip_frames: float = 3.0
    sampling: str = "upstream"
    missing_caption: str = "skip"
    decode_timeout: float = DECODE_TIMEOUT

    def __post_init__(self):
        problems = []
        if len(self.video_size) != 2 or any(int(side) != side or side < 1 for side in self.video_size):
            problems.append(f"video_size is {self.video_size}, expected [height, width] in pixels")
        if self.missing_caption not in MISSING_CAPTION:
            problems.append(f"missing_caption is {self.missing_caption!r}, choose one of {', '.join(MISSING_CAPTION)}")
        if not self.decode_timeout > 0:
            problems.append(f"decode_timeout is {self.decode_timeout}, it must be a positive number of seconds")
        try:
            check_settings(self.fps, self.max_num_frames, self.skip_frames, self.sampling)
        except ValueError as error:
            problems.append(str(error))
        if problems:
            raise ValueError("data settings: " + "; ".join(problems))

    def indices(self, info: VideoInfo) -> list[int]:
        """The frames to take from a video. Raises ClipError."""
        return frame_indices(info.frames, info.fps, self.fps, self.max_num_frames, self.skip_frames, rule=self.sampling)


def list_videos(data_dir: str | Path, order: str = "sorted") -> list[Path]:
    """All `.mp4` files under a folder, in sorted order, or ("walk", as the original) as the file system lists them."""
    if order not in FILE_ORDERS:
        raise ValueError(f"unknown file order {order!r}; choose one of {', '.join(FILE_ORDERS)}")
    found = [
        Path(folder, name)
        for folder, _, names in os.walk(data_dir)
        for name in names
        if name.lower().endswith(VIDEO_SUFFIX)
    ]
    return sorted(found) if order == "sorted" else found


def caption_path(video: str | Path) -> Path:
    """The caption file of a video: `.txt`, and the last folder named `videos` becomes `labels`.

    Without such a folder the caption lies beside the video. The original replaces the letters "videos" wherever they
    occur in the path, which fails for /my_videos/set/videos/a.mp4; for the usual layout both give the same.
    """
    video = Path(video)
    parts = list(video.parts)
    folders = [i for i, part in enumerate(parts[:-1]) if part == "videos"]
    if folders:
        parts[folders[-1]] = "labels"
    return Path(*parts).with_suffix(".txt")


def read_caption(video: str | Path, missing: str = "skip") -> str:
    """First line of a video's caption, trailing blanks kept as the original does; a byte order mark is dropped.

    Args:
        missing: with "empty", an absent or empty caption is ""; otherwise it raises.

    Raises:
        CaptionError: no caption, an empty one, or bytes that are not UTF-8.
    """
    path = caption_path(video)
    try:
        lines = path.read_bytes().decode("utf-8-sig").splitlines()
    except FileNotFoundError:
        lines, problem = [], "there is no such caption file"
    except UnicodeDecodeError as error:
        raise CaptionError(path, f"the caption is not UTF-8 (byte {error.start})") from error
    except OSError as error:
        raise CaptionError(path, f"the caption cannot be read: {error.strerror}") from error
    else:
        problem = "the caption's first line is empty" if lines else "the caption file is empty"
    if lines and lines[0].strip():
        return lines[0]
    if missing == "empty":
        return ""
    raise CaptionError(path, problem)


def check_clip(video: Path, settings: ClipSettings, decoder: DecodeProcess | None = None) -> VideoInfo:
    """What a video holds, if a captioned clip can be taken from it. Decodes one frame.

    Raises:
        VideoError, ClipError, CaptionError: it cannot; the message says why.
    """
    read_caption(video, settings.missing_caption)
    info = probe(video, settings.decode_timeout, decoder)
    settings.indices(info)
    return info


def load_clip(video: Path, settings: ClipSettings) -> tuple[Tensor, str]:
    """Frames, float32 (f, 3, h, w) in [-1, 1], and caption.

    Raises:
        VideoError, ClipError, CaptionError: the clip cannot be had.
    """
    caption = read_caption(video, settings.missing_caption)
    return to_unit_range(load_frames(video, settings)), caption


def load_frames(video: str | Path, settings: ClipSettings) -> Tensor:
    """The clip's frames, uint8 (f, 3, h, w).

    Raises:
        VideoError, ClipError: the clip cannot be had.
    """
    indices = settings.indices(probe(video, settings.decode_timeout))
    return resize_crop(read_frames(video, indices, settings.decode_timeout), settings.video_size)


def to_unit_range(frames: Tensor) -> Tensor:
    """uint8 to float32 in [-1, 1]."""
    return frames.to(torch.float32).sub_(127.5).div_(127.5)

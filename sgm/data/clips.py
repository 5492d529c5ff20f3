"""One clip's way: a video file (or picture) and its caption -> frames at the training size, and the text.

Layout of a folder: `.../videos/NAME.mp4` beside `.../labels/NAME.txt`, folders inside `videos` mirrored in `labels`.
Other sources: `sgm.data.sources`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sgm.data.buckets import Bucket, choose_bucket
from sgm.data.decoder import DecodeProcess
from sgm.data.frames import ClipError, ClipShape, check_settings, frame_indices
from sgm.data.sources import VIDEO_SUFFIXES, ListedClip, first_line, is_image, list_files
from sgm.data.video_io import DECODE_TIMEOUT, VideoError, VideoInfo, probe, read_frames, resize_crop
from sgm.errors import SgmError
from sgm.files import LFS_MAGIC, LFS_POINTER

MISSING_CAPTION = ("skip", "error", "empty")


class CaptionError(SgmError):
    """A clip without a usable caption. `path` is the caption file, `reason` what is wrong with it."""

    def __init__(self, path: str | Path, reason: str):
        super().__init__(f"{path}: {reason}")
        self.path = Path(path)
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[Path, str]]:
        return type(self), (self.path, self.reason)


CLIP_FAULTS = (VideoError, ClipError, CaptionError)  # what is wrong with one clip and no reason to stop a run


class ClipPlan(NamedTuple):
    """Frames to take, and (height, width) to bring them to."""

    indices: list[int]
    size: tuple[int, int]


@dataclass(frozen=True)
class ClipSettings:
    """How clips are taken from videos.

    Attributes:
        video_size: (height, width) of the clips in pixels.
        fps, max_num_frames, skip_frames, sampling: see `sgm.data.frames.frame_indices` (`sampling` is its `rule`).
        buckets: kinds of clips, in place of `video_size` and `max_num_frames`; see `sgm.data.buckets`.
        max_crop: with buckets, the largest share of a picture that may be cropped away.
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
    buckets: tuple[Bucket, ...] = ()
    max_crop: float = 0.25

    def __post_init__(self) -> None:
        problems = []
        if not all(isinstance(side, int | float) and side == int(side) and side > 0 for side in self.video_size):
            problems.append(f"video_size is {self.video_size}, expected [height, width] in pixels")
        if self.missing_caption not in MISSING_CAPTION:
            problems.append(f"missing_caption is {self.missing_caption!r}, choose one of {', '.join(MISSING_CAPTION)}")
        if not self.decode_timeout > 0:
            problems.append(f"decode_timeout is {self.decode_timeout}, it must be a positive number of seconds")
        if not 0 <= self.max_crop < 1:
            problems.append(f"max_crop is {self.max_crop}, it must be a share from 0 to below 1")
        try:
            check_settings(self.fps, self.max_num_frames, self.skip_frames, self.sampling)
        except ValueError as error:
            problems.append(str(error))
        if problems:
            raise ValueError("data settings: " + "; ".join(problems))

    def indices(self, info: VideoInfo, most: int | None = None) -> list[int]:
        """The frames to take from a video, at most `most` in place of `max_num_frames`. Raises ClipError."""
        most = most or self.max_num_frames
        return frame_indices(info.frames, info.fps, self.fps, most, self.skip_frames, rule=self.sampling)

    def plan(self, path: str | Path, info: VideoInfo) -> ClipPlan:
        """How a clip is taken from a video or picture. Raises ClipError."""
        if is_image(path):
            size = self._bucket(info, lambda frames: frames == 1)[1:] if self.buckets else self.video_size
            return ClipPlan([0], size)
        if not self.buckets:
            return ClipPlan(self.indices(info), self.video_size)
        bucket = self._bucket(info, lambda frames: self._gives(info, frames))
        return ClipPlan(self.indices(info, bucket.frames), bucket[1:])

    def _bucket(self, info: VideoInfo, fits: Callable[[int], bool]) -> Bucket:
        return choose_bucket(info.height, info.width, self.buckets, self.max_crop, fits)

    def _gives(self, info: VideoInfo, frames: int) -> bool:
        try:
            return len(self.indices(info, frames)) == frames
        except ClipError:
            return False


def picture_size(given: Sequence[int]) -> tuple[int, int]:
    """(height, width) of what a configuration says. Raises ValueError where these are not two."""
    if len(given) != 2:
        raise ValueError(f"data settings: video_size is {tuple(given)}, expected [height, width] in pixels")
    return given[0], given[1]


def list_videos(data_dir: str | Path, order: str = "sorted") -> list[Path]:
    """All `.mp4` files under a folder, in sorted order, or ("walk", as the original) as the file system lists them."""
    return list_files(data_dir, VIDEO_SUFFIXES, order)


def caption_path(video: str | Path) -> Path:
    """The caption file of a video or picture: `.txt`, and the last folder named `videos` or `images` becomes `labels`.

    Without such a folder the caption lies beside the video. The original replaces the letters "videos" wherever they
    occur in the path, which fails for /my_videos/set/videos/a.mp4; for the usual layout both give the same.
    """
    video = Path(video)
    parts = list(video.parts)
    folders = [i for i, part in enumerate(parts[:-1]) if part in ("videos", "images")]
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


def caption_of(clip: ListedClip, missing: str = "skip") -> str:
    """A clip's caption, from its source or its file; see `read_caption`. Raises CaptionError."""
    line = read_caption(clip.path, missing) if clip.caption is None else first_line(clip.caption)
    if line.startswith(LFS_MAGIC):
        raise CaptionError(clip.path, f"its caption is {LFS_POINTER}")
    if line.strip() or missing == "empty":
        return line if line.strip() else ""
    raise CaptionError(clip.path, "its caption is empty")


def check_clip(clip: ListedClip, settings: ClipSettings, decoder: DecodeProcess | None = None) -> ClipShape:
    """(frames, height, width) of the captioned clip that a video gives. Decodes one frame.

    Raises:
        VideoError, ClipError, CaptionError: it gives none; the message says why.
    """
    caption_of(clip, settings.missing_caption)
    plan = settings.plan(clip.path, probe(clip.path, settings.decode_timeout, decoder))
    return len(plan.indices), *plan.size


def load_clip(clip: ListedClip, settings: ClipSettings) -> tuple[Tensor, str]:
    """Frames, float32 (f, 3, h, w) in [-1, 1], and caption.

    Raises:
        VideoError, ClipError, CaptionError: the clip cannot be had.
    """
    caption = caption_of(clip, settings.missing_caption)
    return to_unit_range(load_frames(clip.path, settings)), caption


def load_frames(video: str | Path, settings: ClipSettings) -> Tensor:
    """The clip's frames, uint8 (f, 3, h, w).

    Raises:
        VideoError, ClipError: the clip cannot be had.
    """
    plan = settings.plan(video, probe(video, settings.decode_timeout))
    return resize_crop(read_frames(video, plan.indices, settings.decode_timeout), plan.size)


def to_unit_range(frames: Tensor) -> Tensor:
    """uint8 to float32 in [-1, 1]."""
    return frames.to(torch.float32).sub_(127.5).div_(127.5)

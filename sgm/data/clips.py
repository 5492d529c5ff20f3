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
from sgm.data.loader import empty_to_hand_over
from sgm.data.sources import ListedClip, is_image
from sgm.data.video_io import DECODE_TIMEOUT, FileFault, VideoError, VideoInfo, probe, read_frames
from sgm.files import LFS_MAGIC, LFS_POINTER

MISSING_CAPTION = ("skip", "error", "empty")
CAPTION_LINES = ("first", "all")
INTERLACED = ("deinterlace", "skip", "keep")


class CaptionError(FileFault):
    """A clip without a usable caption. `path` is the caption file."""


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
        caption_lines: "first" of a caption's lines, as the original, or "all", joined by blanks.
        interlaced: what becomes of interlaced videos: "deinterlace" makes whole pictures of them, "skip" leaves them
            out, "keep" takes them as they are.
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
    caption_lines: str = "first"
    interlaced: str = "deinterlace"

    def __post_init__(self) -> None:
        problems = []
        if not all(isinstance(side, int | float) and side == int(side) and side > 0 for side in self.video_size):
            problems.append(f"video_size is {self.video_size}, expected [height, width] in pixels")
        choices = {"missing_caption": MISSING_CAPTION, "caption_lines": CAPTION_LINES, "interlaced": INTERLACED}
        for name, ways in choices.items():
            if (chosen := getattr(self, name)) not in ways:
                problems.append(f"{name} is {chosen!r}, choose one of {', '.join(ways)}")
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
        return frame_indices(info.frames, info.fps, self.fps, most, self.skip_frames, self.sampling, info.times)

    def plan(self, path: str | Path, info: VideoInfo) -> ClipPlan:
        """How a clip is taken from a video or picture. Raises ClipError."""
        if is_image(path):
            size = self._bucket(info, lambda frames: frames == 1)[1:] if self.buckets else self.video_size
            return ClipPlan([0], size)
        if info.interlaced and self.interlaced == "skip":
            raise ClipError("an interlaced video, which interlaced: skip leaves out; interlaced: deinterlace takes it")
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


class Caption(NamedTuple):
    """What of a caption is used, and how many lines with text are not."""

    text: str
    dropped: int


def caption_of(clip: ListedClip, missing: str = "skip", lines: str = "first") -> Caption:
    """A clip's caption: of its source, or of its file, which lies where `caption_path` says or beside the video.

    Of the first line trailing blanks are kept, as the original does; a byte order mark is dropped.

    Args:
        missing: with "empty", an absent or empty caption is ""; otherwise it raises.
        lines: "first", or "all" joined by blanks.

    Raises:
        CaptionError: no caption, an empty one, or bytes that are not UTF-8.
    """
    where, text = Path(clip.path), clip.caption
    if text is None:
        where = caption_path(clip.path)
        beside = Path(clip.path).with_suffix(".txt")
        where = beside if beside.is_file() and not where.exists() else where
        text = _text_of(where, missing)
    if text.startswith(LFS_MAGIC):
        raise CaptionError(where, f"its caption is {LFS_POINTER}")
    first, *more = text.splitlines() or [""]
    more = [line for line in more if line.strip()]
    if lines == "all":
        first, more = " ".join(line.strip() for line in (first, *more) if line.strip()), []
    if first.strip() or missing == "empty":
        return Caption(first if first.strip() else "", len(more))
    raise CaptionError(where, "the caption's first line is empty" if more else "the caption is empty")


def _text_of(path: Path, missing: str) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CaptionError(path, f"the caption is not UTF-8 (byte {error.start})") from error
    except OSError as error:
        absent = isinstance(error, FileNotFoundError)
        if absent and missing == "empty":
            return ""
        reason = "there is no such caption file" if absent else f"the caption cannot be read: {error.strerror}"
        raise CaptionError(path, reason) from error


class CheckedClip(NamedTuple):
    """What a video shows, and the clip that it gives: (frames, height, width)."""

    info: VideoInfo
    shape: ClipShape


def check_clip(clip: ListedClip, settings: ClipSettings, decoder: DecodeProcess | None = None) -> CheckedClip:
    """Whether a captioned clip can be taken from a video. Decodes one frame.

    Raises:
        VideoError, ClipError, CaptionError: it gives none; the message says why.
    """
    caption_of(clip, settings.missing_caption, settings.caption_lines)
    info = probe(clip.path, settings.decode_timeout, decoder)
    plan = settings.plan(clip.path, info)
    return CheckedClip(info, (len(plan.indices), *plan.size))


def load_clip(clip: ListedClip, settings: ClipSettings) -> tuple[Tensor, str]:
    """Frames, float32 (f, 3, h, w) in [-1, 1], and caption.

    Raises:
        VideoError, ClipError, CaptionError: the clip cannot be had.
    """
    caption = caption_of(clip, settings.missing_caption, settings.caption_lines).text
    frames = load_frames(clip.path, settings)
    return to_unit_range(frames, empty_to_hand_over(frames.shape, torch.float32)), caption


def load_frames(video: str | Path, settings: ClipSettings) -> Tensor:
    """The clip's frames, uint8 (f, 3, h, w).

    Raises:
        VideoError, ClipError: the clip cannot be had.
    """
    timeout = settings.decode_timeout
    plan = settings.plan(video, probe(video, timeout))
    return read_frames(video, plan.indices, timeout, None, plan.size, settings.interlaced == "deinterlace")


def to_unit_range(frames: Tensor, out: Tensor | None = None) -> Tensor:
    """uint8 to float32 in [-1, 1], on the same device; written into `out` where that is given."""
    out = torch.empty_like(frames, dtype=torch.float32) if out is None else out
    for source, target in zip(frames, out, strict=True):  # one at a time stays in the processor's cache
        torch.sub(source, 127.5, out=target).div_(127.5)
    return out

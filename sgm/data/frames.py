"""Which frames of a video become a training clip."""

from __future__ import annotations

import math
import random

import numpy as np

from sgm.errors import SgmError
from sgm.modules.autoencoding.strides import STRIDES

ClipShape = tuple[int, int, int]  # frames, height and width of a clip in pixels
FRAME_RULES = ("upstream", "timestamps", "random")
INSTANT = 1e-6  # seconds; halfway between two frames the later one is taken, whatever way the times were rounded


class DatasetError(SgmError):
    """Data that cannot be trained on; the message names what is wrong, and where."""


class ClipError(SgmError):
    """A video from which no clip can be taken under the given settings."""


def frame_indices(
    length: int,
    fps: float,
    wanted_fps: float,
    max_num_frames: int,
    skip_frames: float,
    rule: str = "upstream",
    times: np.ndarray | None = None,
) -> list[int]:
    """Frames of a video to train on, in playing order; their number is 4k + 1 and at most `max_num_frames`.

    Args:
        length: frames in the video.
        fps: the video's own frame rate, frames per second.
        wanted_fps: frame rate of the clip.
        max_num_frames: longest clip, 4k + 1.
        skip_frames: frames to leave out at the start and the end (cuts, fades); the fraction is dropped.
        rule: "upstream" keeps the original's choice to the frame. It leaves the end in when the video is longer
            than the clip, and ignores the frame rate when it is shorter (so a 30 fps video of 40 frames yields 33
            consecutive frames). "timestamps" takes frame i from the instant i / wanted_fps after the first
            unskipped frame (the nearest frame, never one of the last `skip_frames`), right at any frame rate, also
            one that changes.
            "random" is that of the original's shards: a clip of full length from a random start (drawn from Python's
            `random` once), spread like "upstream"'s.
        times: when the frames are shown, in seconds, ascending, for "timestamps"; by default evenly, at `fps`.

    Raises:
        ClipError: the video gives no clip. Where the original failed with an IndexError or went on with an empty
            clip, this is the answer.
        ValueError: a setting is out of range.
    """
    check_settings(wanted_fps, max_num_frames, skip_frames, rule)
    if length < 1:
        raise ClipError(f"a video of {length} frames")
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"fps is {fps}, it must be a positive number of frames per second")
    if rule == "timestamps":
        times = np.arange(length) / fps if times is None else times
        return _timestamps(times, fps, wanted_fps, max_num_frames, int(skip_frames))
    return (_random if rule == "random" else _upstream)(length, fps, wanted_fps, max_num_frames, int(skip_frames))


def check_settings(wanted_fps: float, max_num_frames: int, skip_frames: float, rule: str) -> None:
    """Raises ValueError where `frame_indices` cannot work with these, whatever the video."""
    if rule not in FRAME_RULES:
        raise ValueError(f"unknown frame rule {rule!r}; choose one of {', '.join(sorted(FRAME_RULES))}")
    if not (math.isfinite(wanted_fps) and wanted_fps > 0):
        raise ValueError(f"the wanted frame rate is {wanted_fps}, it must be a positive number of frames per second")
    if not (math.isfinite(skip_frames) and skip_frames >= 0):
        raise ValueError(f"{skip_frames} frames to skip, this must not be negative")
    if not STRIDES.is_whole(max_num_frames):
        below = STRIDES.longest_clip(max(max_num_frames, 1))
        raise ValueError(
            f"max_num_frames is {max_num_frames}, the autoencoder takes {STRIDES.clip_lengths} frames: "
            f"choose {below} or {below + STRIDES.time}"
        )


def _upstream(length: int, fps: float, wanted_fps: float, max_num_frames: int, skip: int) -> list[int]:
    # The order of the floating-point operations decides the last frame in some cases; keep it.
    if length / fps * wanted_fps > max_num_frames:
        end = int(skip + max_num_frames / wanted_fps * fps)
        if end > length:
            raise ClipError(
                f"a clip of {max_num_frames} frames at {wanted_fps:g} fps needs frames {skip} to {end - 1} of a "
                f"{fps:g} fps video, this one has {length}; lower the skipped frames or use the rule 'timestamps'"
            )
        return _spread(skip, end, max_num_frames)
    if length > max_num_frames:
        if length - 2 * skip < 1:
            raise ClipError(_too_short(length, skip))
        return _spread(skip, length - skip, max_num_frames)
    count = STRIDES.longest_clip(min(length - 2 * skip, max_num_frames))
    if count == 0:
        raise ClipError(_too_short(length, skip))
    return list(range(skip, skip + count))


def _spread(start: int, end: int, count: int) -> list[int]:
    """`count` frames evenly over [start, end), rounded down."""
    # numpy's own arange: its rounding (the step is that between the first two values) is part of the original's choice,
    # and it can give one value too many, `end` itself.
    indices = np.arange(start, end, (end - start) / count).astype(int).tolist() if end > start else []
    if not indices or indices[-1] >= end:
        raise ClipError(
            f"spreading {count} frames over {start}..{end - 1} leaves that range by rounding, a case that the original "
            "rejects too; use the rule 'timestamps'"
        )
    return indices[:count]


def _timestamps(times: np.ndarray, fps: float, wanted_fps: float, max_num_frames: int, skip: int) -> list[int]:
    if len(times) - 2 * skip < 1:
        raise ClipError(_too_short(len(times), skip))
    # From where on the next frame is the nearest; the last one is shown as long as the mean.
    ends = np.append((times[1:] + times[:-1]) / 2, times[-1] + 0.5 / fps)
    instants = times[skip] + np.arange(max_num_frames) / wanted_fps
    nearest = np.searchsorted(ends, instants + INSTANT, side="right")
    nearest = nearest[nearest < len(times) - skip]
    return nearest[: STRIDES.longest_clip(min(len(nearest), max_num_frames))].tolist()


def _random(length: int, fps: float, wanted_fps: float, max_num_frames: int, skip: int) -> list[int]:
    span = max_num_frames / wanted_fps * fps
    latest = int(length - skip - span)
    if latest < skip:
        raise ClipError(
            f"a clip of {max_num_frames} frames at {wanted_fps:g} fps needs {math.ceil(span) + 2 * skip} frames of a "
            f"{fps:g} fps video, the skipped ones included; this one has {length}"
        )
    # The original's draw includes one start too many; it is kept, and the last frame is held within the video.
    start = random.randint(skip, latest + 1)
    return [min(index, length - 1) for index in _spread(start, int(start + span), max_num_frames)]


def _too_short(length: int, skip: int) -> str:
    return f"{length} frames, of which the first and last {skip} are skipped: none is left; lower the skipped frames"

"""Writing videos and pictures: mp4, and a contact sheet as PNG. A file appears complete or not at all."""

from __future__ import annotations

import errno
import math
import os
import subprocess
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sgm.errors import SgmError
from sgm.files import replacing

if TYPE_CHECKING:
    from torch import Tensor

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)  # what the encoder tells of in words


class EncodingError(SgmError):
    """Frames that cannot be encoded as a video; the message says why."""


def to_uint8(x: Tensor) -> Tensor:
    """Pixels (b, 3, f, h, w) in [-1, 1] to uint8 (b, f, h, w, 3): clamp((x+1)/2, 0, 1) * 255, truncated as the
    original does."""
    scaled = ((x.float() + 1.0) / 2.0).clamp_(0.0, 1.0).mul_(255.0)
    return scaled.byte().permute(0, 2, 3, 4, 1).contiguous()


def write_video(path: Path, frames: np.ndarray, fps: float, options: Sequence[str] = ("-crf", "10")) -> None:
    """H.264 video of uint8 frames (f, h, w, 3), h and w even; the suffix says in which container. Read back to the end
    before it gets its name. `options` are FFmpeg's for the encoder.

    Raises:
        EncodingError: the encoder refuses, or gave other frames than those.
        SaveError: the folder or the disk does.
    """
    (height, width), rate = frames.shape[1:3], str(Fraction(fps).limit_denominator())
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", rate, "-i", "-"]
    with replacing(path) as temporary:
        coded = ["-vcodec", "libx264", "-pix_fmt", "yuv420p", *options, str(temporary)]
        _ffmpeg(path, ["-y", *raw, *coded], np.ascontiguousarray(frames).reshape(-1).data)
        shown = _ffmpeg(path, ["-xerror", "-i", str(temporary), "-map", "0:v:0", "-f", "framecrc", "-"]).splitlines()
        found = sum(not line.startswith("#") for line in shown)
        if found != len(frames) or f"#dimensions 0: {width}x{height}" not in shown:
            raise EncodingError(f"cannot encode {path}: of {len(frames)} frames the encoder kept {found}")


def _ffmpeg(path: Path, arguments: Sequence[str], data: memoryview | bytes = b"") -> str:
    """What FFmpeg says of its work for `path`; Ctrl-C does not reach it. An error of the disk is an OSError."""
    import imageio_ffmpeg

    try:
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *arguments]
        done = subprocess.run(command, input=data, capture_output=True, check=False, process_group=0)
    except (OSError, RuntimeError) as error:
        raise EncodingError(f"cannot encode {path}: {error}") from error
    said = done.stderr.decode(errors="replace").strip()
    for code in _DISK:
        if done.returncode and os.strerror(code) in said:
            raise OSError(code, os.strerror(code))
    if done.returncode:
        raise EncodingError(f"cannot encode {path}: FFmpeg ended with {done.returncode}: {said or 'no word'}")
    return done.stdout.decode()


def write_contact_sheet(path: Path, frames: np.ndarray, count: int = 8, columns: int = 4, width: int = 240) -> None:
    """PNG with up to `count` evenly spaced frames of (f, h, w, 3) in rows of `columns`, each at most `width` wide."""
    from PIL import Image

    picked = frames[np.unique(np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int))]
    height_in, width_in = frames.shape[1:3]
    scale = min(1.0, width / width_in)
    cell = (max(1, round(width_in * scale)), max(1, round(height_in * scale)))
    columns = min(columns, len(picked))
    sheet = Image.new("RGB", (columns * cell[0], math.ceil(len(picked) / columns) * cell[1]))
    for k, frame in enumerate(picked):
        sheet.paste(Image.fromarray(frame).resize(cell), ((k % columns) * cell[0], (k // columns) * cell[1]))
    with replacing(path) as temporary:
        sheet.save(temporary)

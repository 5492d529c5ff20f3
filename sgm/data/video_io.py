"""Reading videos: what a file holds, some of its frames, and those frames at the training size.

Shapes: f frames, h w pixels. Frames are uint8 (f, 3, h, w), RGB, 0 to 255.
"""

from __future__ import annotations

import shlex
import struct
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sgm.data.decoder import DecodeError, DecodeProcess, DecoderLostError, thread_decoder
from sgm.data.images import PictureError, open_picture, resized_size
from sgm.data.sources import Place, is_image
from sgm.errors import SgmError
from sgm.files import LFS_MAGIC, LFS_POINTER

# First bytes of files that are often found under a video's name. FFmpeg would decode the pictures as one-frame videos.
NOT_VIDEO: tuple[tuple[bytes, str], ...] = (
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"GIF8", "a GIF picture"),
    (b"BM", "a BMP picture"),
    (LFS_MAGIC.encode(), LFS_POINTER),
    (b"<!DOCTYPE", "an HTML page (a failed download?)"),
    (b"<html", "an HTML page (a failed download?)"),
    (b"<?xml", "an XML document (a failed download?)"),
    (b"ffconcat", "a playlist"),
    (b"#EXTM3U", "a playlist"),
    (b"PK\x03\x04", "a zip archive"),
    (b"ID3", "an MP3 file"),
)


# How files of the MP4 and QuickTime family begin.
MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")


class ContainerError(SgmError):
    """The file cannot be a complete video; the message is the reason alone."""


def inspect(path: Path) -> None:
    """Whether the file can be a video at all; a few small reads, no decoding.

    Raises:
        ContainerError: it is empty, not a file, of another kind, or cut short.
    """
    place = Place.of(path)
    if not place.file.is_file():
        raise ContainerError("not a regular file" if place.file.exists() else "no such file")
    size = place.length()
    if size == 0:
        raise ContainerError("the file is empty")
    with place.open() as file:
        head = file.read(64)
        for magic, kind in NOT_VIDEO:
            if head.startswith(magic):
                raise ContainerError(f"not a video but {kind}")
        if head[:4] == b"RIFF" and head[8:12] in (b"WEBP", b"WAVE"):
            raise ContainerError(f"not a video but a {head[8:12].decode()} file")
        if not any(head.strip(b"\0")) and size < 2**20 and not any(file.read()):
            raise ContainerError("the file holds only zeros")
        if head[4:8] in MP4_BOXES:
            _inspect_mp4(file, size)


def _inspect_mp4(file: IO[bytes], size: int) -> None:
    """FFmpeg decodes what is left of a file that is cut short; a recording in fragments is whole up to there."""
    ends = dict(_boxes(file, size))
    for kind in ("moov", "mdat"):
        if ends.get(kind, 0) > size and "moof" not in ends:
            raise ContainerError(f"cut short: its {kind!r} box ends at byte {ends[kind]}, the file at {size}")
    if "moov" not in ends:
        raise ContainerError("no index ('moov' box): cut short, or never finished by its writer")


def _boxes(file: IO[bytes], end: int) -> Iterator[tuple[str, int]]:
    """Type and end (bytes from the file's start) of each box at the top."""
    start = 0
    while start + 8 <= end:
        file.seek(start)
        length, kind, long = struct.unpack(">I4sQ", file.read(16).ljust(16, b"\0"))
        # 1 says that the length follows in 64 bits, 0 that the box goes up to the end.
        length = {0: end - start, 1: long}.get(length, length)
        if length < 8 or not kind.isascii() or not kind.strip(b"\0"):
            return  # padding or rubbish after the last box
        start += length
        yield kind.decode("ascii"), start


DECODE_TIMEOUT = 60.0  # seconds for one clip
CROP_MODES = ("center", "random")
Rng = np.random.Generator | np.random.RandomState


class FileFault(SgmError):
    """What is wrong with a clip's file. `path` and `reason` hold the message's two parts.

    With `passing` the fault may be of the moment (see `DecoderLostError`, or the drive's), and the file a good one.
    """

    def __init__(self, path: str | Path, reason: str, passing: bool = False):
        super().__init__(f"{path}: {reason}")
        self.path, self.reason, self.passing = Path(path), reason, passing

    def __reduce__(self) -> tuple[type, tuple[Path, str, bool]]:
        return type(self), (self.path, self.reason, self.passing)


class VideoError(FileFault):
    """A file that cannot be read as a video."""


@dataclass(frozen=True)
class VideoInfo:
    """What a video shows, and what of the file a player heeds for that.

    Attributes:
        frames, seconds: length of what is shown. fps: average frames per second.
        height, width: of the upright picture with square pixels.
        codec: FFmpeg's name; of a picture its file's ending.
        times: of the frames, float64 (frames,), in seconds, ascending.
        hidden: frames in the file that are not shown: cut away by an edit list, or undecodable at its start or end.
        turned: how the picture is set upright: the names of FFmpeg's filters ("clock", "hflip", ...).
        pixel_aspect: width of a stored pixel by its height. interlaced: two half pictures a frame.
        tracks: of video; the one that FFmpeg's command takes is read.
    """

    frames: int
    fps: float
    height: int
    width: int
    codec: str
    seconds: float
    times: np.ndarray = field(default_factory=lambda: np.zeros(1), compare=False, repr=False)
    hidden: int = 0
    turned: Sequence[str] = ()
    pixel_aspect: float = 1.0
    interlaced: bool = False
    tracks: int = 1


def probe(path: str | Path, timeout: float = DECODE_TIMEOUT, decoder: DecodeProcess | None = None) -> VideoInfo:
    """What the video shows. Reads it through once and decodes one frame.

    Args:
        timeout: seconds after which the decoder is stopped.
        decoder: the decoding process to ask; by default the calling thread's own.

    Raises:
        VideoError: empty, truncated, corrupt, not a video, without a video track, or too slow to decode.
    """
    path = Path(path)
    if is_image(path):
        _, _, height, width = read_image(path).shape
        return VideoInfo(1, 1.0, height, width, path.suffix[1:].lower(), 0.0)
    with _video_errors(path):
        inspect(path)
        facts, times = (decoder or thread_decoder()).probe(path, timeout)
    return VideoInfo(len(times), seconds=len(times) / facts["fps"], times=times, **facts)


def read_frames(
    path: str | Path,
    indices: Sequence[int],
    timeout: float = DECODE_TIMEOUT,
    decoder: DecodeProcess | None = None,
    size: tuple[int, int] | None = None,
    deinterlace: bool = True,
) -> Tensor:
    """The frames `indices` of those that a video shows, uint8 (f, 3, h, w); only these are kept in memory.

    Args:
        indices: frame numbers from 0, in any order, repeats allowed.
        size: (height, width) to which each is brought by `resize_crop` as it comes; by default the video's.

    Raises:
        VideoError: as for `probe`, or an index outside the video, or pictures of several sizes without `size`.
    """
    path = Path(path)
    if not len(indices) or min(indices) < 0:
        raise ValueError(f"{path}: frames {list(indices)} asked for; name at least one, counted from 0")
    if is_image(path):
        pictures = read_image(path)
        return (resize_crop(pictures, size) if size else pictures)[list(indices)]
    with _video_errors(path):
        inspect(path)
        frames = (decoder or thread_decoder()).read(path, sorted(set(indices)), timeout, deinterlace)
        with closing(frames):
            return _in_order(frames, indices, size)


def _in_order(frames: Iterator[np.ndarray], indices: Sequence[int], size: tuple[int, int] | None) -> Tensor:
    """Frames, which come sorted by their index and once each, as they are asked for."""
    places: dict[int, list[int]] = {index: [] for index in sorted(indices)}
    for place, index in enumerate(indices):
        places[index].append(place)
    out = torch.empty(0)
    for at, frame in zip(places.values(), frames, strict=True):
        picture = torch.from_numpy(frame).permute(2, 0, 1)[None]
        picture = resize_crop(picture, size) if size else picture
        if not len(out):
            out = picture.new_empty(len(indices), *picture.shape[1:])
        if picture.shape[1:] != out.shape[1:]:
            raise DecodeError(f"its pictures change from {tuple(out.shape[2:])} to {tuple(picture.shape[2:])} pixels")
        for place in at:
            out[place] = picture[0]
    return out


@contextmanager
def _video_errors(path: Path) -> Iterator[None]:
    """Faults of a file as VideoErrors; those of its codec with the command that makes it readable."""
    try:
        yield
    except (ContainerError, DecodeError, OSError) as error:
        reason = str(error)
        if type(error) is DecodeError:
            remedy = f"ffmpeg -i {shlex.quote(str(Place.of(path).file))} -c:v libx264 -crf 12 -pix_fmt yuv420p NEW.mp4"
            reason += f" (codec {error.codec}; what FFmpeg can read of it: `{remedy}`)"
        raise VideoError(path, reason, isinstance(error, (DecoderLostError, OSError))) from error


def read_image(path: str | Path) -> Tensor:
    """A picture as a clip of one frame, uint8 (1, 3, h, w), turned upright as its camera noted.

    Raises:
        VideoError: not a picture, damaged, or larger than Pillow thinks safe.
    """
    try:
        with Place.of(path).open() as file:
            if file.peek(len(LFS_MAGIC)).startswith(LFS_MAGIC.encode()):
                raise PictureError(f"no readable picture ({LFS_POINTER})")
            pixels = np.asarray(open_picture(file))
    except (PictureError, OSError) as error:
        reason = str(error) if isinstance(error, PictureError) else f"no readable picture ({error})"
        raise VideoError(path, reason, isinstance(error, OSError)) from error
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].contiguous()


def resize_crop(
    frames: Tensor,
    size: tuple[int, int],
    mode: str = "center",
    rng: Rng | None = None,
) -> Tensor:
    """Scale frames to cover `size`, then cut out `size`; the same bytes as the original's torchvision calls.

    Bicubic with antialiasing in float32, clamped to 0..255 and rounded. A clip of one frame keeps its time axis,
    which the original loses.

    Args:
        frames: uint8 (f, 3, h, w); f may be 0.
        size: (height, width) of the result.
        mode: "center" (odd differences round towards the top and the left) or "random".
        rng: source of "random"'s two draws, first the top, then the left; numpy's global state by default.

    Returns:
        uint8 (f, 3, height, width).
    """
    height, width = size
    if frames.dtype != torch.uint8 or frames.ndim != 4:
        raise ValueError(f"frames are {frames.dtype} {tuple(frames.shape)}, expected uint8 (f, c, h, w)")
    if height < 1 or width < 1 or min(frames.shape[-2:]) < 1:
        raise ValueError(f"cannot bring frames of {tuple(frames.shape[-2:])} to {height}x{width}")
    new_height, new_width = resized_size(frames.shape[-2], frames.shape[-1], height, width)
    top, left = _corner(new_height - height, new_width - width, mode, rng)
    out = frames.new_empty(*frames.shape[:2], height, width)
    for frame, target in zip(frames, out, strict=True):  # one at a time: float32 needs four times the memory
        scaled = frame
        if (covering := (new_height, new_width)) != frame.shape[-2:]:
            scaled = F.interpolate(frame[None].float(), covering, mode="bicubic", align_corners=False, antialias=True)[
                0
            ]
        scaled = scaled[:, top : top + height, left : left + width]
        target.copy_(scaled if scaled.dtype == torch.uint8 else scaled.clamp_(0, 255).round_())
    return out


def _corner(spare_height: int, spare_width: int, mode: str, rng: Rng | None) -> tuple[int, int]:
    if mode == "center":
        return spare_height // 2, spare_width // 2
    if mode != "random":
        raise ValueError(f"unknown crop mode {mode!r}; choose one of {', '.join(CROP_MODES)}")
    draw = rng.integers if isinstance(rng, np.random.Generator) else rng.randint if rng else np.random.randint
    return int(draw(0, spare_height + 1)), int(draw(0, spare_width + 1))

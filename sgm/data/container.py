"""What a video file is, read from its bytes without decoding: file kind, MP4 box structure, codec name."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from sgm.data.sources import Place
from sgm.errors import SgmError

# First bytes of files that are often found under a video's name. ffmpeg would decode the pictures as one-frame videos.
NOT_VIDEO: tuple[tuple[bytes, str], ...] = (
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"GIF8", "a GIF picture"),
    (b"BM", "a BMP picture"),
    (b"version https://git-lfs", "a Git LFS pointer, not the video itself (fetch it with `git lfs pull`)"),
    (b"<!DOCTYPE", "an HTML page (a failed download?)"),
    (b"<html", "an HTML page (a failed download?)"),
    (b"<?xml", "an XML document (a failed download?)"),
    (b"PK\x03\x04", "a zip archive"),
    (b"ID3", "an MP3 file"),
)
# Sample entry names as registered for the ISO base media file format (mp4ra.org).
CODECS = {
    "avc1": "h264", "avc3": "h264", "hev1": "hevc", "hvc1": "hevc", "av01": "av1", "vp08": "vp8", "vp09": "vp9",
    "mp4v": "mpeg4", "apch": "prores", "apcn": "prores", "jpeg": "mjpeg", "mjpg": "mjpeg",
}  # fmt: skip


class ContainerError(SgmError):
    """The file cannot be a complete video; the message is the reason alone."""


class Box(NamedTuple):
    """One ISO base media box: its type, where its content starts, and where it ends (bytes from the file's start)."""

    kind: str
    start: int
    end: int


def inspect(path: Path) -> str:
    """Codec name of the file's video track, "unknown" outside MP4; a few small reads, no decoding.

    Raises:
        ContainerError: the file is empty, not a file, of another kind, or cut short.
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
        if head[4:8] != b"ftyp":
            return "unknown"
        return _inspect_mp4(file, size)


def _inspect_mp4(file: IO[bytes], size: int) -> str:
    top = list(_boxes(file, 0, size))
    for box in top:
        if box.kind in ("moov", "mdat") and box.end > size:
            raise ContainerError(f"cut short: its {box.kind!r} box ends at byte {box.end}, the file at {size}")
    moov = next((box for box in top if box.kind == "moov"), None)
    if moov is None:
        raise ContainerError("no index ('moov' box): cut short, or never finished by its writer")
    tracks = [(_handler(file, trak), trak) for trak in _boxes(file, moov.start, moov.end) if trak.kind == "trak"]
    for handler, trak in tracks:
        if handler == "vide":
            return _codec(file, trak)
    raise ContainerError(f"no video track (only {', '.join(sorted({h for h, _ in tracks})) or 'nothing'})")


def _boxes(file: IO[bytes], start: int, end: int) -> Iterator[Box]:
    while start + 8 <= end:
        file.seek(start)
        head = file.read(16)
        if len(head) < 8:
            return
        length, kind = struct.unpack(">I4s", head[:8])
        content = 8
        if length == 1 and len(head) == 16:
            length, content = struct.unpack(">Q", head[8:])[0], 16
        elif length == 0:  # the last box: up to the end
            length = end - start
        if length < content or not kind.isascii() or not kind.strip(b"\0"):
            return  # padding or rubbish after the last box
        yield Box(kind.decode("ascii"), start + content, start + length)
        start += length


def _find(file: IO[bytes], box: Box, *kinds: str) -> Box | None:
    for kind in kinds:
        inner = next((b for b in _boxes(file, box.start, box.end) if b.kind == kind), None)
        if inner is None:
            return None
        box = inner
    return box


def _handler(file: IO[bytes], trak: Box) -> str:
    box = _find(file, trak, "mdia", "hdlr")
    return "" if box is None else _text_at(file, box.start + 8)


def _codec(file: IO[bytes], trak: Box) -> str:
    box = _find(file, trak, "mdia", "minf", "stbl", "stsd")
    # stsd: version and flags (4 bytes), entry count (4), then the first entry's size (4) and name (4).
    fourcc = "" if box is None else _text_at(file, box.start + 12)
    return CODECS.get(fourcc, fourcc or "unknown")


def _text_at(file: IO[bytes], position: int) -> str:
    file.seek(position)
    return file.read(4).decode("ascii", errors="replace")

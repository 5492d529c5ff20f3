"""What a file is, read from its bytes without decoding: no video at all, or an MP4 that was cut short."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from sgm.data.sources import Place
from sgm.errors import SgmError

# First bytes of files that are often found under a video's name. FFmpeg would decode the pictures as one-frame videos.
NOT_VIDEO: tuple[tuple[bytes, str], ...] = (
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"GIF8", "a GIF picture"),
    (b"BM", "a BMP picture"),
    (b"version https://git-lfs", "a Git LFS pointer, not the video itself (fetch it with `git lfs pull`)"),
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


class Box(NamedTuple):
    """One ISO base media box: its type, and where it ends (bytes from the file's start)."""

    kind: str
    end: int


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
    boxes = list(_boxes(file, size))
    kinds = {box.kind for box in boxes}
    for box in boxes:
        if box.kind in ("moov", "mdat") and box.end > size and "moof" not in kinds:
            raise ContainerError(f"cut short: its {box.kind!r} box ends at byte {box.end}, the file at {size}")
    if "moov" not in kinds:
        raise ContainerError("no index ('moov' box): cut short, or never finished by its writer")


def _boxes(file: IO[bytes], end: int) -> Iterator[Box]:
    start = 0
    while start + 8 <= end:
        file.seek(start)
        head = file.read(16)
        if len(head) < 8:
            return
        length, kind = struct.unpack(">I4s", head[:8])
        if length == 1 and len(head) == 16:
            length = struct.unpack(">Q", head[8:])[0]
        elif length == 0:  # the last box: up to the end
            length = end - start
        if length < 8 or not kind.isascii() or not kind.strip(b"\0"):
            return  # padding or rubbish after the last box
        start += length
        yield Box(kind.decode("ascii"), start)

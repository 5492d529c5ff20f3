"""What a file is, read from its bytes without decoding: no video at all, or an MP4 that was cut short."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from sgm.data.sources import Place
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

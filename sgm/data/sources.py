"""Where clips come from: a folder of videos and captions, a CSV or JSON Lines manifest, a webdataset shard.

A clip is named by a path; one inside an archive by `ARCHIVE!BEGIN+SIZE!NAME`, which says where its bytes lie, so that
nothing is unpacked and no index has to be kept.
"""

from __future__ import annotations

import csv
import io
import json
import os
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from sgm.data.frames import ClipShape, DatasetError
from sgm.files import refuse_lfs_pointer

VIDEO_SUFFIXES = (
    ".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".flv", ".wmv", ".ogv",
    ".3gp", ".mxf",
)  # fmt: skip
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MANIFEST_SUFFIXES = (".csv", ".jsonl", ".json")
ARCHIVE_SUFFIX = ".tar"
PATH_COLUMNS = (
    "path", "video", "video_path", "video_file", "file", "file_path", "file_name", "image", "image_path",
)  # fmt: skip
TEXT_COLUMNS = ("caption", "text", "prompt")
# What other trainers call the lists in a data folder; finetrainers' two have a line a clip.
MANIFESTS = ("metadata.csv", "metadata.jsonl", "metadata.json")
LINES_OF_PATHS = ("videos.txt", "video.txt", "images.txt", "image.txt")
LINES_OF_TEXT = ("prompts.txt", "prompt.txt", "captions.txt", "caption.txt")
FILE_ORDERS = ("sorted", "walk")
_INSIDE = re.compile(r"(?P<archive>.+?\.tar)!(?P<begin>\d+)\+(?P<size>\d+)!(?P<name>.+)", re.DOTALL)


class ListedClip(NamedTuple):
    """A clip's path (or place in an archive), its caption where the source itself holds it, and (frames, height, width)
    where it was looked at."""

    path: str
    caption: str | None = None
    shape: ClipShape | None = None


class Listing(list[ListedClip]):
    """Clips of a source, in order.

    Attributes:
        passed_over: how many videos and pictures a source holds that are no clips for their ending alone (".mov": 3)
            or, in an archive, for what kind of member they are or how they are named.
    """

    def __init__(self, clips: Iterable[ListedClip] = (), passed_over: Mapping[str, int] | None = None):
        super().__init__(clips)
        self.passed_over = dict(passed_over or {})


@dataclass(frozen=True)
class Place:
    """Where a clip's bytes lie: a file, or `size` bytes from `begin` on in it (None: all)."""

    file: Path
    begin: int = 0
    size: int | None = None

    @classmethod
    def of(cls, path: str | Path) -> Place:
        inside = _INSIDE.fullmatch(str(path))
        if inside is None:
            return cls(Path(path))
        return cls(Path(inside["archive"]), int(inside["begin"]), int(inside["size"]))

    @contextmanager
    def open(self) -> Iterator[io.BufferedReader]:
        """The bytes as a file of their own. Raises OSError."""
        with self.file.open("rb") as file:
            if self.size is None:
                yield file
                return
            member = tarfile.TarInfo()
            member.offset_data, member.size = self.begin, self.size
            yield tarfile.ExFileObject(SimpleNamespace(fileobj=file), member)  # type: ignore[arg-type]  # all it asks of

    def length(self) -> int:
        """In bytes. Raises OSError."""
        return self.file.stat().st_size if self.size is None else self.size


def is_image(path: str | Path) -> bool:
    """Whether a clip is a still picture, by its name."""
    return str(path).lower().endswith(IMAGE_SUFFIXES)


def list_clips(source: str | Path, order: str = "sorted", images: bool = False, txt_key: str = "txt") -> Listing:
    """All clips of a source.

    Args:
        source: a `.csv`, `.jsonl` or `.json` manifest, a `.tar` shard, or a folder. A folder without `labels` is taken
            by its metadata.csv, .jsonl or .json, or its prompts.txt and videos.txt, if it has them; else, as one with
            `labels`, by the videos below it, or if there are none by the `.tar` shards.
        order: of a folder's files: "sorted", or "walk" as the file system lists them.
        images: take a folder's pictures as well, as clips of one frame. Manifests and shards give theirs anyway.
        txt_key: extension of a shard's captions.

    Raises:
        DatasetError: a manifest or shard that cannot be read. FileNotFoundError is never raised: the caller has looked.
    """
    source = Path(source)
    if source.suffix.lower() in MANIFEST_SUFFIXES and source.is_file():
        return Listing(read_manifest(source))
    if source.suffix.lower() == ARCHIVE_SUFFIX and source.is_file():
        return read_shard(source, txt_key)
    if not (source / "labels").is_dir() and (listed := _listed_in(source)) is not None:
        return Listing(listed)
    suffixes = VIDEO_SUFFIXES + (IMAGE_SUFFIXES if images else ())
    files, passed_over = _walk(source, suffixes, order, IMAGE_SUFFIXES)
    if files:
        return Listing((ListedClip(str(path)) for path in files), passed_over)
    shards = [read_shard(shard, txt_key) for shard in list_files(source, (ARCHIVE_SUFFIX,), order)]
    passed_over = sum((Counter(shard.passed_over) for shard in shards), passed_over)
    return Listing((clip for shard in shards for clip in shard), passed_over)


def _listed_in(folder: Path) -> list[ListedClip] | None:
    """The clips that a folder's own lists name; None where it has none."""
    for name in MANIFESTS:
        if (folder / name).is_file():
            return read_manifest(folder / name)
    paths, texts = (
        next((folder / name for name in names if (folder / name).is_file()), None)
        for names in (LINES_OF_PATHS, LINES_OF_TEXT)
    )
    if paths is None or texts is None:
        return None
    named, captions = _lines(paths), _lines(texts)
    if len(named) != len(captions):
        raise DatasetError(
            f"{paths} has {len(named)} lines and {texts.name} {len(captions)}; give each clip one of both"
        )
    return [ListedClip(_located(folder, name), text) for name, text in zip(named, captions, strict=True)]


def _lines(path: Path) -> list[str]:
    with _reading(path):
        return path.read_text(encoding="utf-8-sig").rstrip("\n").split("\n")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raises DatasetError in place of the block's errors: a Git LFS pointer, not UTF-8, unreadable."""
    refuse_lfs_pointer(path, DatasetError)
    try:
        yield
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is not UTF-8 (byte {error.start})") from error
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}") from error


def _located(folder: Path, name: str) -> str:
    return os.path.join(folder.absolute(), os.path.expanduser(name.strip()))


def passed_over_line(counts: Mapping[str, int]) -> str:
    """`Listing.passed_over` for people, with what would take these files; "" where there are none."""
    if not counts:
        return ""
    pictures = any(ending in IMAGE_SUFFIXES for ending in counts)
    named = ", ".join(f"{count} {ending}" for ending, count in sorted(counts.items()))
    return f"passed over: {named}" + (" (pictures: data.params.images=true)" if pictures else "")


def list_files(folder: str | Path, suffixes: tuple[str, ...], order: str = "sorted") -> list[Path]:
    """Files below a folder by their endings, in sorted order, or ("walk", as the original) as the disk lists them."""
    return _walk(folder, suffixes, order)[0]


def _walk(
    folder: str | Path, suffixes: tuple[str, ...], order: str, counted: tuple[str, ...] = ()
) -> tuple[list[Path], Counter[str]]:
    """(files that end as `suffixes`, how many others end as `counted`, by ending): one walk, folders may be large."""
    if order not in FILE_ORDERS:
        raise ValueError(f"unknown file order {order!r}; choose one of {', '.join(FILE_ORDERS)}")
    paths: list[Path] = []
    others: Counter[str] = Counter()
    for where, _, names in os.walk(folder):
        for name in names:
            lower = name.lower()
            if lower.endswith(suffixes):
                paths.append(Path(os.path.join(where, name)))
            elif counted and lower.endswith(counted):
                others["." + lower.rpartition(".")[2]] += 1
    return (sorted(paths) if order == "sorted" else paths), others


def exists(source: str | Path) -> bool:
    """Whether there is such a source at all."""
    source = Path(source)
    return source.is_dir() or (source.is_file() and source.suffix.lower() in (*MANIFEST_SUFFIXES, ARCHIVE_SUFFIX))


def base_of(source: str | Path) -> Path:
    """The folder to which a source's paths are relative."""
    source = Path(source)
    return source if source.is_dir() else source.parent


# --- manifests ----------------------------------------------------------------------------------------------------


def read_manifest(path: str | Path) -> list[ListedClip]:
    """Clips named in a CSV file with a header, in JSON Lines, or in a JSON array, in the file's order.

    The path stands under one of `PATH_COLUMNS`, relative to the manifest; the caption under one of `TEXT_COLUMNS`. A
    row without a caption has it in a `.txt` file as in a folder.

    Raises:
        DatasetError: not UTF-8, a row that is none, or one without a path; names the line.
    """
    path = Path(path)
    rows = {".csv": _csv_rows, ".jsonl": _json_rows, ".json": _array_rows}[path.suffix.lower()](path)
    with _reading(path):
        return [_listed(path, number, row) for number, row in rows]


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        try:
            for row in reader:
                yield reader.line_num, row
        except csv.Error as error:
            raise DatasetError(f"{path}, line {reader.line_num}: {error}") from error


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DatasetError(f"{path}, line {number}: no JSON ({error})") from error
            yield number, row


def _array_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DatasetError(f"{path}: no JSON ({error})") from error
    if not isinstance(rows, list):
        raise DatasetError(f"{path}: expected an array of objects, each with a path and a caption")
    yield from enumerate(rows, 1)


def _listed(manifest: Path, number: int, row: Any) -> ListedClip:
    where = f"{manifest}, {'entry' if manifest.suffix.lower() == '.json' else 'line'} {number}"
    if not isinstance(row, dict):
        raise DatasetError(f"{where}: expected an object with a path and a caption")
    name = next((row[column] for column in PATH_COLUMNS if row.get(column)), None)
    if not isinstance(name, str):
        columns = ", ".join(str(column) for column in row if column is not None) or "none"
        raise DatasetError(f"{where}: no path; name the column {', '.join(PATH_COLUMNS)} (found: {columns})")
    text = next((row[column] for column in TEXT_COLUMNS if isinstance(row.get(column), str)), None)
    return ListedClip(_located(manifest.parent, name), text)


# --- shards -------------------------------------------------------------------------------------------------------


def read_shard(path: str | Path, txt_key: str = "txt") -> Listing:
    """Clips of a webdataset shard: members of one name up to the first dot belong together.

    `NAME.mp4` (or a picture) is the clip; the caption is `NAME.txt_key`, else `txt_key` inside `NAME.json`. Names are
    normalised (`./a//b` is a/b); of two members of one name the later counts, as for tar. Links, devices and sparse
    members are passed over, and so are names that lead out of the archive.

    Raises:
        DatasetError: not a tar file, or cut short.
    """
    path = Path(path)
    media: dict[str, str] = {}
    texts: dict[str, str] = {}
    passed_over: Counter[str] = Counter()
    archive_name = os.path.abspath(path)
    try:
        refuse_lfs_pointer(path, DatasetError)
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                name = posixpath.normpath(member.name)
                folder, file = posixpath.split(name)
                stem, _, kind = file.partition(".")
                key = posixpath.join(folder, stem)
                if member.isdir():
                    continue
                if unfit := _unfit(member, name):
                    passed_over[unfit] += 1
                elif f".{kind.lower()}" in (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES):
                    media[key] = f"{archive_name}!{member.offset_data}+{member.size}!{name}"
                elif kind == txt_key:
                    texts[key] = _text_of(archive, member)
                elif kind == "json":
                    texts.setdefault(key, _json_text(archive, member, txt_key))
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DatasetError(f"{path} is no whole tar file ({error}); compressed ones must be unpacked first") from error
    return Listing((ListedClip(place, texts.get(key, "")) for key, place in media.items()), passed_over)


def _unfit(member: tarfile.TarInfo, name: str) -> str | None:
    """Why a member gives nothing; None where it may."""
    if not member.isfile() or member.issparse():
        return "links, devices or sparse members"
    return "names that lead out of the archive" if name.startswith(("/", "../")) else None


def _text_of(archive: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    content = archive.extractfile(member)
    try:
        return content.read().decode("utf-8-sig") if content else ""
    except UnicodeDecodeError:
        return ""  # the clip is then left out for want of a caption


def _json_text(archive: tarfile.TarFile, member: tarfile.TarInfo, txt_key: str) -> str:
    try:
        content = json.loads(_text_of(archive, member))
    except ValueError:
        return ""
    text = content.get(txt_key) if isinstance(content, dict) else None
    return text if isinstance(text, str) else ""

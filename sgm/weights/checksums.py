"""Checksums: what a file, or a SHA256SUMS beside it, says of its bytes, and whether that is so.

    .pt            CRC-32 of every record, as zip archives have it; PyTorch writes it and never looks at it
    .safetensors   those written here: CRC-32 of the header and of every tensor, in the header's `crc32`
    SHA256SUMS     as `sha256sum` writes it, in the file's folder or up to three above
    blobs/DIGEST   the hub's checksum of a file, by which the Hugging Face library's cache calls it

A file that says nothing is read as it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import IO, Any, NamedTuple

try:  # the same numbers, several times as fast
    from zlib_ng.zlib_ng import crc32
except ImportError:
    from zlib import crc32

from sgm.errors import SgmError, first_line
from sgm.files import refuse_lfs_pointer

SUMS = "SHA256SUMS"
CRC = "crc32"  # its name in a header's metadata
AGAIN = "copy or download it again"
THREADS = min(8, os.cpu_count() or 1)
_OURS = b'{"__metadata__": {"crc32": "'  # other programs keep the metadata of a file that they change, without blanks
_LEVELS = 4  # folders in which SHA256SUMS is looked for
_BLOCK = 1 << 20
_AT_ONCE = 1 << 20  # bytes of a stretch that is checked before anything is made of the file, such as the unpickler's

Stretch = tuple[str, int, int, int]  # part of a file: name, begin, bytes, the CRC-32 that the file states for them
Submit = Callable[..., Any]  # (function, *its arguments)
_submit: ContextVar[Submit | None] = ContextVar("submit", default=None)


class WeightsError(SgmError):
    """A weight file cannot be used: damaged, unsafe, or not what the model needs. The message says which and why."""


class WeightsNotFoundError(WeightsError, FileNotFoundError):
    """A weight file or folder does not exist."""


class DamagedError(WeightsError):
    """Bytes that are not those that were written. `reason`: what tells so."""

    def __init__(self, path: Path, why: object):
        self.reason = first_line(why)
        remedy = f"It is damaged, cut short or no weight file; {AGAIN}."
        super().__init__(f"{path} cannot be read as weights: {self.reason}. {remedy}")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raises WeightsError in place of the block's OSError."""
    try:
        yield
    except FileNotFoundError as error:
        raise WeightsNotFoundError(f"{path} is missing.") from error
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}.") from error


# --- what files say ---------------------------------------------------------------------------------------------------


class Header(NamedTuple):
    """Of a safetensors file: tensors as the format describes them, in the order of their bytes; metadata without our
    checksums; where the values begin; the tensors' checksums (none in files of other programs)."""

    tensors: dict[str, Any]
    metadata: dict[str, str]
    begin: int
    stretches: list[Stretch]


def read_header(path: Path, opened: IO[bytes] | None = None) -> Header:
    """The header of a safetensors file. Raises WeightsError, also where only its checksum tells that it is damaged."""
    with reading(path), nullcontext(opened) if opened else path.open("rb") as file:
        refuse_lfs_pointer(path, WeightsError)
        length, size = int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size
        raw = file.read(length) if length <= size else b""
    try:
        content = json.loads(raw)
        metadata = content.pop("__metadata__", {})
        tensors = dict(sorted(content.items(), key=lambda item: item[1]["data_offsets"]))
        stated = metadata.pop(CRC, "") if raw.startswith(_OURS) else ""
        own, *crcs = [int(stated[k : k + 8], 16) for k in range(0, len(stated), 8)] or [0]
        places = ((name, *entry["data_offsets"]) for name, entry in tensors.items())
        stretches = [(name, 8 + length + a, b - a, crc) for (name, a, b), crc in zip(places, crcs)]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(path, error) from error
    if stated and own != crc32(raw.replace(stated.encode(), b"0" * len(stated), 1)):
        raise DamagedError(path, "its header is not the one that was written")
    return Header(tensors, metadata, 8 + length, stretches)


def stretches_of(path: Path) -> list[Stretch]:
    """What `path` states of its bytes, in their order. Raises WeightsError where that itself is damaged."""
    if path.suffix == ".safetensors":
        return read_header(path).stretches
    with reading(path), path.open("rb") as file:
        refuse_lfs_pointer(path, WeightsError)
        if file.read(4) != b"PK\x03\x04":
            return []
        try:
            found = [_record(file, info) for info in zipfile.ZipFile(file).infolist()]
        except Exception as error:  # a damaged directory makes zipfile raise anything
            raise DamagedError(path, error) from error
    # Zeros alone: none were made (`torch.serialization.set_crc32_options(False)`).
    return sorted(found, key=lambda record: record[1]) if any(crc for *_, crc in found) else []


def _record(file: IO[bytes], info: zipfile.ZipInfo) -> Stretch:
    file.seek(info.header_offset + 26)
    name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
    return info.filename, info.header_offset + 30 + name + extra, info.compress_size, info.CRC


def listed_sum(path: Path) -> tuple[str, Path] | None:
    """(checksum of `path`, see `new_digest`; what says so: the SHA256SUMS that lists it, or its own name in the hub's
    cache), if there is one. Raises WeightsError.
    """
    blob, path = path.resolve(), path.absolute()
    if blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob.name):
        return blob.name, blob
    for folder in path.parents[:_LEVELS]:
        if (sums := folder / SUMS).is_file() and (found := read_sums(sums).get(path.relative_to(folder).as_posix())):
            return found, sums
    return None


def new_digest(like: str, size: int) -> hashlib._Hash:
    """To be fed with a file of `size` bytes, for a checksum `like` that one: SHA-256 (64 hex digits), or git's SHA-1
    (40: of `blob SIZE`, a zero byte and the content), which the hub has for small files.
    """
    return hashlib.sha1(f"blob {size}\0".encode()) if len(like) == 40 else hashlib.sha256()


def read_sums(sums: Path) -> dict[str, str]:
    """Name -> SHA-256 of a SHA256SUMS. Raises WeightsError."""
    with reading(sums):
        refuse_lfs_pointer(sums, WeightsError)
        pairs = [line.partition(" ") for line in sums.read_text(encoding="utf-8", errors="replace").splitlines()]
    return {name.lstrip(" *").removeprefix("./"): digest.lower() for digest, _, name in pairs}


# --- whether it is so -------------------------------------------------------------------------------------------------


class Checks:
    """Checks of files, on threads of their own, whose verdict is waited for when it is needed."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._running: list[Future[None]] = []

    def submit(self, *task: Any) -> None:
        """Begin a check: a function and its arguments."""
        self._pool = self._pool or ThreadPoolExecutor(THREADS, "checksums")
        self._running.append(self._pool.submit(*task))

    @contextmanager
    def first(self) -> Iterator[None]:
        """Where the block fails, a file's damage is said, and not what came of it."""
        try:
            yield
        except Exception:
            self.wait()
            raise

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Files that are read within the block are checked by these, and the block is as in `first`."""
        token = _submit.set(self.submit)
        try:
            with self.first():
                yield
        finally:
            _submit.reset(token)

    def wait(self) -> None:
        """All files so far are whole. Raises WeightsError: one is damaged; so it will the next time."""
        pool, self._pool = self._pool, None
        with pool or nullcontext():
            for task in self._running:
                task.result()
        self._running.clear()


@contextmanager
def verifying() -> Iterator[Submit]:
    """Files that are read within the block are checked meanwhile; at the outermost such block's end they are whole.

    Raises:
        WeightsError: a file is damaged. It comes before what the block itself raised on reading it.
    """
    if (outer := _submit.get()) is not None:
        yield outer
        return
    checks = Checks()
    with checks.collecting():
        yield checks.submit
    checks.wait()


@contextmanager
def small_parts_alone() -> Iterator[None]:
    """Of files that are read within the block, large parts are not compared: for who wants their facts, and leaves
    their values to the one that loads and checks them.
    """
    token = _submit.set(lambda *task: None)
    try:
        yield
    finally:
        _submit.reset(token)


class OpenFile:
    """A file's descriptor, closed when the last one who reads from it has let go. Raises OSError."""

    def __init__(self, path: str | Path):
        self.path, self.descriptor = Path(path), -1
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)

    def crc(self, begin: int, size: int, crc: int = 0) -> int:
        """CRC-32 of those bytes, going on from `crc`. Not mapped: a drive's fault is an error then, and no signal."""
        buffer = memoryview(bytearray(min(_BLOCK, size)))
        while size and (count := os.preadv(self.descriptor, [buffer[:size]], begin)):
            crc = crc32(buffer[:count], crc)
            begin, size = begin + count, size - count
        return crc


def check(path: Path, submit: Submit) -> None:
    """Begin to check a file; small stretches are checked at once. Raises WeightsError for a fault seen so far."""
    stretches = stretches_of(path)
    with reading(path):
        file = OpenFile(path)  # a run that goes on may delete it meanwhile
    compare_crcs(file, [part for part in stretches if part[2] <= _AT_ONCE])
    if (listed := listed_sum(path)) is not None:
        submit(compare_sum, path, *listed)
        return
    large = [part for part in stretches if part[2] > _AT_ONCE]
    for k in range(min(THREADS, len(large))):
        submit(compare_crcs, file, large[k::THREADS])


def compare_crcs(file: OpenFile, stretches: Sequence[Stretch]) -> None:
    """Raises WeightsError where CRC-32 is another than the file says."""
    for name, begin, size, crc in stretches:
        with reading(file.path):
            found = file.crc(begin, size)
        if found != crc:
            raise DamagedError(file.path, f"{name} has another checksum than the file states for it")


def compare_sum(path: Path, listed: str, source: Path) -> None:
    """Raises WeightsError where the checksum is another than `source` says, see `listed_sum`."""
    with reading(path), path.open("rb") as file:
        digest = new_digest(listed, os.fstat(file.fileno()).st_size)
        found = hashlib.file_digest(file, lambda: digest).hexdigest()
    if found != listed:
        way = f"{AGAIN}; if it was changed on purpose, delete its line there"
        if source.name == listed:
            way = f"delete {source}, and it is fetched again"
        raise WeightsError(
            f"{path} is not what {source} lists: its checksum is another. It is damaged or was replaced: {way}."
        )


# --- small files ------------------------------------------------------------------------------------------------------


def read_bytes(path: Path) -> bytes:
    """A small file beside weights. Raises WeightsError: missing, unreadable, a Git LFS pointer, not what is listed."""
    with reading(path):
        refuse_lfs_pointer(path, WeightsError)
        content = path.read_bytes()
    if (listed := listed_sum(path)) is not None:
        compare_sum(path, *listed)
    return content


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a small file. Raises WeightsError, as `read_bytes`, or where it is none."""
    content = read_bytes(path)
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} cannot be read ({error}); {AGAIN}.") from error
    if not isinstance(found, dict):
        raise WeightsError(f"{path} is no JSON object: it holds a {type(found).__name__}, not named fields; {AGAIN}.")
    return found

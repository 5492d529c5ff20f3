"""Writing so that a name never stands for half a file or half a folder.

A file grows under a temporary name in the same folder, is flushed to the disk, then renamed; a folder is exchanged for
an earlier one by renaming. A process that is killed on the way leaves a `.partial-*` behind, which nothing reads and
`remove_leftovers` deletes, or an earlier folder moved aside, which `restore_replaced` brings back.

A failed write is a `SaveError` that names the place and the reason. Only the caller knows which option chose the place:
`advising` adds that.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from sgm.errors import SgmError

logger = logging.getLogger(__name__)

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_held: set[int] = set()


@contextmanager
def try_lock(path: Path, without_locks: bool = True) -> Iterator[bool]:
    """Hold `path`, a file that is made for it and goes afterwards; False where another process holds it.

    On a file system without locks (some cluster drives) it is as if no one else were there, and the log says so; or
    with `without_locks=False` as if another process were.

    Raises:
        OSError: the file cannot be made.
    """
    handle = _take(path, without_locks)
    try:
        yield handle is not None
    finally:
        if handle in _held:  # not in a forked child, whose parent may still be at work
            path.unlink(missing_ok=True)  # before it is let go: who has opened it by now will see that it is gone
            _held.discard(handle)
            os.close(handle)


def _take(path: Path, without_locks: bool) -> int | None:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS or not without_locks:
                os.close(handle)
                if error.errno in (errno.EWOULDBLOCK, *_NO_LOCKS):
                    return None
                raise
            logger.warning("%s: this file system has no locks (%s); two commands could meet here", path, error.strerror)
        if _is_still_there(handle, path):
            _held.add(handle)
            return handle
        os.close(handle)


def _is_still_there(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _let_go_in_child() -> None:
    """A forked worker that outlives its parent for a moment must not hold what the parent held."""
    for handle in _held:
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_let_go_in_child)


PARTIAL = ".partial-"  # prefix of everything that is not finished
REPLACED = ".replaced-"  # prefix of a folder whose successor is on its way
_FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up", errno.EFBIG: "the file grew too large"}
LFS_POINTER = "a Git LFS pointer, not the file itself: run `git lfs pull` in its folder"
LFS_MAGIC = "version https://git-lfs."  # with which pointers begin
_SPARE = 16 << 20  # bytes to leave free for small files beside the big ones


class SaveError(SgmError):
    """A file could not be written; the message says which, why, and what to do. An earlier file of that name stays."""


@contextmanager
def advising(what_to_do: str) -> Iterator[None]:
    """Let a failed write within the block say what its user can do: the option that chose the place.

    Raises:
        SaveError: that of the block, with `what_to_do` after it.
    """
    try:
        yield
    except SaveError as error:
        if what_to_do in str(error):
            raise
        raise SaveError(f"{error} {what_to_do}") from error


def refuse_lfs_pointer(path: Path, kind: type[SgmError]) -> None:
    """Raises `kind` where a clone without git-lfs has left a pointer in a file's place."""
    head = b""
    with suppress(OSError), path.open("rb") as file:  # who reads it says so
        head = file.read(len(LFS_MAGIC))
    if head == LFS_MAGIC.encode():
        raise kind(f"{path} is {LFS_POINTER}.")


def read_lines(path: Path, kind: type[SgmError]) -> list[str]:
    """The lines of a UTF-8 text file, without the blanks around them. Raises `kind`: naming line and byte."""
    refuse_lfs_pointer(path, kind)
    lines: list[str] = []
    for number, raw in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            lines.append(raw.decode("utf-8-sig").strip())
        except UnicodeDecodeError as error:
            raise kind(
                f"{path}, line {number}: byte {error.start + 1} (0x{raw[error.start]:02x}) is not UTF-8. "
                "Save the file as UTF-8."
            ) from error
    return lines


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """Let errors of the system within the block be those of a failed write of `path`. Raises SaveError."""
    try:
        yield
    except OSError as error:
        raise write_failed(path, error) from error


# --- files -------------------------------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` (same suffix), to be filled; it becomes `path` if the block succeeds.

    Raises:
        SaveError: full disk, no permission, ...; the temporary file is gone then and an earlier `path` unchanged.
    """
    temporary = path.with_name(f"{PARTIAL}{os.getpid()}-{path.name}")
    try:
        with saving(path):
            yield temporary
            _sync(temporary)
            os.replace(temporary, path)
            sync_folder(path.parent)
    finally:
        with suppress(OSError):  # where the folder is none, neither is there a temporary file
            temporary.unlink()


def atomic_write(path: str | Path, writer: Callable[[BinaryIO], object]) -> Path:
    """Let `writer` fill what becomes the file `path`; see `replacing`."""
    path = Path(path)
    with replacing(path) as temporary, temporary.open("wb") as file:
        sink = _Sink(file)
        try:
            writer(cast("BinaryIO", sink))
        except RuntimeError as error:  # torch's archive writer wraps what the file said
            if sink.failure is None:
                raise
            raise sink.failure from error
    return path


class _Sink:
    """The file that a writer sees; keeps the first error of the operating system."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.failure: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.failure = self.failure or error
            raise

    def flush(self) -> None:
        self._file.flush()


def write_text(path: str | Path, text: str) -> Path:
    """Write UTF-8 text. Raises SaveError."""
    return atomic_write(path, lambda file: file.write(text.encode("utf-8")))


def write_json(path: str | Path, content: Mapping[str, Any], indent: int = 1) -> Path:
    """Write JSON in lines, with a last newline. Raises SaveError."""
    return write_text(path, json.dumps(content, indent=indent, ensure_ascii=False) + "\n")


def write_failed(path: Path, error: OSError) -> SaveError:
    """What to tell the user about a failed write."""
    reason = _FULL.get(error.errno or 0)
    if reason is None:
        return SaveError(f"cannot write {path}: {error.strerror or error}. What was there before is unchanged.")
    return SaveError(
        f"cannot write {path}: {reason} ({_free_space(path.parent)} free). What was there before is unchanged. "
        "Make room, or choose another place."
    )


def remove(path: Path) -> None:
    """Delete a file or a folder with all in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_if_empty(folder: Path) -> None:
    """Remove a folder in which nothing lies; any other stays."""
    with suppress(OSError):
        folder.rmdir()


def remove_leftovers(folder: Path, named: str = "*") -> list[Path]:
    """Delete the unfinished files and folders that killed processes left in `folder`; returns what was deleted."""
    found = sorted(folder.glob(PARTIAL + named))
    for path in found:
        remove(path)
    return found


@contextmanager
def unfinished_names(place: Path) -> Iterator[str]:
    """A prefix for names of files below `place` that this process has not finished. Such files of processes that were
    killed are deleted, and no others: each process holds the lock of its prefix.

    Raises:
        SaveError: `place` cannot be written to.
    """
    with ExitStack() as stack:
        with saving(place):
            place.mkdir(parents=True, exist_ok=True)
            for lock in sorted(place.glob(f"{PARTIAL}run*.lock")):
                with try_lock(lock, without_locks=False) as abandoned:
                    left = place.rglob(f"{PARTIAL}*{lock.stem.removeprefix(PARTIAL)}-*") if abandoned else ()
                    for file in sorted(left):
                        remove(file)
            names = (f"{PARTIAL}run{uuid.uuid4().hex}" for _ in itertools.count())
            name = next(n for n in names if stack.enter_context(try_lock(place / f"{n}.lock")))
        yield f"{name}-"


# --- folders -----------------------------------------------------------------------------------------------------


def exchange(source: Path, target: Path) -> None:
    """Rename the folder `source` to `target`; an earlier `target` is moved aside first, and stays there.

    Who has made its exchanges calls `restore_replaced`, which deletes what went aside.

    Raises:
        OSError: `target` is as it was before.
    """
    aside = replaced(target)
    if target.exists():
        remove(aside)
        target.rename(aside)
    try:
        target.parent.mkdir(exist_ok=True)
        source.rename(target)
    except OSError:
        if aside.exists():
            aside.rename(target)
        raise
    sync_folder(target.parent)


def replaced(target: Path) -> Path:
    """Where an earlier `target` waits while the new one takes its place."""
    return target.with_name(REPLACED + target.name)


def restore_replaced(place: Path, name: str = "*") -> None:
    """Bring back folders in `place` that were moved aside for one which never arrived; delete them where it did."""
    for aside in sorted(place.glob(REPLACED + name)):
        target = place / aside.name.removeprefix(REPLACED)
        if target.exists():
            remove(aside)
        else:
            aside.rename(target)


def sync_folder(folder: Path) -> None:
    """Bring a folder's entries to the disk, so that a rename survives a power cut."""
    _sync(folder, also_refused=(errno.EINVAL, errno.ENOTSUP))  # some network file systems cannot


def _sync(path: Path, also_refused: tuple[int, ...] = ()) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in also_refused:
            raise
    finally:
        os.close(handle)


# --- room --------------------------------------------------------------------------------------------------------


def require_writable(folder: Path) -> None:
    """Make a folder and write in it, before hours of work go there.

    Raises:
        SaveError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:  # a name of its own: other ranks look, too
            probe.write(bytes(4096))  # a full disk still takes names
    except OSError as error:
        raise SaveError(f"cannot write in {folder}: {_FULL.get(error.errno or 0, error.strerror)}.") from error


def require_space(folder: Path, needed: int) -> None:
    """Refuse to start writing `needed` bytes into `folder` where they do not fit.

    Raises:
        SaveError: naming both sizes.
    """
    free = shutil.disk_usage(folder).free
    if free < needed + _SPARE:
        raise SaveError(
            f"not enough room in {folder}: {readable(needed)} are to be written, {readable(free)} are free. Nothing "
            "was changed. Make room, or choose another place."
        )


def _free_space(folder: Path) -> str:
    try:
        return readable(shutil.disk_usage(folder).free)
    except OSError:
        return "an unknown amount"


def readable(size: int) -> str:
    """Bytes for people: `3.4 GiB`."""
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"

"""A file that one process holds at a time; the system lets go of it when the holder ends, however it ends."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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

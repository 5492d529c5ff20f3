"""Files of a repository into a folder: each whole and with its checksum, or not there under its name.

A file grows as `NAME.part-DIGEST`; whoever breaks off leaves that, and the next download goes on from there.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from glob import escape
from pathlib import Path

from sgm.files import LFS_MAGIC, readable, saving, sync_folder
from sgm.hub.client import Hub, HubError, HubFile, UnreachableError
from sgm.weights.checksums import new_digest

AT_ONCE = 4  # files
ATTEMPTS = 6  # without a byte between them
PAUSE = 1.0  # seconds before the second attempt; each further one waits twice as long
_LONGEST_PAUSE = 30.0
_BLOCK = 1 << 20


class _DamagedError(HubError):
    """A file came whole, and is another one than the hub's list says."""


class Stopped(Exception):
    """Another file failed, or the person gave up."""


@dataclass
class Download:
    """Of `files` of a commit into `folder`.

    Attributes:
        advance: is told of bytes as they arrive, and of those that are taken back.
        say: is told of breaks.
    """

    hub: Hub
    repository: str
    commit: str
    folder: Path
    advance: Callable[[int], object] = lambda count: None
    say: Callable[[str], object] = lambda line: None
    _stop: threading.Event = field(default_factory=threading.Event)

    def run(self, files: Sequence[HubFile]) -> None:
        """Bring those that are not there; what an earlier command brought is compared with the list, too.

        Raises:
            HubError: a file cannot be had, or is not what the hub's list says. What has come stays.
            SaveError: it cannot be written.
        """
        pool = ThreadPoolExecutor(AT_ONCE, "download")
        tasks = [pool.submit(self._fetch, file) for file in files]
        try:
            done, _ = wait(tasks, return_when=FIRST_EXCEPTION)
            self._stop.set()
            for task in done:
                task.result()
        finally:
            self._stop.set()
            pool.shutdown(cancel_futures=True)

    def is_there(self, file: HubFile) -> bool:
        """Under its name and with its size; another commit's may have both."""
        path = self.folder / file.path
        return path.is_file() and path.stat().st_size == file.size

    def missing_bytes(self, files: Sequence[HubFile]) -> int:
        """Bytes that are still to come."""
        return sum(file.size - self._begun(file) for file in files if not self.is_there(file))

    def _part(self, file: HubFile) -> Path:
        path = self.folder / file.path
        return path.with_name(f"{path.name}.part-{file.digest[:16]}")

    def _begun(self, file: HubFile) -> int:
        part = self._part(file)
        size = part.stat().st_size if part.is_file() else 0
        return size if size <= file.size else 0

    def _fetch(self, file: HubFile) -> None:
        path, part = self.folder / file.path, self._part(file)
        if self.is_there(file):
            with suppress(_DamagedError):
                self._check(file, path)
                return
            self.say(f"{file.path} is here from another commit, or damaged; it is fetched anew.")
        with saving(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        for last in (False, True):
            self._fill(file, part)
            try:
                self._check(file, part)
                break
            except _DamagedError as error:
                self.advance(-file.size)
                part.unlink()
                if last:
                    raise
                self.say(f"{error} It is fetched once more.")
        with saving(path):
            os.replace(part, path)
            sync_folder(path.parent)
            for stale in path.parent.glob(f"{escape(path.name)}.part-*"):  # of another commit
                stale.unlink()

    def _fill(self, file: HubFile, part: Path) -> None:
        """Until `part` has all bytes, however often the connection breaks on the way."""
        if part.is_file() and not self._begun(file):
            part.unlink()
        attempts, pause = 0, PAUSE
        while (before := self._begun(file)) < file.size or not part.is_file():
            try:
                self._receive(file, part, before)
                broken: UnreachableError | None = None
            except UnreachableError as error:
                broken = error
            if self._begun(file) > before:
                attempts, pause = 0, PAUSE
            if self._begun(file) == file.size and part.is_file():
                return
            attempts += 1
            broken = broken or UnreachableError(f"{self.hub.endpoint} breaks off in the middle of {file.path}.")
            if attempts >= ATTEMPTS:
                raise broken
            self.say(f"{file.path}: {broken} It goes on from {readable(self._begun(file))}.")
            if self._stop.wait(min(max(pause, broken.wait), _LONGEST_PAUSE)):
                raise Stopped
            pause *= 2

    def _receive(self, file: HubFile, part: Path, start: int) -> None:
        """What comes in one answer. Raises UnreachableError: it broke off."""
        with self.hub.content(self.repository, self.commit, file.path, start) as (read, place):
            if place not in (0, start):
                raise HubError(f"{self.hub.endpoint} gives {file.path} from another place than was asked for.")
            if place < start:  # it knows no ranges
                self.advance(-start)
            with saving(part), part.open("r+b" if part.exists() else "wb") as out:
                out.seek(place)
                out.truncate()
                while block := read(_BLOCK):
                    if self._stop.is_set():
                        raise Stopped
                    if out.tell() + len(block) > file.size:
                        raise HubError(
                            f"{self.hub.endpoint} gives more bytes of {file.path} than the {file.size} of its list."
                        )
                    out.write(block)
                    self.advance(len(block))
                out.flush()
                os.fsync(out.fileno())
        self._refuse_pointer(file, part)

    def _refuse_pointer(self, file: HubFile, part: Path) -> None:
        """A copy of a repository that was made without git-lfs gives these few lines in place of weights."""
        with part.open("rb") as begun:
            is_pointer = begun.read(len(LFS_MAGIC)) == LFS_MAGIC.encode()
        if is_pointer:
            part.unlink()
            raise HubError(
                f"{self.hub.endpoint} gives a Git LFS pointer in place of {file.path} ({readable(file.size)}): this "
                "copy of the repository holds no weights. Take another HF_ENDPOINT."
            )

    def _check(self, file: HubFile, part: Path) -> None:
        digest = new_digest(file.digest, file.size)
        with part.open("rb") as content:
            while block := content.read(_BLOCK):
                if self._stop.is_set():
                    raise Stopped
                digest.update(block)
        if digest.hexdigest() != file.digest:
            raise _DamagedError(
                f"{file.path} came with the checksum {digest.hexdigest()[:16]}..., and the hub's list says "
                f"{file.digest[:16]}...."
            )

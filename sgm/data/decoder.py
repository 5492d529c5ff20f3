"""Video decoding in a process of its own, so that a decoder that hangs or crashes can be ended.

One process serves one thread for its whole life; it is started on first use, and restarted after a time-out or a crash.
It is a plain `subprocess`, not a `multiprocessing` child: DataLoader workers may start it, whether forked or spawned.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import io
import json
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np

from sgm.data.sources import Place
from sgm.errors import SgmError

CHILD = Path(__file__).with_name("_decoder_child.py")
START_SECONDS = 120.0  # importing PyAV on a busy machine or a slow network drive
EXIT_SECONDS = 2.0
PIPE_BYTES = 1 << 20


class DecodeError(SgmError):
    """The decoder refused, crashed or hung; the message is the reason alone. `codec`: of the video, if it was found."""

    def __init__(self, reason: str, codec: str = "unknown"):
        super().__init__(reason)
        self.codec = codec


class DecoderLostError(DecodeError):
    """It crashed or hung, which need not be the video's fault: memory ran out, a network drive stood still."""


class _Child(NamedTuple):
    """A process that runs, and its unbuffered pipes."""

    process: subprocess.Popen[bytes]
    requests: IO[bytes]
    answers: io.FileIO

    def close_pipes(self) -> None:
        self.requests.close()
        self.answers.close()


class DecodeProcess:
    """A decoding process and its pipes. Not for use by two threads at once.

    Args:
        command: the program, `_decoder_child.py` under this interpreter by default.
    """

    def __init__(self, command: Sequence[str] | None = None):
        self.command = list(command or (sys.executable, str(CHILD)))
        self._child: _Child | None = None
        _alive.add(self)

    @property
    def pid(self) -> int | None:
        """Process id of the running decoder, None when none is."""
        return self._child.process.pid if self._child else None

    def probe(self, path: Path, timeout: float) -> tuple[dict[str, Any], np.ndarray]:
        """What a video shows: fields of `sgm.data.video_io.VideoInfo`, and its times. Raises DecodeError."""
        [answer] = self._ask({"op": "probe", **_where(path)}, timeout, 1)
        return answer

    def read(self, path: Path, indices: Sequence[int], timeout: float, deinterlace: bool) -> Generator[np.ndarray]:
        """Frames as uint8 (h, w, 3), one after the other as they are decoded.

        Args:
            timeout: seconds until the last frame is taken.

        It is to be read to its end or closed; else the process could not be asked again.

        Raises:
            DecodeError: at any frame.
        """
        request = {"op": "read", **_where(path), "indices": [int(i) for i in indices], "deinterlace": deinterlace}
        with contextlib.closing(self._ask(request, timeout, len(indices))) as answers:
            for _, frame in answers:
                yield frame

    def close(self) -> None:
        """End the process; a later request starts a new one."""
        child, self._child = self._child, None
        if child is None:
            return
        child.close_pipes()
        try:
            child.process.wait(EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            child.process.kill()
            child.process.wait()

    def forget(self) -> None:
        """In a forked child: let go of the parent's process without ending it."""
        child, self._child = self._child, None
        if child is not None:
            child.close_pipes()  # our copies: held open, they would keep the process from seeing its end
            child.process.returncode = 0  # not our child: nothing to wait for

    def _ask(self, request: dict[str, Any], timeout: float, count: int) -> Generator[tuple[dict[str, Any], np.ndarray]]:
        """So many answers: what else their heads say, and the array."""
        if timeout <= 0:
            raise ValueError(f"timeout is {timeout} s, it must be positive")
        child = self._child or self._start()
        deadline = time.monotonic() + timeout
        # The process ends itself a little after we would have ended it, in case that we are gone by then.
        message = json.dumps({**request, "limit": timeout + EXIT_SECONDS}).encode() + b"\n"
        try:
            child.requests.write(message)
            for _ in range(count):
                head = _read_head(child.answers, deadline)
                if "error" in head:
                    raise DecodeError(head["error"], head["codec"])
                array = np.empty(head.pop("shape"), head.pop("dtype"))
                _read_into(array.reshape(-1).view(np.uint8).data, child.answers, deadline)
                yield head, array
        except DecodeError:
            raise  # an answer: the process is in step and goes on
        except TimeoutError:
            self._kill(child)
            raise DecoderLostError(f"decoding took longer than {timeout:g} s and was stopped") from None
        except (EOFError, BrokenPipeError):
            raise DecoderLostError(f"the decoder crashed ({self._kill(child, EXIT_SECONDS)})") from None
        except BaseException:
            self._kill(child)  # interrupted between request and answer: the next answer would be the wrong one
            raise

    def _start(self) -> _Child:
        process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
        )
        child = _Child(process, cast("IO[bytes]", process.stdin), cast("io.FileIO", process.stdout))
        self._child = child
        _widen(child.answers.fileno())
        try:
            hello = _read_head(child.answers, time.monotonic() + START_SECONDS)
        except TimeoutError:
            self._kill(child)
            raise RuntimeError(f"the decoding process did not start in {START_SECONDS:g} s: {self.command}") from None
        except EOFError:
            raise RuntimeError(
                f"the decoding process failed ({self._kill(child, EXIT_SECONDS)}): {self.command}"
            ) from None
        if "error" in hello:
            self._kill(child)
            raise RuntimeError(f"the decoding process cannot work: {hello['error']}")
        return child

    def _kill(self, child: _Child, grace: float = 0.0) -> str:
        """End the process, after `grace` seconds if it has not ended by itself; says how it did."""
        self._child = None
        try:
            child.process.wait(grace)
        except subprocess.TimeoutExpired:
            child.process.kill()
        code = child.process.wait()
        child.close_pipes()
        return f"exit status {code}"


def _read_head(answers: io.FileIO, deadline: float) -> dict[str, Any]:
    length = bytearray(4)
    _read_into(memoryview(length), answers, deadline)
    text = bytearray(int.from_bytes(length, "little"))
    _read_into(memoryview(text), answers, deadline)
    return json.loads(text)


def _read_into(view: memoryview, answers: io.FileIO, deadline: float) -> None:
    ready = select.poll()  # not select(): a worker that holds many tensors has descriptors beyond its 1024
    ready.register(answers, select.POLLIN | select.POLLHUP)
    while len(view):
        remaining = deadline - time.monotonic()
        if remaining <= 0 or not ready.poll(remaining * 1000):
            raise TimeoutError
        count = answers.readinto(view)
        if count == 0:
            raise EOFError
        view = view[count:]


def _where(path: Path) -> dict[str, Any]:
    place = Place.of(path)
    return {"path": str(place.file.absolute()), "begin": place.begin, "size": place.size}


def _widen(pipe: int) -> None:
    """Give a pipe the megabyte that Linux allows by default: a clip is some 50 MB. Without it all works, but slower."""
    if hasattr(fcntl, "F_SETPIPE_SZ"):
        with contextlib.suppress(PermissionError):  # the user's pipe quota is spent
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)


_alive: weakref.WeakSet[DecodeProcess] = weakref.WeakSet()
_of_thread = threading.local()


def thread_decoder() -> DecodeProcess:
    """The calling thread's decoder."""
    if not hasattr(_of_thread, "decoder"):
        _of_thread.decoder = DecodeProcess()
    return _of_thread.decoder


def _forget_all() -> None:
    for decoder in list(_alive):
        decoder.forget()


def _close_all() -> None:
    for decoder in list(_alive):
        decoder.close()


os.register_at_fork(after_in_child=_forget_all)
atexit.register(_close_all)

"""Video decoding in a process of its own, so that a decoder that hangs or crashes can be ended.

One process serves one thread for its whole life; it is started on first use, and restarted after a time-out or a crash.
It is a plain `subprocess`, not a `multiprocessing` child: DataLoader workers may start it, whether forked or spawned.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import os
import select
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sgm.data.sources import Place
from sgm.errors import SgmError

CHILD = Path(__file__).with_name("_decoder_child.py")
START_SECONDS = 120.0  # importing decord on a busy machine or a slow network drive
EXIT_SECONDS = 2.0
PIPE_BYTES = 1 << 20


class DecodeError(SgmError):
    """The decoder refused, crashed or hung; the message is the reason alone."""


class DecoderLostError(DecodeError):
    """It crashed or hung, which need not be the video's fault: memory ran out, a network drive stood still."""


class DecodeProcess:
    """A decoding process and its pipes. Not for use by two threads at once.

    Args:
        command: the program, `_decoder_child.py` under this interpreter by default.
    """

    def __init__(self, command: Sequence[str] | None = None):
        self.command = list(command or (sys.executable, str(CHILD)))
        self._process: subprocess.Popen | None = None
        _alive.add(self)

    @property
    def pid(self) -> int | None:
        """Process id of the running decoder, None when none is."""
        return self._process.pid if self._process else None

    def probe(self, path: Path, timeout: float) -> dict[str, float]:
        """`frames`, `fps`, `height` and `width` of a video. Raises DecodeError."""
        return self._ask({"op": "probe", **_where(path)}, timeout)[0]

    def read(self, path: Path, indices: Sequence[int], timeout: float) -> np.ndarray:
        """Frames as uint8 (f, h, w, 3), in the order of `indices`, which may repeat. Raises DecodeError."""
        request = {"op": "read", **_where(path), "indices": [int(i) for i in indices]}
        _, frames = self._ask(request, timeout)
        return frames

    def close(self) -> None:
        """End the process; a later request starts a new one."""
        process, self._process = self._process, None
        if process is None:
            return
        process.stdin.close()
        process.stdout.close()
        try:
            process.wait(EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def forget(self) -> None:
        """In a forked child: let go of the parent's process without ending it."""
        process, self._process = self._process, None
        if process is not None:
            process.stdin.close()  # our copies of the pipes: held open, they would keep the process from seeing its end
            process.stdout.close()
            process.returncode = 0  # not our child: nothing to wait for

    def _ask(self, request: dict, timeout: float) -> tuple[dict, np.ndarray | None]:
        if timeout <= 0:
            raise ValueError(f"timeout is {timeout} s, it must be positive")
        process = self._process or self._start()
        deadline = time.monotonic() + timeout
        # The process ends itself a little after we would have ended it, in case that we are gone by then.
        message = json.dumps({**request, "limit": timeout + EXIT_SECONDS}).encode() + b"\n"
        try:
            process.stdin.write(message)
            head = self._read_head(deadline)
            if "error" in head:
                raise DecodeError(head["error"])
            frames = np.empty(head["shape"], np.uint8) if "shape" in head else None
            if frames is not None:
                self._read_into(memoryview(frames).cast("B"), deadline)
            return head, frames
        except DecodeError:
            raise  # an answer: the process is in step and goes on
        except TimeoutError:
            self._kill()
            raise DecoderLostError(f"decoding took longer than {timeout:g} s and was stopped") from None
        except (EOFError, BrokenPipeError):
            raise DecoderLostError(f"the decoder crashed ({self._kill(EXIT_SECONDS)})") from None
        except BaseException:
            self._kill()  # interrupted between request and answer: the next answer would be the wrong one
            raise

    def _start(self) -> subprocess.Popen:
        self._process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
        )
        _widen(self._process.stdout.fileno())
        try:
            hello = self._read_head(time.monotonic() + START_SECONDS)
        except TimeoutError:
            self._kill()
            raise RuntimeError(f"the decoding process did not start in {START_SECONDS:g} s: {self.command}") from None
        except EOFError:
            raise RuntimeError(f"the decoding process failed ({self._kill(EXIT_SECONDS)}): {self.command}") from None
        if "error" in hello:
            self._kill()
            raise RuntimeError(f"the decoding process cannot work: {hello['error']}")
        return self._process

    def _kill(self, grace: float = 0.0) -> str:
        """End the process, after `grace` seconds if it has not ended by itself; says how it did."""
        process, self._process = self._process, None
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            process.kill()
        code = process.wait()
        process.stdin.close()
        process.stdout.close()
        return f"exit status {code}"

    def _read_head(self, deadline: float) -> dict:
        length = bytearray(4)
        self._read_into(memoryview(length), deadline)
        text = bytearray(int.from_bytes(length, "little"))
        self._read_into(memoryview(text), deadline)
        return json.loads(text)

    def _read_into(self, view: memoryview, deadline: float) -> None:
        stdout = self._process.stdout
        ready = select.poll()  # not select(): a worker that holds many tensors has descriptors beyond its 1024
        ready.register(stdout, select.POLLIN | select.POLLHUP)
        while len(view):
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not ready.poll(remaining * 1000):
                raise TimeoutError
            count = stdout.readinto(view)
            if count == 0:
                raise EOFError
            view = view[count:]


def _where(path: Path) -> dict[str, Any]:
    place = Place.of(path)
    return {"path": str(place.file), "begin": place.begin, "size": place.size}


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

"""A server in this process over a model that only paints, and the real one in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sgm.data.video_out import write_video
from sgm.files import write_json
from sgm.serve.jobs import FAST, FEW_STEPS, FULL, ClipRequest, ModelFacts
from sgm.serve.store import Origin
from tests.sampling_tiny import REPO, environment

FACTS = ModelFacts(
    name="tiny", fps=8, size=(16, 32), size_step=16, num_frames=9, frame_step=8, steps=5, start="video",
    modes=(FULL, FAST, FEW_STEPS), student="/adapters/student",
)  # fmt: skip
PICTURES = ModelFacts(
    name="pictures", fps=8, size=(16, 32), size_step=16, num_frames=9, frame_step=8, steps=5, start="image"
)


def request(prompt: str = "a star", **other: Any) -> ClipRequest:
    given = {"model": "tiny", "prompt": prompt, "seed": 1, "size": (16, 32), "num_frames": 9, "fps": 8}
    return ClipRequest(**{**given, **other})


def origin(fingerprint: str = "f", **other: Any) -> Origin:
    return Origin(fingerprint, **other)


@dataclass
class Report:
    step: int
    total: int

    @staticmethod
    def preview() -> np.ndarray:
        return np.zeros((4, 16, 32, 3), np.uint8)


@dataclass
class Painted:
    frames: np.ndarray
    warnings: tuple[str, ...] = ()

    def save(self, path: Path) -> None:
        write_video(path, self.frames, 8)
        write_json(path.with_suffix(".json"), {"size": [16, 32]})


def paint(asked: ClipRequest, folder: Path, on_step: Callable[[Report], None]) -> Painted:
    """A clip in one colour."""
    for step in range(1, 4):
        on_step(Report(step, 3))
    return Painted(np.full((asked.num_frames, *asked.size, 3), asked.seed % 256, np.uint8))


class Server:
    """`python -m sgm.serve` with files of its own, started when `start` is called."""

    def __init__(self, folder: Path, *arguments: object):
        self.folder = folder
        self.arguments = [str(a) for a in arguments]
        self.log: list[str] = []
        self.address = ""
        self.process: subprocess.Popen[str] | None = None

    def start(self, *more: str, environ: dict[str, str] | None = None) -> None:
        """Returns once it listens."""
        line = [sys.executable, "-m", "sgm.serve", "--port", "0", "--output-dir", str(self.folder), *self.arguments]
        self.process = subprocess.Popen(
            [*line, *more], cwd=REPO, env={**environment(), **(environ or {})}, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, process_group=0,
        )  # fmt: skip
        assert self.process.stdout is not None
        for text in self.process.stdout:
            self.log.append(text)
            if "http://" in text:
                self.address = next(word for word in text.split() if word.startswith("http://"))
                break
        else:
            raise AssertionError("".join(self.log))
        threading.Thread(target=self.log.extend, args=(self.process.stdout,), daemon=True).start()

    def workers(self) -> list[int]:
        """Process ids."""
        assert self.process is not None
        found = subprocess.run(
            ["pgrep", "-P", str(self.process.pid), "-f", "sgm.serve.worker"], capture_output=True, text=True
        )
        return [int(word) for word in found.stdout.split()]

    def kill(self) -> None:
        """As a power cut would, but for the machine."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


@contextmanager
def running(server: Server, *more: str) -> Iterator[Server]:
    server.start(*more)
    try:
        yield server
    finally:
        if server.process is not None and server.process.poll() is None:
            server.stop()


def wait_for(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError("it did not happen in time")


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True

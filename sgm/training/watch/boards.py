"""Where numbers and pictures of a run can be watched: TensorBoard, Weights & Biases."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sgm.errors import SgmError
from sgm.files import write_failed


class WatchError(SgmError):
    """A board cannot be opened. The message says which and what to do."""


class Board(Protocol):
    """What a run reports to."""

    def scalars(self, values: Mapping[str, float], iteration: int) -> None:
        """Numbers by name ("group/name")."""

    def video(self, name: str, path: Path, frames: np.ndarray, fps: int, iteration: int) -> None:
        """A clip: its mp4, and the same as uint8 frames (f, h, w, 3)."""

    def close(self) -> None: ...


class TensorBoard:
    """Event files for `tensorboard --logdir FOLDER`; clips appear as a strip of their frames.

    Args:
        iteration: a resumed run's; what an earlier process wrote beyond it is hidden.
    """

    STRIP_FRAMES = 8

    def __init__(self, folder: Path, iteration: int = 0):
        self._folder, self._files = folder, 0
        self._writer: Any = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if iteration:
                self._write(iteration + 1, {"session_log": {"status": "START"}})
        except OSError as error:
            raise WatchError(f"cannot write TensorBoard's files to {folder}: {error.strerror or error}") from error

    def scalars(self, values: Mapping[str, float], iteration: int) -> None:
        from tensorboardX import summary

        self._write(iteration, *({"summary": summary.scalar(name, value)} for name, value in values.items()))

    def video(self, name: str, path: Path, frames: np.ndarray, fps: int, iteration: int) -> None:
        from tensorboardX import summary

        picked = np.linspace(0, len(frames) - 1, min(self.STRIP_FRAMES, len(frames))).round().astype(int)
        strip = np.concatenate(list(frames[picked]), axis=1)
        self._write(iteration, {"summary": summary.image(name, strip, dataformats="HWC")})

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _write(self, iteration: int, *contents: Mapping[str, Any]) -> None:
        """Append events, here and now: tensorboardX's SummaryWriter leaves that to a thread, which dies where the disk
        is full; the run would wait for ever for room in its queue.
        """
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event

        try:
            if self._writer is None or not Path(self._writer._file_name).exists():
                self._files += 1
                self._writer = EventsWriter(str(self._folder / "events"), f".{os.getpid()}.{self._files}")
            for content in contents:
                self._writer.write_event(Event(step=iteration, wall_time=time.time(), **content))
            self._writer.flush()
        except OSError as error:
            self._writer = None  # nothing is read behind an event that was cut short: go on in another file
            raise write_failed(self._folder, error) from error


class WeightsAndBiases:
    """A run of wandb; one that is resumed goes on in the same.

    Args:
        folder: the run's folder, which names it; wandb keeps its files there.
    Raises:
        WatchError: not logged in, or wandb cannot start.
    """

    def __init__(self, folder: Path, project: str, config: Mapping[str, Any]):
        import wandb

        self._wandb = wandb
        identity = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]
        try:
            self._run = wandb.init(
                project=project, name=folder.name, id=identity, resume="allow", dir=str(folder), config=dict(config)
            )
        except (wandb.Error, OSError) as error:
            raise WatchError(
                f"args.wandb: wandb does not start: {error}. Log in with `wandb login`, set WANDB_MODE=offline to "
                "upload later with `wandb sync`, or set args.wandb: false."
            ) from error

    def scalars(self, values: Mapping[str, float], iteration: int) -> None:
        self._run.log(dict(values), step=iteration)

    def video(self, name: str, path: Path, frames: np.ndarray, fps: int, iteration: int) -> None:
        self._run.log({name: self._wandb.Video(str(path), format="mp4")}, step=iteration)

    def close(self) -> None:
        self._run.finish()

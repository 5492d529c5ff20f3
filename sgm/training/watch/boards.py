"""Where numbers and pictures of a run can be watched: TensorBoard, Weights & Biases."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sgm.errors import SgmError


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
        folder: of the event files.
        iteration: a resumed run's; what an earlier process wrote beyond it is hidden.
    """

    STRIP_FRAMES = 8

    def __init__(self, folder: Path, iteration: int = 0):
        from tensorboardX import SummaryWriter  # type: ignore[import-untyped]

        try:
            self._writer = SummaryWriter(str(folder), purge_step=iteration + 1 if iteration else None)
        except OSError as error:
            raise WatchError(f"cannot write TensorBoard's files to {folder}: {error.strerror or error}") from error

    def scalars(self, values: Mapping[str, float], iteration: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, iteration)
        self._writer.flush()

    def video(self, name: str, path: Path, frames: np.ndarray, fps: int, iteration: int) -> None:
        picked = np.linspace(0, len(frames) - 1, min(self.STRIP_FRAMES, len(frames))).round().astype(int)
        self._writer.add_image(name, np.concatenate(list(frames[picked]), axis=1), iteration, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of wandb; one that is resumed goes on in the same.

    Args:
        folder: the run's folder, which names it; wandb keeps its files there.
        project: name of the project.
        config: the resolved configuration.
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

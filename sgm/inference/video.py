"""What a call of the Python interface gives: a video with its record, and word of it while it is made."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from sgm.data.video_out import write_video
from sgm.files import saving, write_json
from sgm.typed import ConfigError

CONTAINERS = (".mp4", ".mov", ".mkv")


@dataclass(frozen=True)
class StepReport:
    """One sampling step is done.

    Attributes:
        step, total: steps taken, from 1, and in all.
        prompt: which of the call's prompts is at work, from 0.
        preview: the clip as it is foreseen, uint8 (f, h, w, 3), decoded when it is called: by the small decoder where
            the configuration names one, else up to four frames, each decoded alone. Only within `on_step`.
    """

    step: int
    total: int
    prompt: int
    preview: Callable[[], np.ndarray] = field(repr=False)


@dataclass(frozen=True)
class Preview:
    """The clip as it is foreseen after a step; see `StepReport`."""

    step: int
    total: int
    frames: np.ndarray = field(repr=False)


@dataclass(frozen=True)
class Video:
    """A sampled clip.

    Attributes:
        frames: uint8 (f, h, w, 3), RGB.
        fps: frames per second.
        latents: (t, c, h/8, w/8), scaled, on the CPU.
        record: what the commands write beside a clip: the request first, then what it led to.
        warnings: what was unusual, such as the end of a prompt that the text encoder does not read, or words that the
            model does not know.
    """

    frames: np.ndarray = field(repr=False)
    fps: int
    latents: Tensor = field(repr=False)
    record: dict[str, Any] = field(repr=False)
    warnings: tuple[str, ...] = ()

    @property
    def prompt(self) -> str:
        """As it was given."""
        return str(self.record["prompt"])

    @property
    def seed(self) -> int:
        """Of the call; with the prompt's and the sample's number it makes the noise."""
        return int(self.record["seed"])

    def _repr_html_(self) -> str:
        """What a notebook shows: the clip itself."""
        with tempfile.TemporaryDirectory() as folder:
            write_video(Path(folder) / "clip.mp4", self.frames, self.fps)
            coded = base64.b64encode((Path(folder) / "clip.mp4").read_bytes()).decode()
        return f'<video controls autoplay loop muted src="data:video/mp4;base64,{coded}"></video>'

    def save(self, path: str | Path) -> Path:
        """Write the clip (H.264) and its record, which lies beside it under the same name with `.json`.

        Returns:
            The clip's path.
        Raises:
            ConfigError: another ending than `CONTAINERS`.
            SaveError: it cannot be written; an earlier clip of that name is as it was.
        """
        path = Path(path).expanduser()
        if path.suffix.lower() not in CONTAINERS:
            raise ConfigError(f"{path} has no ending of a video; choose {', '.join(CONTAINERS)}.")
        with saving(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        record = path.with_suffix(".json")
        write_video(path, self.frames, self.fps)
        write_json(record, {**self.record, "file_bytes": {path.name: path.stat().st_size}})
        return path

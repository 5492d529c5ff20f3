"""What is asked of a clip, and what has become of it."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from sgm.errors import SgmError

FULL, FAST, FEW_STEPS = "full", "fast", "few_steps"
QUEUED, RUNNING, COMPLETED, FAILED = "queued", "in_progress", "completed", "failed"  # as in OpenAI's API
DELETED, EXPIRED = "deleted", "expired"  # shown to nobody
SHOWN = (QUEUED, RUNNING, COMPLETED, FAILED)
ID = re.compile(r"video_[0-9a-f]{32}")


class ServeError(SgmError):
    """The server cannot start or go on; says why and what to do."""


@dataclass(frozen=True)
class ClipRequest:
    """What a client asks for, checked and with every default filled in but those of the model itself.

    `size` is (height, width) in pixels, `num_frames` counts the video's frames, `lora` holds `NAME:SCALE` of adapters
    that are offered. `image` and `video` are names of files in the job's folder.
    """

    model: str
    prompt: str
    seed: int
    size: tuple[int, int]
    num_frames: int
    fps: int
    negative_prompt: str = ""
    steps: int | None = None
    guidance_scale: float | None = None
    image: str | None = None
    video: str | None = None
    strength: float | None = None
    lora: tuple[str, ...] = ()
    refine: bool = False
    mode: str = FULL

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        content = json.loads(text)
        return cls(**{**content, "size": tuple(content["size"]), "lora": tuple(content["lora"])})

    @property
    def pixels(self) -> int:
        """Of all frames: what a step takes grows with them."""
        return self.size[0] * self.size[1] * self.num_frames


@dataclass(frozen=True)
class Job:
    """A row of the store. Times are seconds since 1970; `step` of `steps` are taken; `number` grows from job to job."""

    number: int
    id: str
    state: str
    request: ClipRequest
    created_at: float
    started_at: float | None
    finished_at: float | None
    step: int
    steps: int
    attempts: int
    error: str | None

    @property
    def progress(self) -> int:
        """Per cent; 100 means that the files are there."""
        if self.state == COMPLETED:
            return 100
        return min(99, 100 * self.step // self.steps) if self.steps else 0

    @property
    def is_finished(self) -> bool:
        return self.state in (COMPLETED, FAILED)


class JobFiles:
    """The files of one job, all in one folder of its own.

    Attributes:
        variants: name in the API -> file and media type; the first three are OpenAI's. A preview goes when the video
            comes.
        warnings: what was unusual about the video, one a line; there where something was.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.video, self.record = folder / "000000.mp4", folder / "000000.json"
        self.thumbnail, self.spritesheet = folder / "thumbnail.webp", folder / "spritesheet.jpg"
        self.preview, self.warnings = folder / "preview.jpg", folder / "warnings.txt"
        self.variants = {
            "video": (self.video, "video/mp4"),
            "thumbnail": (self.thumbnail, "image/webp"),
            "spritesheet": (self.spritesheet, "image/jpeg"),
            "record": (self.record, "application/json"),
            "preview": (self.preview, "image/jpeg"),
        }


@dataclass(frozen=True)
class ModelFacts:
    """What a worker says of a model once it has read its configuration.

    Attributes:
        size: (height, width) of its videos when none is asked for; other sizes are multiples of `size_step`.
        num_frames: of its videos; other lengths are 1 above a multiple of `frame_step`.
        start: what a video may begin with besides text: `image` (it must) or `video`.
        modes: in which it can be sampled, `full` first.
        student: the adapter of `few_steps`.
    """

    name: str
    fps: int
    size: tuple[int, int]
    size_step: int
    num_frames: int
    frame_step: int
    steps: int
    start: str
    modes: tuple[str, ...] = (FULL,)
    student: str | None = None

    @classmethod
    def parse(cls, content: dict[str, Any]) -> Self:
        return cls(**{**content, "size": tuple(content["size"]), "modes": tuple(content["modes"])})

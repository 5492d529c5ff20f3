"""The clip that videos are made from (video to video): its file, checked, and its pixels at the model's size."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sgm.data.images import resized
from sgm.data.video_io import VideoError, probe, read_frames
from sgm.errors import SgmError
from sgm.files import refuse_lfs_pointer


class SourceError(SgmError):
    """A clip to start from cannot be read; the message names it."""


@dataclass(frozen=True)
class SourceClip:
    """A video's file: how many frames it shows, and the SHA-256 of its bytes."""

    path: Path
    frames: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> SourceClip:
        """Read all of `path` once.

        Raises:
            SourceError: absent, or no video.
        """
        if not path.is_file():
            raise SourceError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}.")
        refuse_lfs_pointer(path, SourceError)
        try:
            return cls(path, probe(path).frames, _sha256(path))
        except (VideoError, OSError) as error:
            raise SourceError(str(error)) from error

    @property
    def place(self) -> str | None:
        """Its file, from the root; None: it has none."""
        return os.path.abspath(self.path)

    def pixels(self, frames: int, size: tuple[int, int]) -> Tensor:
        """Its first `frames`, whole, by Lanczos at `size` (height, width): (1, 3, f, h, w) in [-1, 1].

        Raises:
            SourceError: it cannot be read any more, or is another one than was checked.
        """
        pictures = [resized(Image.fromarray(frame), size) for frame in self._first(frames)]
        return torch.stack(pictures, dim=1)[None]

    def _first(self, frames: int) -> np.ndarray:
        """So many frames, uint8 (f, h, w, 3)."""
        try:
            if _sha256(self.path) != self.sha256:
                raise SourceError(f"{self.path} has changed since this run began; start it again.")
            return read_frames(self.path, range(frames)).permute(0, 2, 3, 1).contiguous().numpy()
        except (VideoError, OSError) as error:
            raise SourceError(str(error)) from error


@dataclass(frozen=True)
class HeldClip(SourceClip):
    """Frames that lie in memory, not in a file; the SHA-256 is that of their pixels."""

    held: np.ndarray = field(repr=False, compare=False)

    @classmethod
    def holding(cls, frames: np.ndarray) -> HeldClip:
        """Frames uint8 (f, h, w, 3). Raises SourceError: others."""
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
            raise SourceError(f"the clip is an array {frames.dtype} {frames.shape}; give uint8 (f, h, w, 3).")
        frames = np.ascontiguousarray(frames)
        digest = hashlib.sha256(f"{frames.shape}".encode() + frames.tobytes()).hexdigest()
        return cls(Path("a clip in memory"), len(frames), digest, frames)

    @property
    def place(self) -> str | None:
        return None

    def _first(self, frames: int) -> np.ndarray:
        return self.held[:frames]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

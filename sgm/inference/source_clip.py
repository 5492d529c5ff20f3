"""The clip that videos are made from (video to video): its file, checked, and its pixels at the model's size."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
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

Fit = Callable[[Image.Image, tuple[int, int]], Tensor]  # a picture at (height, width): (3, h, w) in about [-1, 1]


class SourceError(SgmError):
    """A clip to start from cannot be read; the message names it."""


@dataclass(frozen=True)
class SourceClip:
    """A video's file: how many frames of which size it shows, how many a second if known, and its bytes' SHA-256."""

    path: Path
    frames: int
    sha256: str
    height: int
    width: int
    fps: float | None

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
            seen = probe(path)
            return cls(path, seen.frames, _sha256(path), seen.height, seen.width, seen.fps)
        except (VideoError, OSError) as error:
            raise SourceError(str(error)) from error

    @property
    def place(self) -> str | None:
        """Its file, from the root; None: it has none."""
        return os.path.abspath(self.path)

    def pixels(self, numbers: range, size: tuple[int, int], fit: Fit = resized) -> Tensor:
        """Its frames `numbers`, by `fit` (default: whole, by Lanczos) at `size` (height, width): (1, 3, f, h, w) in
        [-1, 1].

        Raises:
            SourceError: it cannot be read any more, or is another one than was checked.
        """
        pictures = [fit(Image.fromarray(frame), size) for frame in self._read(numbers)]
        return torch.stack(pictures, dim=1)[None]

    def images(self, size: tuple[int, int], fit: Fit = resized) -> np.ndarray:
        """All of it, uint8 (f, h, w, 3); what has that size already is as it was. Raises SourceError, as `pixels`."""
        pictures = (fit(Image.fromarray(frame), size) for frame in self._read(range(self.frames)))
        scaled = (picture.add(1).mul(127.5).round().clamp(0, 255).byte() for picture in pictures)
        return np.stack([picture.permute(1, 2, 0).numpy() for picture in scaled])

    def _read(self, numbers: range) -> np.ndarray:
        """These frames, uint8 (f, h, w, 3)."""
        try:
            if _sha256(self.path) != self.sha256:
                raise SourceError(f"{self.path} has changed since this run began; start it again.")
            return read_frames(self.path, numbers).permute(0, 2, 3, 1).contiguous().numpy()
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
        height, width = frames.shape[1:3]
        return cls(Path("a clip in memory"), len(frames), digest, height, width, None, frames)

    @property
    def place(self) -> str | None:
        return None

    def _read(self, numbers: range) -> np.ndarray:
        return self.held[numbers.start : numbers.stop]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""The clip that videos are made from (video to video): its file, checked, and its pixels at the model's size."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

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

    def pixels(self, frames: int, size: tuple[int, int]) -> Tensor:
        """Its first `frames`, whole, by Lanczos at `size` (height, width): (1, 3, f, h, w) in [-1, 1].

        Raises:
            SourceError: it cannot be read any more, or is another one than was checked.
        """
        try:
            if _sha256(self.path) != self.sha256:
                raise SourceError(f"{self.path} has changed since this run began; start it again.")
            found = read_frames(self.path, range(frames))
        except (VideoError, OSError) as error:
            raise SourceError(str(error)) from error
        pictures = [resized(Image.fromarray(frame.permute(1, 2, 0).numpy()), size) for frame in found]
        return torch.stack(pictures, dim=1)[None]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

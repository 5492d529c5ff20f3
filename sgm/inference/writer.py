"""Files of a sample: mp4, JSON beside it, PNG contact sheet, latents. A file appears complete or not at all."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sgm.errors import SgmError
from sgm.files import advising, replacing, require_writable, write_failed

ANOTHER_FOLDER = "Choose another --output-dir."


class OutputError(SgmError):
    """A result cannot be encoded, or read again; the message says which and why."""


@dataclass(frozen=True)
class SampleFiles:
    """The original's layout: `OUT/{index}_{prompt}/{sample}/000000.mp4`, and what we put beside it."""

    folder: Path

    @property
    def video(self) -> Path:
        return self.folder / "000000.mp4"

    @property
    def record(self) -> Path:
        return self.folder / "000000.json"

    @property
    def sheet(self) -> Path:
        return self.folder / "000000.png"

    @property
    def latents(self) -> Path:
        return self.folder / "latents.safetensors"

    def done(self, latents_only: bool) -> bool:
        """Whether the results are there (the record is written last)."""
        return self.record.is_file() and (self.latents if latents_only else self.video).is_file()


@contextmanager
def _written(path: Path) -> Iterator[Path]:
    """A temporary name that becomes `path`, see `replacing`; its folder is made."""
    with advising(ANOTHER_FOLDER):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_failed(path, error) from error
        with replacing(path) as temporary:
            yield temporary


def check_writable(folder: Path) -> None:
    """Fail before an hour of sampling, not after it. Raises SaveError."""
    with advising(ANOTHER_FOLDER):
        require_writable(folder)


def to_uint8(x: Tensor) -> Tensor:
    """Pixels (b, 3, f, h, w) in [-1, 1] to uint8 (b, f, h, w, 3): clamp((x+1)/2, 0, 1) * 255, truncated as the
    original does."""
    scaled = ((x.float() + 1.0) / 2.0).clamp_(0.0, 1.0).mul_(255.0)
    return scaled.to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous()


def write_video(path: Path, frames: np.ndarray, fps: int) -> None:
    """H.264 mp4 of uint8 frames (f, h, w, 3), h and w even.

    Raises:
        OutputError: the folder or the encoder refuses.
    """
    import imageio.v2 as imageio

    with _written(path) as temporary:
        try:
            with imageio.get_writer(temporary, fps=fps, codec="libx264", quality=8, macro_block_size=2) as writer:
                for frame in frames:
                    writer.append_data(frame)
        except (OSError, RuntimeError) as error:
            raise OutputError(f"cannot encode {path}: {error}") from error


def write_contact_sheet(path: Path, frames: np.ndarray, count: int = 8, columns: int = 4, width: int = 240) -> None:
    """PNG with up to `count` evenly spaced frames of (f, h, w, 3) in rows of `columns`, each at most `width` wide."""
    from PIL import Image

    picked = frames[np.unique(np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int))]
    height_in, width_in = frames.shape[1:3]
    scale = min(1.0, width / width_in)
    cell = (max(1, round(width_in * scale)), max(1, round(height_in * scale)))
    columns = min(columns, len(picked))
    sheet = Image.new("RGB", (columns * cell[0], math.ceil(len(picked) / columns) * cell[1]))
    for k, frame in enumerate(picked):
        sheet.paste(Image.fromarray(frame).resize(cell), ((k % columns) * cell[0], (k // columns) * cell[1]))
    with _written(path) as temporary:
        sheet.save(temporary)


def read_record(path: Path) -> dict[str, Any]:
    """The facts that a sample's JSON holds; nothing where there is no readable one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_latents(path: Path, latents: Tensor, facts: Mapping[str, Any]) -> None:
    """Scaled latents (t, c, h, w) of one sample; `facts` go into the header as JSON text."""
    from safetensors.torch import save_file

    with _written(path) as temporary:
        save_file({"latents": latents.cpu().contiguous()}, str(temporary), {"facts": json.dumps(facts)})


def read_latents(path: Path) -> tuple[Tensor, dict[str, Any]]:
    """(scaled latents (t, c, h, w), facts) that `write_latents` stored.

    Raises:
        OutputError: not such a file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor("latents"), json.loads((file.metadata() or {}).get("facts", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise OutputError(f"{path} holds no saved latents: {error}") from error


def latents_digest(latents: Tensor) -> str:
    """SHA-256 (16 hex digits) of latents as float32 bytes; equal seeds give equal digests."""
    return hashlib.sha256(latents.detach().cpu().float().contiguous().numpy().tobytes()).hexdigest()[:16]


def find_latents(path: Path) -> Sequence[Path]:
    """Latent files named by `path`: itself, or all below the folder.

    Raises:
        OutputError: none.
    """
    found = [path] if path.is_file() else sorted(path.rglob("latents.safetensors"))
    if not found:
        raise OutputError(f"no latents.safetensors at or below {path}; save some with --only-save-latents.")
    return found

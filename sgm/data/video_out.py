"""Writing videos and pictures: mp4, and a contact sheet as PNG. A file appears complete or not at all."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sgm.errors import SgmError
from sgm.files import replacing


class EncodingError(SgmError):
    """Frames that cannot be encoded as a video; the message says why."""


def to_uint8(x: Tensor) -> Tensor:
    """Pixels (b, 3, f, h, w) in [-1, 1] to uint8 (b, f, h, w, 3): clamp((x+1)/2, 0, 1) * 255, truncated as the
    original does."""
    scaled = ((x.float() + 1.0) / 2.0).clamp_(0.0, 1.0).mul_(255.0)
    return scaled.to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous()


def write_video(path: Path, frames: np.ndarray, fps: int) -> None:
    """H.264 mp4 of uint8 frames (f, h, w, 3), h and w even.

    Raises:
        EncodingError: the encoder refuses.
        SaveError: the folder does.
    """
    import imageio.v2 as imageio

    with replacing(path) as temporary:
        try:
            writer = imageio.get_writer(temporary, fps=fps, codec="libx264", quality=8, macro_block_size=2)
            with writer:
                for frame in frames:
                    writer.append_data(frame)
        except (OSError, RuntimeError) as error:
            raise EncodingError(f"cannot encode {path}: {error}") from error


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
    with replacing(path) as temporary:
        sheet.save(temporary)

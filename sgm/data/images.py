"""Pictures, read as a viewer shows them, and the one that a video begins with, at the size that the model takes.

Both ways of the original are here to the number. Models of one frame a patch (1.0) have one size: the picture is scaled
to cover it (bicubic, antialiased, on real numbers) and cut at the centre. Models with patches of several frames (1.5)
take the picture's own ratio: its shorter side is brought to a fixed length (Lanczos, on bytes), the longer one to the
nearest multiple of 16 pixels.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from sgm.errors import SgmError
from sgm.files import refuse_lfs_pointer

DEEP_GRAYS = ("I;16", "I;16B", "I;16L", "I;16N", "I")  # Pillow's modes of gray pictures with 16 bits


class PictureError(SgmError):
    """Not a picture that can be read; the message says why, not which."""


def open_picture(file: BinaryIO) -> Image.Image:
    """A picture in RGB with 8 bits, read whole and turned upright as its camera noted; of an animation the first one.

    Of 16 bits the upper 8 are taken, in gray as in colour. Alpha is dropped, as in the original: what shows is the
    colour that transparent parts have.

    Raises:
        PictureError: no picture, cut short or damaged, of a kind without fixed range, or too large to be one.
    """
    try:
        with warnings.catch_warnings():
            # half of what Pillow refuses: a good camera's
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            warnings.simplefilter(
                "ignore", UserWarning
            )  # of broken EXIF, without which the pixels are good all the same
            with Image.open(file) as image:
                return upright_rgb(image)
    except UnidentifiedImageError as error:  # whose own text shows no name, but an object in memory
        raise PictureError("no readable picture (of no known format, as PNG, JPEG and WebP are)") from error
    except Image.DecompressionBombError as error:
        raise PictureError(f"no readable picture ({2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels at most)") from error
    except (OSError, ValueError, SyntaxError, RuntimeError) as error:  # the last from AVIF's decoder
        if getattr(error, "errno", None) is not None:  # of the drive; Pillow's own OSErrors have no number
            raise
        raise PictureError(f"no readable picture ({error})") from error


def upright_rgb(image: Image.Image) -> Image.Image:
    """`image` in RGB with 8 bits, as `open_picture` gives it. Raises ValueError: pixels without a fixed range."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("its pixels are real numbers, whose range is not said; save it as PNG")
    if image.mode in DEEP_GRAYS:  # convert() would cut them at 255
        upper = np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8
        image = Image.fromarray(upper.astype(np.uint8))
    return image.convert("RGB")


class ImageError(SgmError):
    """A picture cannot be read or is not as it was; the message names it."""


@dataclass(frozen=True)
class Picture:
    """A picture's file, checked: its size upright in pixels, and the SHA-256 of its bytes."""

    path: Path
    height: int
    width: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Picture:
        """Read all of `path` once.

        Raises:
            ImageError: absent, or no picture; names the file.
        """
        image, sha256 = _read(path)
        return cls(path, image.height, image.width, sha256)

    @property
    def place(self) -> str | None:
        """Its file, from the root; None: it has none."""
        return os.path.abspath(self.path)

    def image(self) -> Image.Image:
        """Its pixels, RGB with 8 bits.

        Raises:
            ImageError: it cannot be read any more, or is another one than was checked.
        """
        image, sha256 = _read(self.path)
        if sha256 != self.sha256:
            raise ImageError(f"{self.path} has changed since this run began; start it again.")
        return image


@dataclass(frozen=True)
class HeldPicture(Picture):
    """A picture that lies in memory, not in a file; the SHA-256 is that of its pixels."""

    pixels: Image.Image = field(repr=False, compare=False)

    @classmethod
    def holding(cls, pixels: Image.Image | np.ndarray) -> HeldPicture:
        """Pillow's pictures, or arrays uint8 (h, w, 3).

        Raises:
            ImageError: neither, or of a kind that has no fixed range.
        """
        if isinstance(pixels, np.ndarray):
            if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
                raise ImageError(f"the picture is an array {pixels.dtype} {pixels.shape}; give uint8 (h, w, 3).")
            pixels = Image.fromarray(np.ascontiguousarray(pixels))
        try:
            image = upright_rgb(pixels)
        except (ValueError, OSError, AttributeError) as error:
            raise ImageError(f"the picture in memory cannot be read: {error}.") from error
        digest = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
        return cls(Path("a picture in memory"), image.height, image.width, digest, image)

    @property
    def place(self) -> str | None:
        return None

    def image(self) -> Image.Image:
        return self.pixels


def read_image(path: Path) -> Image.Image:
    """A picture's pixels, RGB with 8 bits. Raises ImageError: absent, or no picture; names the file."""
    return _read(path)[0]


def _read(path: Path) -> tuple[Image.Image, str]:
    if not path.is_file():
        raise ImageError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}.")
    refuse_lfs_pointer(path, ImageError)
    try:
        content = path.read_bytes()
        return open_picture(io.BytesIO(content)), hashlib.sha256(content).hexdigest()
    except (PictureError, OSError) as error:
        raise ImageError(f"{path}: {error}.") from error


def size_of_short_side(height: int, width: int, short: int, step: int) -> tuple[int, int]:
    """(height, width) of a picture whose shorter side becomes `short`, the longer one the nearest multiple of `step`.

    Halves go up. The ratio changes by that little; nothing is cut off.
    """
    longer = (2 * short * max(height, width) + step * min(height, width)) // (2 * step * min(height, width)) * step
    return (short, longer) if height < width else (longer, short)


def resized_size(height: int, width: int, target_height: int, target_width: int) -> tuple[int, int]:
    """(height, width) after scaling by one factor until the target is just covered; fractions are dropped."""
    if width / height > target_width / target_height:
        return target_height, int(width * target_height / height)
    return int(height * target_width / width), target_width


def resized(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """The whole picture at `size` (height, width) by Lanczos, (3, height, width) in [-1, 1]."""
    pixels = np.asarray(image.resize((size[1], size[0]), Image.Resampling.LANCZOS))
    return _channels_first(pixels) * 2 - 1


def cropped(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """The picture scaled to cover `size` (height, width) and cut at the centre, (3, height, width) in about [-1, 1].

    Bicubic overshoots are kept, as in the original: values may leave [-1, 1] a little.
    """
    pixels = _channels_first(np.asarray(image))
    covering = resized_size(image.height, image.width, *size)
    if covering != (image.height, image.width):
        pixels = F.interpolate(pixels[None], covering, mode="bicubic", align_corners=False, antialias=True)[0]
    top, left = ((whole - part) // 2 for whole, part in zip(covering, size))
    return pixels[:, top : top + size[0], left : left + size[1]] * 2 - 1


def _channels_first(pixels: np.ndarray) -> Tensor:
    """uint8 (h, w, 3) as float32 (3, h, w) in [0, 1]."""
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255

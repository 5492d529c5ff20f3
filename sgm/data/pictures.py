"""Pictures: read as a viewer shows them, or refused with what is wrong."""

from __future__ import annotations

import warnings
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from sgm.errors import SgmError

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

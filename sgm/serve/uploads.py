"""The picture or the clip that a video begins with. What it is, its first bytes say: clients send no useful type."""

from __future__ import annotations

import base64
import binascii
import io
from dataclasses import dataclass

from PIL import Image

from sgm.serve.answers import ApiError

MOST_PIXELS = 64 << 20  # of a picture: a small file can hold a very large one
_PICTURES = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}
_SEVERAL = "MPO"  # a JPEG with a second picture behind it, as telephones write
_EBML = b"\x1a\x45\xdf\xa3"  # WebM and Matroska


@dataclass(frozen=True)
class Upload:
    """`kind` is image or video, `name` what its file is called in the job's folder."""

    kind: str
    name: str
    data: bytes

    @classmethod
    def of(cls, data: bytes) -> Upload:
        """Look at the content.

        Raises:
            ApiError: neither a picture nor a video.
        """
        if data[4:8] == b"ftyp":
            return cls("video", "start.mp4", data)
        if data.startswith(_EBML):
            return cls("video", "start.webm", data)
        return cls("image", f"start.{_PICTURES[_format_of_picture(data)]}", data)

    @classmethod
    def of_url(cls, url: str) -> Upload:
        """The content of a `data:` address; others are not fetched.

        Raises:
            ApiError: see above.
        """
        head, comma, body = url.partition(",")
        if not (head.startswith("data:") and head.endswith(";base64") and comma):
            raise _refused("image_url must be a data: address in base64; this server fetches nothing.")
        try:
            return cls.of(base64.b64decode(body, validate=True))
        except binascii.Error as error:
            raise _refused(f"image_url is no base64: {error}.") from error


def _format_of_picture(data: bytes) -> str:
    try:
        with Image.open(io.BytesIO(data), formats=tuple(_PICTURES)) as picture:
            if picture.width * picture.height > MOST_PIXELS:
                raise _refused(f"the picture is {picture.width}x{picture.height}; the most is {MOST_PIXELS} pixels.")
            picture.load()
            return "JPEG" if picture.format == _SEVERAL else str(picture.format)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _refused("input_reference is no whole PNG, JPEG, WebP, MP4 or WebM file.") from error


def _refused(message: str) -> ApiError:
    return ApiError(400, message, "input_reference", "invalid_input_reference")

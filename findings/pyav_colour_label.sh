#!/usr/bin/env bash
# PyAV 18.1.0: colorspace and color_range of an encoder label the file, and do not change how RGB is converted.
#
# Guess before the run: frames of RGB are converted as the encoder that gets them is set, so that they come back.
# Seen on 2026-11-30 (CPython 3.11.7), frames of red 200 60 30, H.264 with quantizer 1, decoded by PyAV again:
#   nothing set: 198 59 29
#   BT.709: 210 71 26
#   BT.709, full range: 200 77 37
#   BT.709, full range, frames reformatted before: 199 59 28
# The pixels are always those of BT.601 in limited range. Samples and training clips so written have other colours in
# every player. Reformat each frame with dst_colorspace and dst_color_range. Exit 0: still so. Needs a package index.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet av==18.1.0 numpy==2.4.6

cd "$folder"
"$folder/venv/bin/python" - <<'PY' | tee "$folder/seen"
import av
import numpy
from av.video.reformatter import ColorRange, Colorspace

red = numpy.full((64, 64, 3), (200, 60, 30), numpy.uint8)


def back(colorspace=None, color_range=None, reformat=False):
    with av.open("clip.mp4", "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"qp": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        if colorspace:
            stream.codec_context.colorspace = colorspace
        if color_range:
            stream.codec_context.color_range = color_range
        for _ in range(4):
            frame = av.VideoFrame.from_ndarray(red, format="rgb24")
            if reformat:
                frame = frame.reformat(format="yuv420p", dst_colorspace=colorspace, dst_color_range=color_range)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with av.open("clip.mp4") as container:
        return next(container.decode(video=0)).to_ndarray(format="rgb24")[32, 32]


full = int(ColorRange.JPEG)
print("nothing set:", *back())
print("BT.709:", *back(int(Colorspace.ITU709)))
print("BT.709, full range:", *back(int(Colorspace.ITU709), full))
print("BT.709, full range, frames reformatted before:", *back(int(Colorspace.ITU709), full, True))
PY
[[ "$(<"$folder/seen")" == $'nothing set: 198 59 29
BT.709: 210 71 26
BT.709, full range: 200 77 37
BT.709, full range, frames reformatted before: 199 59 28' ]]

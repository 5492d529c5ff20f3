#!/usr/bin/env bash
# diffusers 0.42.1 takes frames of bytes for fractions: export_to_video wraps them around, preprocess_video scales them.
#
# Guess before the run: arrays of uint8, what every reader of videos hands out, are written and read as they are.
# Seen on 2026-11-30 (CPython 3.11.7, torch 2.13.0, imageio 2.38.1, imageio-ffmpeg 0.8.1), a grey of 200:
#   export_to_video: 55, without an error or a warning
#   preprocess_video: 399, where -1 to 1 is the range
# 200 * 255 is 55 modulo 256: a clip comes out as its negative. Divide by 255 first.
# Exit 0: still so. Needs a package index.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet \
    diffusers==0.42.1 torch==2.13.0 transformers==5.23.0 imageio==2.38.1 imageio-ffmpeg==0.8.1 numpy==2.4.6

cd "$folder"
"$folder/venv/bin/python" - <<'PY' 2>"$folder/warnings" | tee "$folder/seen"
import imageio.v3
import numpy
from diffusers.utils import export_to_video
from diffusers.video_processor import VideoProcessor

grey = numpy.full((9, 64, 64, 3), 200, numpy.uint8)
export_to_video(list(grey), "grey.mp4", fps=8)
print("export_to_video:", round(float(imageio.v3.imread("grey.mp4", plugin="FFMPEG").mean())))
print("preprocess_video:", round(float(VideoProcessor(vae_scale_factor=8).preprocess_video(grey).max())))
PY
cat "$folder/warnings" >&2
[[ "$(<"$folder/seen")" == $'export_to_video: 55\npreprocess_video: 399' ]]

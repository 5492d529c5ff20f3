#!/usr/bin/env bash
# mediapy 1.2.7 reads no video with FFmpeg 9, which took away the option -vsync; it blames the file.
#
# Guess before the run: a reader that calls FFmpeg goes on with its next major version, or names the version it needs.
# Seen on 2026-11-30 (CPython 3.11.7) for a plain H.264 clip, with the FFmpeg that imageio-ffmpeg brings:
#   imageio-ffmpeg 0.6.0, FFmpeg 7.0.2: 8 frames
#   imageio-ffmpeg 0.8.1, FFmpeg 9.0.2: RuntimeError: Unable to parse video header (Unrecognized option 'vsync')
# Commands that are copied from guides break the same way: `-fps_mode` is the option since FFmpeg 5.1.
# Exit 0: still so. Needs a package index.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"${PYTHON:-python3}" -m venv "$folder/venv"

reading_with() { # imageio-ffmpeg $1
    "$folder/venv/bin/python" -m pip install --quiet mediapy==1.2.7 numpy==2.4.6 "imageio-ffmpeg==$1"
    "$folder/venv/bin/python" - "$1" <<'PY' 2>/dev/null
import os, subprocess, sys
import imageio_ffmpeg
program = imageio_ffmpeg.get_ffmpeg_exe()
subprocess.run([program, "-loglevel", "error", "-y", "-f", "lavfi", "-i", "testsrc=size=64x64:rate=8:duration=1",
                "-pix_fmt", "yuv420p", "clip.mp4"], check=True)
os.makedirs(sys.argv[1])
os.symlink(program, f"{sys.argv[1]}/ffmpeg")  # mediapy looks for this name
os.environ["PATH"] = os.path.abspath(sys.argv[1]) + os.pathsep + os.environ["PATH"]
version = imageio_ffmpeg.get_ffmpeg_version().lstrip("n").split("-")[0]
import mediapy
try:
    said = f"{len(mediapy.read_video('clip.mp4'))} frames"
except RuntimeError as error:
    reason = next(line for line in str(error).splitlines() if "Unrecognized" in line)
    said = f"RuntimeError: {str(error).split(':')[0]} ({reason.rstrip('.')})"
print(f"imageio-ffmpeg {sys.argv[1]}, FFmpeg {version}: {said}")
PY
}

old="$(reading_with 0.6.0)" new="$(reading_with 0.8.1)"
printf '%s\n' "$old" "$new"
[[ "$old" == *": 8 frames" && "$new" == *"Unrecognized option 'vsync')" ]]

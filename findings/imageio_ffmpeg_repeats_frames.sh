#!/usr/bin/env bash
# imageio-ffmpeg 0.8.1 hands out three times as many frames of a clip as it counts, where their times are uneven.
#
# Guess before the run: read_frames gives each frame of the file once, so many as count_frames_and_secs says.
# Seen on 2026-11-30 (CPython 3.11.7; its FFmpeg is 9.0.2) for 10 frames a tenth of a second apart and 10 more half a
# second apart, in Matroska:
#   count_frames_and_secs: 20 frames, 5.6 s
#   read_frames: 59 frames, 20 of them different
# FFmpeg fills the clip up to its nominal 10 frames a second, as for a player. Captured screens and phones' clips are of
# that kind: an index into what read_frames gives is not an index into the file's frames.
# Exit 0: still so. Needs a package index.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet imageio-ffmpeg==0.8.1

cd "$folder"
"$folder/venv/bin/python" - <<'PY' | tee "$folder/seen"
import subprocess
import imageio_ffmpeg

subprocess.run(
    [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-f", "lavfi", "-i", "testsrc=size=64x64:rate=10:duration=2",
     "-vf", "setpts='if(lt(N,10),N*0.1,1+(N-10)*0.5)/TB'", "-fps_mode", "vfr", "-c:v", "ffv1", "uneven.mkv"],
    check=True,
)
count, seconds = imageio_ffmpeg.count_frames_and_secs("uneven.mkv")
frames = imageio_ffmpeg.read_frames("uneven.mkv")
next(frames)  # what it knows of the file
frames = list(frames)
print(f"count_frames_and_secs: {count} frames, {seconds:.1f} s")
print(f"read_frames: {len(frames)} frames, {len(set(frames))} of them different")
PY
[[ "$(<"$folder/seen")" == $'count_frames_and_secs: 20 frames, 5.6 s\nread_frames: 59 frames, 20 of them different' ]]

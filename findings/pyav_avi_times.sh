#!/usr/bin/env bash
# PyAV 18.1.0 gives the frames of an AVI file times that do not ascend; FFmpeg alone gives them none.
#
# Guess before the run: decoded frames come in the order of their times, or without times where a container has none.
# Seen on 2026-11-30 (CPython 3.11.7), 16 frames of H.264 with two B-frames between others, the same twice:
#   mp4: ascending
#   avi: 1 3 4 2 6 7 5 9 10 8 12 13 11 15 16 14
#   avi, flag gen_pts cleared: no times
# PyAV sets FFmpeg's gen_pts for every file that it opens, and its guess takes the order of the packets for that of the
# pictures. The pictures themselves come in the right order: whoever picks frames by their times gets others.
# Exit 0: still so. Needs a package index.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet av==18.1.0 imageio-ffmpeg==0.8.1

cd "$folder"
"$folder/venv/bin/python" - <<'PY' | tee "$folder/seen"
import subprocess
import av
import imageio_ffmpeg

for name in ("clip.mp4", "clip.avi"):
    subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-f", "lavfi", "-i", "testsrc=size=64x64:rate=8:duration=2",
         "-c:v", "libx264", "-bf", "2", "-pix_fmt", "yuv420p", name], check=True,
    )

def times(name, guess=True):
    with av.open(name) as container:
        if not guess:
            container.flags &= ~av.container.Flags.gen_pts.value
        return [frame.pts for frame in container.decode(video=0)]

print("mp4:", "ascending" if times("clip.mp4") == sorted(times("clip.mp4")) else times("clip.mp4"))
print("avi:", *times("clip.avi"))
print("avi, flag gen_pts cleared:", "no times" if {*times("clip.avi", guess=False)} == {None} else "times")
PY
[[ "$(<"$folder/seen")" == $'mp4: ascending\navi: 1 3 4 2 6 7 5 9 10 8 12 13 11 15 16 14\navi, flag gen_pts cleared: no times' ]]

#!/usr/bin/env bash
# ml_dtypes 0.6.0: numpy's mean of a thousand bfloat16 ones is 0.256, and that of a whole latent nearly 0.
#
# Guess before the run: numpy adds up half precision in float32, as its own mean of float16 does.
# Seen on 2026-11-30 (CPython 3.11.7, numpy 2.4.6), means of arrays that hold only ones:
#   bfloat16: 100 ones 1, 1000 ones 0.256, 100000 ones 0.00256
#   float16: 100 ones 1, 1000 ones 1, 100000 ones 1
# The sum is kept in bfloat16 too, where 256 + 1 is 256. Means and deviations by which latents are normalised come out
# wrong without a warning: pass dtype=numpy.float32, or cast first. Exit 0: still so. Needs a package index.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet ml-dtypes==0.6.0 numpy==2.4.6

"$folder/venv/bin/python" - <<'PY' | tee "$folder/seen"
import ml_dtypes
import numpy

for dtype in (ml_dtypes.bfloat16, numpy.float16):
    means = [f"{count} ones {float(numpy.ones(count, dtype).mean()):.3g}" for count in (100, 1000, 100_000)]
    print(f"{numpy.dtype(dtype).name}: {', '.join(means)}")
assert numpy.ones(100_000, ml_dtypes.bfloat16).mean(dtype=numpy.float32) == 1
PY
[[ "$(<"$folder/seen")" == $'bfloat16: 100 ones 1, 1000 ones 0.256, 100000 ones 0.00256
float16: 100 ones 1, 1000 ones 1, 100000 ones 1' ]]

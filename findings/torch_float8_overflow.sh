#!/usr/bin/env bash
# PyTorch 2.13.0 casts values too large for float8_e4m3fn, infinity too, to 448; 2.12.0 and ml_dtypes give NaN.
#
# Guess before the run: 500 and infinity become NaN in float8_e4m3fn, which has no infinity, in each version and in
# ml_dtypes (JAX, NumPy), and the kinds of float8 are treated alike.
# Seen on 2026-11-30 (CPython 3.11.7, a CPU), casts of 460, 500, 100000 and infinity:
#   float8_e4m3fn: torch 448 448 448 448, ml_dtypes 448 nan nan nan
#   float8_e5m2: torch 448 512 inf inf, ml_dtypes 448 512 inf inf
#   float8_e4m3fnuz: torch nan nan nan nan, ml_dtypes nan nan nan nan
# torch 2.12.0 gave 448 nan nan nan in the first line, tried by hand. Code that looks for NaN to see that a scale was
# too small no longer finds any, and weights or activations that diverged come out of the cast as ordinary numbers.
# Compare with the largest number before the cast. Exit 0: still so. Needs a package index.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6 ml_dtypes==0.6.0 setuptools==80.9.0

"$folder/venv/bin/python" - <<'PY'
import math

import ml_dtypes
import numpy as np
import torch

values, seen = [460.0, 500.0, 1e5, math.inf], {}
for kind in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz"):
    ours = torch.tensor(values).to(getattr(torch, kind)).float().tolist()
    theirs = np.array(values, np.float32).astype(getattr(ml_dtypes, kind)).astype(np.float32).tolist()
    seen[kind] = [" ".join(f"{x:.0f}" for x in row) for row in (ours, theirs)]
    print(f"{kind}: torch {seen[kind][0]}, ml_dtypes {seen[kind][1]}")
assert seen["float8_e4m3fn"] == ["448 448 448 448", "448 nan nan nan"]
assert seen["float8_e5m2"] == ["448 512 inf inf"] * 2 and seen["float8_e4m3fnuz"] == ["nan nan nan nan"] * 2
PY

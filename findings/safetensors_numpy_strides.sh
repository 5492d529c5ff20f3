#!/usr/bin/env bash
# safetensors 0.8.0 saves numpy arrays that do not lie in memory in order (transposed, every second) as other numbers.
#
# Guess before the run: safetensors.numpy.save writes what the array holds, or refuses as safetensors.torch does.
# Seen on 2026-11-30 (CPython 3.11.7, numpy 2.4.6), arrays saved and loaded, without an error or a warning:
#   safetensors 0.7.0: whole same, transposed same, reversed same, every second same, Fortran same
#   safetensors 0.8.0: whole same, transposed OTHER, reversed OTHER, every second OTHER, Fortran OTHER
# The shape is right, the numbers are those that lie in memory. Who converts weights (kernel.T, channels moved) gets a
# file that loads and is wrong: pass numpy.ascontiguousarray(array). Exit 0: still so. Needs a package index.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"

saving_with() { # safetensors $1
    "$folder/venv/bin/python" -m pip install --quiet "safetensors==$1" numpy==2.4.6
    "$folder/venv/bin/python" - "$1" <<'PY'
import sys
import numpy
from safetensors.numpy import load, save

whole = numpy.arange(12, dtype=numpy.float32).reshape(3, 4)
arrays = {
    "whole": whole, "transposed": whole.T, "reversed": whole[::-1], "every second": whole[:, ::2],
    "Fortran": numpy.asfortranarray(whole),
}
said = []
for name, array in arrays.items():
    back = load(save({"weight": array}))["weight"]
    assert back.shape == array.shape
    said.append(f"{name} {'same' if numpy.array_equal(back, array) else 'OTHER'}")
print(f"safetensors {sys.argv[1]}: {', '.join(said)}")
PY
}

{ saving_with 0.7.0 && saving_with 0.8.0; } | tee "$folder/seen"
[[ "$(tail -1 "$folder/seen")" == \
    "safetensors 0.8.0: whole same, transposed OTHER, reversed OTHER, every second OTHER, Fortran OTHER" ]]
[[ "$(head -1 "$folder/seen")" != *OTHER* ]]

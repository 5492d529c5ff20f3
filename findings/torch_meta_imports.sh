#!/usr/bin/env bash
# Tensors without values (meta device) make PyTorch 2.13.0 import its compiler and sympy.
#
# Guess before the run: the meta device is part of PyTorch's core, so that building a module or asking for a shape there
# imports nothing. Seen on 2026-11-30 (CPython 3.11.7, the build for CPUs), each in a process of its own:
#   torch.empty            nothing
#   nn.Linear              nothing
#   nn.Embedding           torch._dynamo and sympy (its weights are drawn by normal_)
#   torch.empty_like       sympy
#   conv3d                 sympy
#   a + b                  torch._dynamo and sympy
# That is one to three seconds of a start, on the host of a GPU more than `import torch` itself.
# Exit 0: still so. Needs a package index.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6

seen() {
    "$folder/venv/bin/python" - "$1" <<'PY'
import sys, time
import torch
from torch import nn
x = torch.empty(2, 4, 5, 6, 8, device="meta")
weight = torch.empty(4, 4, 3, 3, 3, device="meta")
began, before = time.perf_counter(), set(sys.modules)
with torch.device("meta"):
    eval(sys.argv[1])
new = [name for name in ("torch._dynamo", "sympy") if name in set(sys.modules) - before]
print(f"{sys.argv[1]}: {' and '.join(new) or 'nothing'} ({time.perf_counter() - began:.1f} s)")
PY
}

{
    seen "torch.empty(3, 4)"
    seen "nn.Linear(3, 4)"
    seen "nn.Embedding(3, 4)"
    seen "torch.empty_like(x)"
    seen "nn.functional.conv3d(x, weight)"
    seen "x + x"
} | tee "$folder/seen"
[[ "$(sed 's/ (.*s)$//; s/^.*): //; s/^x + x: //' "$folder/seen" | tr '\n' ';')" == \
    "nothing;nothing;torch._dynamo and sympy;sympy;sympy;torch._dynamo and sympy;" ]]

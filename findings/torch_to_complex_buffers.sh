#!/usr/bin/env bash
# PyTorch 2.13.0: module.to(torch.bfloat16), unlike module.bfloat16(), makes complex RoPE tables real.
#
# Guess before the run: both cast a module's floating-point weights and leave a complex buffer as it is.
# Seen on 2026-11-30 (CPython 3.11.7, a CPU), a buffer of rotations torch.polar(1, angle), a vector of length 1 rotated:
#   bfloat16(): complex64, length after rotation 1.00 to 1.00
#   half(): complex64, length after rotation 1.00 to 1.00
#   to(float16): float16, length after rotation 0.00 to 1.00
#   to(bfloat16): bfloat16, length after rotation 0.00 to 1.00
#   to(float64): float64, length after rotation 0.00 to 1.00
# The imaginary part goes, so that positions scale queries and keys by their cosine in place of turning them. A warning
# comes once in a process, at the first cast. Keep rotations as cosines and sines, or out of the module's buffers. Exit
# 0: still so. Needs a package index.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6

"$folder/venv/bin/python" - <<'PY'
import warnings

import torch


class Rotary(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.register_buffer("turn", torch.polar(torch.ones(400), torch.arange(400.0) / 100))

    def forward(self, x):
        rotated = torch.view_as_complex(x) * self.turn
        return torch.view_as_real(rotated) if rotated.is_complex() else rotated


ways = {"bfloat16()": lambda m: m.bfloat16(), "half()": lambda m: m.half()}
for dtype in (torch.float16, torch.bfloat16, torch.float64):
    ways[f"to({str(dtype)[6:]})"] = lambda m, dtype=dtype: m.to(dtype)
vector = torch.tensor([1.0, 0.0]).expand(400, 2).contiguous()
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for name, way in ways.items():
        module = way(Rotary())
        length = module(vector).norm(dim=-1)
        print(f"{name}: {str(module.turn.dtype)[6:]}, length after rotation {length.min():.2f} to {length.max():.2f}")
        assert module.turn.is_complex() == name.endswith("()") == (length.min() > 0.99)
assert len([w for w in said if "imaginary" in str(w.message)]) == 1
PY

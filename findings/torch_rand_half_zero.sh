#!/usr/bin/env bash
# PyTorch 2.13.0 on a CPU: uniform numbers in half precision that would round to 1 become 0, 1 in 512 in bfloat16.
#
# Guess before the run: torch.rand(bfloat16) gives 0 about as rarely as float32 does, once in 16 million.
# Seen on 2026-11-30 (CPython 3.11.7, the build for CPUs), a million (2 ** 20) numbers from one seed:
#   float32: 0 zeros, smallest number in their place in float32 -, mean 0.50021
#   bfloat16: 2054 zeros, smallest number in their place in float32 0.99805, mean 0.49825
#   float16: 270 zeros, smallest number in their place in float32 0.99976, mean 0.49996
# The rest are float32's numbers rounded. Times drawn so jump from the noisy to the clean end, and logit(u), log(u) or
# an inverse distribution give an infinity in each batch of 512: draw in float32 and cast.
# Exit 0: still so. Needs a package index.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6

"$folder/venv/bin/python" - <<'PY'
import torch


def drawn(dtype):
    return torch.rand(2**20, dtype=dtype, generator=torch.Generator().manual_seed(0))


whole = drawn(torch.float32)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    half = drawn(dtype)
    zero = half == 0
    place = f"{whole[zero].min():.5f}" if zero.any() else "-"
    print(f"{str(dtype)[6:]}: {int(zero.sum())} zeros, smallest number in their place in float32 {place}, "
          f"mean {half.double().mean():.5f}")
    assert torch.equal(half[~zero], whole[~zero].to(dtype))
    assert (whole[zero].to(dtype) == 1).all() and zero.any() == (dtype != torch.float32)
PY

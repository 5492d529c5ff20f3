#!/usr/bin/env bash
# Triton 3.7.1's interpreter cuts float32 to bfloat16, and halves what float8 has to round up to a power of two.
#
# Guess before the run: a kernel that computes in float32 and stores bfloat16 or float8, run with TRITON_INTERPRET=1,
# stores what torch's casts give, rounded to nearest; the interpreter serves to test kernels on machines without a GPU.
# Seen on 2026-11-30 (CPython 3.11.7, torch 2.13.0), a million (2 ** 20) positive normal numbers, cast in a kernel:
#   float16: 0.0 % differ, 0.0 % halved, their mean +0.00 %, torch's +0.00 %
#   bfloat16: 49.9 % differ, 0.0 % halved, their mean -0.28 %, torch's +0.00 %
#   float8e4nv: 2.3 % differ, 2.3 % halved, their mean -1.45 %, torch's -0.08 %
#   float8e5: 4.8 % differ, 4.8 % halved, their mean -3.15 %, torch's -0.29 %
# 7.6 becomes 4 in float8e5, where 8 is nearest: what the mantissa carries over is lost. A kernel that is right on a GPU
# fails its test in the interpreter, or the test's bounds are widened until they hide errors of a factor of 2. Let the
# kernel store float32 under test. Exit 0: still so. Needs a package index.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 triton==3.7.1 numpy==2.4.6 setuptools==80.9.0

"$folder/venv/bin/python" - <<'PY'
import os

os.environ["TRITON_INTERPRET"] = "1"
import torch
import triton
import triton.language as tl


@triton.jit
def cast(source, out, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out + at, tl.load(source + at).to(out.dtype.element_ty))


numbers = torch.randn(2**20, generator=torch.Generator().manual_seed(0)).abs() + 0.25
for name, dtype in (("float16", torch.float16), ("bfloat16", torch.bfloat16), ("float8e4nv", torch.float8_e4m3fn),
                    ("float8e5", torch.float8_e5m2)):
    out = torch.empty(numbers.numel(), dtype=dtype)
    cast[(16,)](numbers, out, 2**16)
    got, right = out.float(), numbers.to(dtype).float()
    halved = got == right / 2
    mean, right_mean = (100 * float(x.double().mean() / numbers.double().mean() - 1) for x in (got, right))
    differ, half = (100 * float(x.double().mean()) for x in (got != right, halved))
    print(f"{name}: {differ:.1f} % differ, {half:.1f} % halved, their mean {round(mean, 2) + 0.0:+.2f} %, "
          f"torch's {round(right_mean, 2) + 0.0:+.2f} %")
    if name == "float16":
        assert differ == 0
    elif name == "bfloat16":
        assert 49 < differ < 51 and half == 0 and (got <= right).all()
    else:
        assert differ == half > 2 and mean < -1
PY

#!/usr/bin/env bash
# accelerate 1.15.0 with mixed_precision="bf16": a prepared model's encode() and decode() run in float32, forward() not.
#
# Guess before the run: mixed precision holds for whatever is called of a prepared model; an autoencoder's encode and
# decode run in bfloat16 as its forward does.
# Seen on 2026-11-30 (CPython 3.11.7, torch 2.13.0, a CPU), a small autoencoder, the type inside and of the result:
#   forward: bfloat16 inside, float32 out
#   encode: float32 inside, float32 out
#   encode under accelerator.autocast(): bfloat16 inside, bfloat16 out
#   forward and encode then decode differ by 0.4 % of the result
# Latents cached with encode are not those that a step with forward makes, memory and time are those of float32, and what
# comes out does not tell, since forward's result is cast back. Exit 0: still so. Needs a package index.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet accelerate==1.15.0 torch==2.13.0 numpy==2.4.6

"$folder/venv/bin/python" - <<'PY'
from contextlib import nullcontext

import torch
from accelerate import Accelerator


class Autoencoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up = torch.nn.Linear(256, 64), torch.nn.Linear(64, 256)

    def encode(self, x):
        latent = self.down(x)
        self.inside = latent.dtype
        return latent

    def decode(self, latent):
        return self.up(latent)

    def forward(self, x):
        return self.decode(self.encode(x))


torch.manual_seed(0)
torch.set_grad_enabled(False)
accelerator = Accelerator(cpu=True, mixed_precision="bf16")
model, x, seen = accelerator.prepare(Autoencoder()), torch.randn(16, 256), []
ways = {"forward": model, "encode": model.encode, "encode under accelerator.autocast()": None}
for name, way in ways.items():
    with accelerator.autocast() if way is None else nullcontext():
        out = (way or model.encode)(x)
    seen.append((model.inside, out.dtype))
    print(f"{name}: {str(model.inside)[6:]} inside, {str(out.dtype)[6:]} out")
whole = model(x)
off = float((whole - model.decode(model.encode(x))).norm() / whole.norm())
print(f"forward and encode then decode differ by {100 * off:.1f} % of the result")
half, full = torch.bfloat16, torch.float32
assert seen == [(half, full), (full, full), (half, half)] and off > 1e-3
PY

#!/usr/bin/env bash
# CAME 0.1.3 on bfloat16 weights goes on after a resume with moments cast to bfloat16, which then stand still.
#
# Guess before the run: an optimizer whose state is saved and loaded goes on as if nothing had been; moments that it
# keeps in float32 stay float32. Seen on 2026-11-30 (CPython 3.11.7, torch 2.13.0), 100 steps with gradients of 1, then
# 5000 with gradients a hundredth as large, mean of the second moment's rows:
#   not resumed: 0.0954 0.0352 0.0007 after 1, 1000, 5000 steps, float32
#   resumed: 0.0954 0.0954 0.0954 after 1, 1000, 5000 steps, bfloat16
# torch.optim.Optimizer.load_state_dict casts what an optimizer keeps to its weights' precision, where 0.999 x is x: a
# run resumed after its warm-up trains on with steps that are far too small. Keep weights in float32 under autocast, or
# put the moments back after load_state_dict. Exit 0: still so. Needs a package index.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet came-pytorch==0.1.3 torch==2.13.0 numpy==2.4.6

"$folder/venv/bin/python" - <<'PY' 2>"$folder/warnings" | tee "$folder/seen"
import torch
from came_pytorch import CAME


def run(resumed):
    weight = torch.nn.Parameter(torch.zeros(16, 16, dtype=torch.bfloat16))
    optimizer, generator, said = CAME([weight], lr=1e-4), torch.Generator().manual_seed(0), []
    for step in range(1, 5101):
        size = 1 if step <= 100 else 0.01
        weight.grad = (size * torch.randn(16, 16, generator=generator)).bfloat16()
        optimizer.step()
        if resumed and step == 100:
            state, optimizer = optimizer.state_dict(), CAME([weight], lr=1e-4)
            optimizer.load_state_dict(state)
        if step in (101, 1100, 5100):
            moment = optimizer.state[weight]["exp_avg_sq_row"]
            said.append(f"{float(moment.float().mean()):.4f}")
    return f"{' '.join(said)} after 1, 1000, 5000 steps, {str(moment.dtype)[6:]}"


print("not resumed:", run(False))
print("resumed:", run(True))
PY
cat "$folder/warnings" >&2
[[ "$(tail -1 "$folder/seen")" == "resumed: 0.0954 0.0954 0.0954 after 1, 1000, 5000 steps, bfloat16" ]]
[[ "$(head -1 "$folder/seen")" == *" 0.0007 after"*float32 ]]

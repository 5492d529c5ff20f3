#!/usr/bin/env bash
# LyCORIS 4.1.3 merges LoHa and LoKr with a half or a quarter of their strength, where alpha is below the dimension.
#
# Guess before the run: a model with an adapter merged into its weights gives what the model with the adapter gives.
# Seen on 2026-11-30 (CPython 3.11.7, torch 2.13.0), the adapter's effect when merged, over that before, dimension 4:
#   lora: alpha 4 1.00, alpha 2 1.00, alpha 1 1.00
#   loha: alpha 4 1.00, alpha 2 0.50, alpha 1 0.25
#   lokr: alpha 4 1.00, alpha 2 0.50, alpha 1 0.25
# get_diff_weight multiplies by alpha/dimension what get_weight has multiplied already. Who publishes a merged model
# ships a part of what was trained, and no error tells: train with alpha = dimension, or merge with
# merge_to(dimension / alpha). Exit 0: still so. Needs a package index.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet lycoris-lora==4.1.3 torch==2.13.0 numpy==2.4.6

"$folder/venv/bin/python" - <<'PY' 2>"$folder/log" | tee "$folder/seen"
import logging
import torch
from lycoris import LycorisNetwork, create_lycoris

logging.disable(logging.INFO)
LycorisNetwork.apply_preset({"target_module": ["Linear", "Sequential"]})
SIZE = 4


@torch.no_grad()
def share(kind, alpha, strength=1.0): # of the adapter's effect that is there when it is merged
    torch.manual_seed(0)
    model, inputs = torch.nn.Sequential(torch.nn.Linear(96, 128)), torch.randn(5, 96)
    plain = model(inputs)
    adapter = create_lycoris(model, 1.0, linear_dim=SIZE, linear_alpha=alpha, algo=kind)
    adapter.apply_to()
    adapter.eval()
    for weight in adapter.parameters():
        weight.add_(0.2 * torch.randn_like(weight))
    active = model(inputs) - plain
    adapter.restore()
    assert torch.equal(model(inputs), plain)
    adapter.merge_to(strength)
    merged = model(inputs) - plain
    return float((merged * active).sum() / active.square().sum())


for kind in ("lora", "loha", "lokr"):
    print(f"{kind}: {', '.join(f'alpha {alpha} {share(kind, alpha):.2f}' for alpha in (4, 2, 1))}")
assert abs(share("loha", 1, SIZE / 1) - 1) < 1e-4 and abs(share("lokr", 1, SIZE / 1) - 1) < 1e-4
PY
[[ "$(<"$folder/seen")" == $'lora: alpha 4 1.00, alpha 2 1.00, alpha 1 1.00
loha: alpha 4 1.00, alpha 2 0.50, alpha 1 0.25
lokr: alpha 4 1.00, alpha 2 0.50, alpha 1 0.25' ]]

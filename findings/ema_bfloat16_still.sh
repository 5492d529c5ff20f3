#!/usr/bin/env bash
# Four packages' average of bfloat16 weights, decay 0.9999, never moves: weights go from 1 to 2 and it stays at 1.
#
# Guess before the run: an average that is updated 40 000 times comes near weights that stood still all that time; what
# is averaged is kept in float32, since a step of 1 in 10 000 cannot be added in bfloat16.
# Seen on 2026-11-30 (CPython 3.11.7), weights of 1, then of 2 for 40 000 updates, the average at the end:
#   torch 2.13.0, float32: 1.982
#   ema-pytorch 0.8.3, float32: 1.982
#   torch-ema 0.3, float32: 1.982
#   diffusers 0.42.1, float32: 1.982
#   torch 2.13.0, bfloat16: 1.000
#   ema-pytorch 0.8.3, bfloat16: 1.000
#   torch-ema 0.3, bfloat16: 1.000
#   diffusers 0.42.1, bfloat16: 1.000
# All keep the average in the weights' precision, and none warns. As the decay rises from 0 at the start of a run, the
# average follows for some hundred updates, which looks right, then stands. Average float32 weights. Exit 0: still so.
# Needs a package index.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet \
    torch==2.13.0 numpy==2.4.6 setuptools==80.9.0 ema-pytorch==0.8.3 torch-ema==0.3 \
    diffusers==0.42.1 transformers==5.23.0

"$folder/venv/bin/python" - <<'PY'
import importlib.metadata

import torch
from diffusers.training_utils import EMAModel
from ema_pytorch import EMA
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch_ema import ExponentialMovingAverage

UPDATES = 40_000


def averages(net):
    """Name to (update, average's weights)."""
    own = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9999))
    lucid = EMA(net, beta=0.9999, update_every=1, update_after_step=0, include_online_model=False)
    plain = ExponentialMovingAverage(net.parameters(), decay=0.9999)
    fused = EMAModel(net.parameters(), decay=0.9999)
    for _ in range(2):
        own.update_parameters(net), lucid.update(), plain.update(), fused.step(net.parameters())
    lucid.step.fill_(10**7)  # long past the start, in which the decay rises
    plain.num_updates = fused.optimization_step = 10**7
    return {
        "torch": (lambda: own.update_parameters(net), lambda: own.module.weight),
        "ema-pytorch": (lucid.update, lambda: lucid.ema_model.weight),
        "torch-ema": (plain.update, lambda: plain.shadow_params[0]),
        "diffusers": (lambda: fused.step(net.parameters()), lambda: fused.shadow_params[0]),
    }


torch.set_grad_enabled(False)
for dtype in (torch.float32, torch.bfloat16):
    net = torch.nn.Linear(2, 2, bias=False, dtype=dtype)
    net.weight.fill_(1)
    kinds = averages(net)
    net.weight.fill_(2)
    for name, (update, weights) in kinds.items():
        for _ in range(UPDATES):
            update()
        end = float(weights().float().mean())
        print(f"{name} {importlib.metadata.version(name).split('+')[0]}, {str(dtype)[6:]}: {end:.3f}")
        assert end == 1 if dtype == torch.bfloat16 else end > 1.97
PY

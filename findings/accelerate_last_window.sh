#!/usr/bin/env bash
# accelerate 1.15.0: where batches do not divide by the accumulation steps, each epoch's last update counts in part only.
#
# Guess before the run: accumulate() makes each update the mean over the batches that went into it, the shorter last window
# of an epoch included.
# Seen on 2026-11-30 (CPython 3.11.7, torch 2.13.0, one process), every batch's gradient 1, windows of 4 batches:
#   12 batches: updates by 1.00 1.00 1.00
#   10 batches: updates by 1.00 1.00 0.50
#   5 batches: updates by 1.00 0.25
#   3 batches: updates by 0.75
# backward() divides by 4 before it is known how many batches follow. A small set of clips trains its last ones, and with
# a fixed order always the same ones, at a fraction of the rate, and a threshold for clipping means something else for
# them. Drop the rest, or let the window run on over the epoch's end (sync_with_dataloader=False). Exit 0: still so.
# Needs a package index.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet accelerate==1.15.0 torch==2.13.0 numpy==2.4.6

"$folder/venv/bin/python" - <<'PY'
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

for batches in (12, 10, 5, 3):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    layer = torch.nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    loader = DataLoader(TensorDataset(torch.ones(batches, 1)), batch_size=1)
    layer, optimizer, loader = accelerator.prepare(layer, optimizer, loader)
    updates = []
    for (x,) in loader:
        with accelerator.accumulate(layer):
            accelerator.backward(layer(x).mean())
            if accelerator.sync_gradients:
                updates.append(layer.weight.grad.item())
            optimizer.step()
            optimizer.zero_grad()
    print(f"{batches} batches: updates by {' '.join(f'{update:.2f}' for update in updates)}")
    assert updates == [1.0] * (batches // 4) + [batches % 4 / 4] * (batches % 4 > 0)
PY

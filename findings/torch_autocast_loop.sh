#!/usr/bin/env bash
# PyTorch 2.13.0: a training loop inside one autocast block never sees its own updates, and nothing is said.
#
# Guess before the run: one torch.autocast block round the loop trains as a block in each step does; the forward pass
# follows weights that an optimizer or anything else has changed in place.
# Seen on 2026-11-30 (CPython 3.11.7, a CPU, bfloat16), a small network, 200 steps of AdamW, first and last loss:
#   a block in each step: 0.54456 0.00037
#   one block round the loop: 0.54456 0.54456, although weights moved by 13.9 times their size
#   a block in each step, all in a disabled block: 0.54456 0.54456
#   one block, cache_enabled=False: 0.54456 0.00037
#   weights doubled inside a block: output times 1.00
# The half-precision copies of weights are kept until the outermost block ends, be it a disabled one. A merged adapter,
# weights swapped for their average or a step inside do nothing until then; gradients are those of the old weights.
# Leave the block first, or call torch.clear_autocast_cache(). Exit 0: still so. Needs a package index.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6

"$folder/venv/bin/python" - <<'PY'
from contextlib import nullcontext

import torch
import torch.nn.functional as F


def trained(outside, inside):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 1))
    before = torch.nn.utils.parameters_to_vector(net.parameters()).detach().clone()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    x = torch.randn(256, 16)
    target = x[:, :1].sin()
    losses = []
    with outside():
        for _ in range(200):
            with inside():
                loss = F.mse_loss(net(x).float(), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    after = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
    return losses[0], losses[-1], float((after - before).norm() / before.norm())


def block(**given):
    return lambda: torch.autocast("cpu", torch.bfloat16, **given)


each, one = trained(nullcontext, block()), trained(block(), nullcontext)
inner, fresh = trained(block(enabled=False), block()), trained(block(cache_enabled=False), nullcontext)
print(f"a block in each step: {each[0]:.5f} {each[1]:.5f}")
print(f"one block round the loop: {one[0]:.5f} {one[1]:.5f}, although weights moved by {one[2]:.1f} times their size")
print(f"a block in each step, all in a disabled block: {inner[0]:.5f} {inner[1]:.5f}")
print(f"one block, cache_enabled=False: {fresh[0]:.5f} {fresh[1]:.5f}")
layer, x = torch.nn.Linear(8, 8, bias=False), torch.ones(1, 8)
with torch.autocast("cpu", torch.bfloat16):
    first = layer(x)
    with torch.no_grad():
        layer.weight.mul_(2)
    factor = (layer(x) / first).mean().item()
print(f"weights doubled inside a block: output times {factor:.2f}")
assert max(each[1], fresh[1]) < each[0] / 100 and one[2] > 0.5 and factor == 1
assert one[0] == one[1] == inner[0] == inner[1]
PY

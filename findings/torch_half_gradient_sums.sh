#!/usr/bin/env bash
# PyTorch 2.13.0 on a CPU sums the gradients of LayerNorm, indexing, embedding and replicate padding in bfloat16.
#
# Guess before the run: gradients of a weight that is used a thousand times are summed in float32, then rounded.
# Seen on 2026-11-30 (CPython 3.11.7, the build for CPUs, one thread), 1000 uses that each pass a gradient of 1:
#   1000: linear, conv3d, batch_norm, rms_norm, index_select, repeat_interleave, interpolate
#   256: layer_norm, embedding, indexing, replicate padding, grid_sample, layer_norm in float32 under autocast
# In bfloat16 256 + 1 is 256. Whoever tries bfloat16 training on a CPU gets wrong gradients where many tokens share a
# weight, for LayerNorm other ones by the number of threads. Cast to float32 before these, or train there in float32.
# Exit 0: still so. Needs a package index.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6

"$folder/venv/bin/python" - <<'PY' | tee "$folder/seen"
import torch
from torch.nn import functional as F

torch.set_num_threads(1)
COUNT = 1000
first = torch.zeros(COUNT, dtype=torch.long)


def ones(*shape):
    return torch.ones(shape, dtype=torch.bfloat16)


USES = {
    "linear": ((4,), lambda w: F.linear(ones(COUNT, 8), ones(4, 8), w)),
    "conv3d": ((4,), lambda w: F.conv3d(ones(1, 2, 10, 10, 10), ones(4, 2, 1, 1, 1), w)),
    "batch_norm": ((4,), lambda w: F.batch_norm(ones(COUNT, 4), None, None, bias=w, training=True)),
    "rms_norm": ((4,), lambda w: F.rms_norm(ones(COUNT, 4), (4,), w)),
    "index_select": ((2, 4), lambda w: w.index_select(0, first)),
    "repeat_interleave": ((2, 4), lambda w: w.repeat_interleave(COUNT, 0)),
    "interpolate": ((1, 1, 1, 1, 1), lambda w: F.interpolate(w, (10, 10, 10))),
    "layer_norm": ((4,), lambda w: F.layer_norm(ones(COUNT, 4), (4,), bias=w)),
    "embedding": ((2, 4), lambda w: F.embedding(first, w)),
    "indexing": ((2, 4), lambda w: w[first]),
    "replicate padding": ((1, 1, 1, 1, 1), lambda w: F.pad(w, (0, 0, 0, 0, COUNT - 1, 0), mode="replicate")),
    "grid_sample": ((1, 1, 1, 1), lambda w: F.grid_sample(w, 0 * ones(1, COUNT, 1, 2), align_corners=False)),
}
found = {}
for name, (shape, use) in USES.items():
    weight = ones(*shape).requires_grad_()
    used = use(weight)
    used.backward(torch.ones_like(used))
    found.setdefault(int(weight.grad.flatten()[0]), []).append(name)
with torch.autocast("cpu", torch.bfloat16):
    norm = torch.nn.LayerNorm(4)
    used = norm(torch.nn.Linear(4, 4)(torch.ones(COUNT, 4)))
    used.backward(torch.ones_like(used))
found.setdefault(int(norm.bias.grad[0]), []).append("layer_norm in float32 under autocast")
for total, names in found.items():
    print(f"{total}: {', '.join(names)}")
PY
[[ "$(<"$folder/seen")" == \
$'1000: linear, conv3d, batch_norm, rms_norm, index_select, repeat_interleave, interpolate
256: layer_norm, embedding, indexing, replicate padding, grid_sample, layer_norm in float32 under autocast' ]]

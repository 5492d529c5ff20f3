#!/usr/bin/env bash
# torchmetrics 1.9.0: a dark clip's SSIM is 0.38 alone and 0.64 beside a bright one where no range is given.
#
# Guess before the run: structural_similarity_index_measure gives a clip the same score alone and in a batch, and scores
# of each clip, averaged, are the score of the batch.
# Seen on 2026-11-30 (CPython 3.11.7, torch 2.13.0), values of 0 to 0.2 and 0 to 1, noise of 0.02:
#   no data_range: dark 0.3762 alone, 0.6398 in the batch; batch 0.7790, mean of its clips alone 0.6455
#   data_range=1: dark 0.7458 alone, 0.7458 in the batch; batch 0.8362, mean of its clips alone 0.8362
# The range is taken from what lies in the batch. Reconstruction scores so depend on the batch's size and order and on
# the number of ranks; tables of other papers, which give the range, show other numbers. Exit 0: still so. Needs a
# package index.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torchmetrics==1.9.0 torch==2.13.0 numpy==2.4.6 setuptools==80.9.0

"$folder/venv/bin/python" - <<'PY'
import torch
from torchmetrics.functional.image import structural_similarity_index_measure as ssim

generator = torch.Generator().manual_seed(0)


def clip(level):
    """A smooth clip of 3 x 64 x 64 and the same with noise."""
    clean = torch.nn.functional.avg_pool2d(torch.rand(1, 3, 64, 64, generator=generator) * level, 5, 1, 2)
    return clean, (clean + 0.02 * torch.randn(clean.shape, generator=generator)).clamp(0, 1)


dark, bright = clip(0.2), clip(1.0)
clean, noisy = (torch.cat(both) for both in zip(dark, bright, strict=True))
for name, given in (("no data_range", None), ("data_range=1", 1.0)):
    alone = [ssim(made, right, data_range=given).item() for right, made in (dark, bright)]
    each = ssim(noisy, clean, data_range=given, reduction="none").tolist()
    whole = ssim(noisy, clean, data_range=given).item()
    print(f"{name}: dark {alone[0]:.4f} alone, {each[0]:.4f} in the batch; "
          f"batch {whole:.4f}, mean of its clips alone {sum(alone) / 2:.4f}")
    assert (each[0] - alone[0] > 0.1) == (given is None) == (whole - sum(alone) / 2 > 0.05)
PY

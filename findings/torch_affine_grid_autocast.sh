#!/usr/bin/env bash
# PyTorch 2.13.0: under autocast affine_grid gives a bfloat16 grid, with which warping by nothing shifts pixels.
#
# Guess before the run: an identity affine_grid and grid_sample of a float32 picture give it back under autocast as well.
# Seen on 2026-11-30 (CPython 3.11.7, a CPU), pictures of noise; off: mean difference over that of neighbours:
#   64 x 64: grid bfloat16, picture float32, shifts by up to 0.00 pixels, off 0.00
#   60 x 90: grid bfloat16, picture float32, shifts by up to 0.09 pixels, off 0.04
#   480 x 720: grid bfloat16, picture float32, shifts by up to 0.69 pixels, off 0.32
#   1080 x 1920: grid bfloat16, picture float32, shifts by up to 1.75 pixels, off 0.62
#   without autocast: off 0.00 at all sizes
# Powers of two, with which one tests, are exact. The picture stays float32, so that nothing in its type tells. Make grids
# of warps and augmentations in a block with autocast off. Exit 0: still so. Needs a package index.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6

"$folder/venv/bin/python" - <<'PY'
import torch
import torch.nn.functional as F

identity = torch.eye(2, 3)[None]

def warped(picture):
    grid = F.affine_grid(identity, picture.shape, align_corners=False)
    return grid, F.grid_sample(picture, grid, align_corners=False)


whole, seen = [], []
for height, width in ((64, 64), (60, 90), (480, 720), (1080, 1920)):
    picture = torch.rand(1, 1, height, width, generator=torch.Generator().manual_seed(0))
    neighbours = (picture[..., 1:] - picture[..., :-1]).abs().mean()
    exact, plain = warped(picture)
    with torch.autocast("cpu", torch.bfloat16):
        grid, half = warped(picture)
    shift = float(((grid - exact).abs() * torch.tensor([width, height]) / 2).max())
    off = [float((x - picture).abs().mean() / neighbours) for x in (half, plain)]
    print(f"{height} x {width}: grid {str(grid.dtype)[6:]}, picture {str(half.dtype)[6:]}, shifts by up to {shift:.2f} "
          f"pixels, off {off[0]:.2f}")
    seen.append((grid.dtype, half.dtype, shift > 0.6, off[0] > 0.3))
    whole.append(off[1])
print(f"without autocast: off {max(whole):.2f} at all sizes")
assert seen == [(torch.bfloat16, torch.float32, large, large) for large in (False, False, True, True)]
assert max(whole) < 1e-3
PY

#!/usr/bin/env bash
# diffusers 0.42.1: the flow-matching Euler scheduler shifts its least noise twice, to 5 times what training saw.
#
# Guess before the run: with shift 5 the schedule of 1000 inference steps is that of training, and a schedule of 50
# steps ends near the least noise that training saw.
# Seen on 2026-11-30 (CPython 3.11.7, torch 2.13.0), least noise above 0:
#   shift 1: training 0.0010, 50 steps 0.0010, 1000 steps 0.0010, unequal to training 0 of 1000
#   shift 3: training 0.0030, 50 steps 0.0089, 1000 steps 0.0089, unequal to training 999 of 1000
#   shift 5: training 0.0050, 50 steps 0.0244, 1000 steps 0.0244, unequal to training 999 of 1000
#   shift 7: training 0.0070, 50 steps 0.0468, 1000 steps 0.0468, unequal to training 999 of 1000
# The times between are spaced from an end that is shifted already, then shifted. The last step jumps from 1 to 5 %
# noise to none, and a model is asked at other times than by code that shifts once. Pass sigmas to set_timesteps, as the
# pipelines of HunyuanVideo and LTX do; Stable Diffusion 3's does not. Exit 0: still so. Needs a package index.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet diffusers==0.42.1 torch==2.13.0 transformers==5.23.0 numpy==2.4.6

"$folder/venv/bin/python" - <<'PY'
from diffusers import FlowMatchEulerDiscreteScheduler


def shifted(shift, sigma):
    return shift * sigma / (1 + (shift - 1) * sigma)


for shift in (1.0, 3.0, 5.0, 7.0):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    training = scheduler.sigmas.clone()
    least = {}
    for steps in (50, 1000):
        scheduler.set_timesteps(steps)
        least[steps] = float(scheduler.sigmas[-2])
    unequal = int(((scheduler.sigmas[:-1] - training).abs() > 1e-7).sum())
    print(f"shift {shift:.0f}: training {training[-1]:.4f}, 50 steps {least[50]:.4f}, 1000 steps {least[1000]:.4f}, "
          f"unequal to training {unequal} of 1000")
    once = shifted(shift, 0.001)
    assert abs(float(training[-1]) - once) < 1e-6 and (unequal > 900) == (shift > 1)
    assert all(abs(end - shifted(shift, once)) < 1e-6 for end in least.values())
PY

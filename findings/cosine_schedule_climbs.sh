#!/usr/bin/env bash
# transformers, diffusers and torch: a cosine schedule that is stepped past its end climbs back to the full rate.
#
# Guess before the run: cosine schedules stay at the rate with which they end, as linear ones do.
# Seen on 2026-11-30 (CPython 3.11.7), a schedule of 1000 steps, share of the rate after 1000, 1100, 1500, 2000 steps:
#   transformers 5.23.0 get_cosine_schedule_with_warmup: 0.000 0.024 0.500 1.000
#   transformers 5.23.0 get_cosine_with_min_lr_schedule_with_warmup: 0.100 0.122 0.550 1.000
#   diffusers 0.42.1 cosine: 0.000 0.024 0.500 1.000
#   torch 2.13.0 CosineAnnealingLR: 0.000 0.024 0.500 1.000
#   deepspeed 0.19.8 WarmupCosineLR: 0.000 0.000 0.000 0.000
#   transformers 5.23.0 get_linear_schedule_with_warmup: 0.000 0.000 0.000 0.000
# A run prolonged by a tenth, resumed with the old length, or whose steps were counted per process trains its finished
# weights at a rising rate. Exit 0: still so. Needs a package index.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet \
    transformers==5.23.0 diffusers==0.42.1 torch==2.13.0 numpy==2.4.6 deepspeed==0.19.8 setuptools==80.9.0

"$folder/venv/bin/python" - <<'PY'
import importlib.metadata
import logging

import torch
import transformers
from diffusers.optimization import get_scheduler

logging.disable(logging.WARNING)
from deepspeed.runtime.lr_schedules import WarmupCosineLR  # noqa: E402

END = 1000


def rates(make):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule, seen = make(optimizer), []
    optimizer.step()
    for step in range(1, 2 * END + 1):
        schedule.step()
        if step in (END, END + END // 10, END + END // 2, 2 * END):
            seen.append(optimizer.param_groups[0]["lr"])
    return seen


ways = {
    "transformers get_cosine_schedule_with_warmup": lambda o: transformers.get_cosine_schedule_with_warmup(o, 0, END),
    "transformers get_cosine_with_min_lr_schedule_with_warmup": lambda o: (
        transformers.get_cosine_with_min_lr_schedule_with_warmup(o, 0, END, min_lr=0.1)),
    "diffusers cosine": lambda o: get_scheduler("cosine", o, num_warmup_steps=0, num_training_steps=END),
    "torch CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, END),
    "deepspeed WarmupCosineLR": lambda o: WarmupCosineLR(o, END, warmup_num_steps=1, cos_min_ratio=0.0),
    "transformers get_linear_schedule_with_warmup": lambda o: transformers.get_linear_schedule_with_warmup(o, 0, END),
}
for name, make in ways.items():
    package, what = name.split()
    version = importlib.metadata.version(package).split("+")[0]
    seen = rates(make)
    print(f"{package} {version} {what}: {' '.join(f'{rate:.3f}' for rate in seen)}")
    climbs = package != "deepspeed" and "linear" not in what
    assert (abs(seen[-1] - 1) < 1e-3) == climbs and (seen[-1] <= seen[0] + 1e-6) != climbs
PY

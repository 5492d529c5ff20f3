#!/usr/bin/env bash
# Four samplers: a run of seed 1 sees in each epoch the order that a run of seed 0 sees one epoch later.
#
# Guess before the run: two runs with seeds 0 and 1 see their data in unrelated orders.
# Seen on 2026-11-30 (CPython 3.11.7), 1000 samples, places that agree:
#   torch 2.13.0 DistributedSampler: seed 0 epoch 1 against seed 1 epoch 0: 1000
#   torchdata 0.11.0 StatefulDistributedSampler: seed 0 epoch 1 against seed 1 epoch 0: 1000
#   accelerate 1.15.0 SeedableRandomSampler: seed 0 epoch 1 against seed 1 epoch 0: 1000
#   webdataset 1.0.2 detshuffle: seed 0 epoch 1 against seed 1 epoch 0: 1000
# Seed and epoch are added. Runs of seeds 0, 1, 2 for a mean and its spread share all orders but one or two, and so does
# a run that counts its seed up at each restart. Put seeds further apart than there are epochs. Exit 0: still so. Needs
# a package index.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet \
    torch==2.13.0 torchdata==0.11.0 accelerate==1.15.0 webdataset==1.0.2 numpy==2.4.6

"$folder/venv/bin/python" - <<'PY'
import importlib.metadata

import webdataset
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import DistributedSampler
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

data = range(1000)


def distributed(kind):
    def order(seed, epoch):
        sampler = kind(data, num_replicas=1, rank=0, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    return order


def seedable(seed, epoch):
    sampler = SeedableRandomSampler(data, data_seed=seed)
    sampler.set_epoch(epoch)
    return list(sampler)


def shuffled(seed, epoch):
    stage = webdataset.detshuffle(2000, initial=2000, seed=seed)
    for _ in range(epoch):
        list(stage.run(iter(data)))
    return list(stage.run(iter(data)))


for package, name, order in (
    ("torch", "DistributedSampler", distributed(DistributedSampler)),
    ("torchdata", "StatefulDistributedSampler", distributed(StatefulDistributedSampler)),
    ("accelerate", "SeedableRandomSampler", seedable),
    ("webdataset", "detshuffle", shuffled),
):
    version = importlib.metadata.version(package).split("+")[0]
    agree = sum(a == b for a, b in zip(order(0, 1), order(1, 0), strict=True))
    print(f"{package} {version} {name}: seed 0 epoch 1 against seed 1 epoch 0: {agree}")
    assert agree == 1000 and order(0, 0) != order(0, 1) and sorted(order(0, 0)) == list(data)
PY

#!/usr/bin/env bash
# PyTorch 2.13.0 on a CPU: of a 64-bit seed only the lower 32 bits count, although all 64 are taken and given back.
#
# Guess before the run: torch.Generator().manual_seed(5) and manual_seed(5 + 2 ** 32) give unrelated numbers.
# Seen on 2026-11-30 (CPython 3.11.7, the build for CPUs), a million (2 ** 20) normal numbers each:
#   5 + 2**32, 5 + 2**40, 5 + 7 * 2**60, 5 - 2**32: the numbers of seed 5; initial_seed() as given
#   5 + 2**31: other numbers
#   seeds rank * 2**32 + 5 for 8 ranks: 1 start of sampling
#   100000 seeds of 64 bits from a hash: 2 pairs of equal numbers
# Whoever packs a rank, a worker or a clip into the upper half of a seed trains or samples the same noise everywhere,
# and of hashed seeds two in 77 000 are as likely as not the same. Mix all bits into the lower 32. Exit 0: still so.
# Needs a package index.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6

"$folder/venv/bin/python" - <<'PY'
import hashlib

import torch


def drawn(seed, n=2**20):
    generator = torch.Generator().manual_seed(seed)
    assert generator.initial_seed() == seed % 2**64
    return torch.randn(n, generator=generator)


same = {"5 + 2**32": 5 + 2**32, "5 + 2**40": 5 + 2**40, "5 + 7 * 2**60": 5 + 7 * 2**60, "5 - 2**32": 5 - 2**32}
assert all(torch.equal(drawn(5), drawn(seed)) for seed in same.values())
print(f"{', '.join(same)}: the numbers of seed 5; initial_seed() as given")
assert not torch.equal(drawn(5), drawn(5 + 2**31))
print("5 + 2**31: other numbers")
ranks = {tuple(drawn(rank * 2**32 + 5, 100).tolist()) for rank in range(8)}
print(f"seeds rank * 2**32 + 5 for 8 ranks: {len(ranks)} start of sampling")
assert len(ranks) == 1
seeds = {int.from_bytes(hashlib.sha256(b"%d" % clip).digest()[:8], "big") for clip in range(100000)}
starts = {}
for seed in seeds:
    starts.setdefault(seed % 2**32, []).append(seed)
pairs = [pair for pair in starts.values() if len(pair) > 1]
assert len(seeds) == 100000 and pairs and all(torch.equal(drawn(a), drawn(b)) for a, b in pairs)
print(f"100000 seeds of 64 bits from a hash: {len(pairs)} pairs of equal numbers")
PY

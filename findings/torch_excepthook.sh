#!/usr/bin/env bash
# PyTorch 2.13.0: every process group that a process has ever made adds a prefix to each line of its tracebacks.
#
# Guess before the run: destroy_process_group() undoes what init_process_group() did, so that an error afterwards looks as
# it does in a program that never had a group. Seen on 2026-11-30 (CPython 3.11.7, the build for CPUs), a process alone
# (world size 1, gloo) that makes and destroys a group three times and then raises:
#   [rank0]: [rank0]: [rank0]: ValueError: x
# init_process_group puts a sys.excepthook of its own around the one that it finds (torch/distributed/distributed_c10d.py),
# which stays, and around which the next one is put. Whoever reads tracebacks, or ends its own with one plain line, has to
# keep the hook and put it back. Exit 0: still so. Needs a package index.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.6

cat > "$folder/raises.py" <<'PY'
import sys
import tempfile

import torch.distributed as dist

for _ in range(int(sys.argv[1])):
    store = dist.FileStore(tempfile.mktemp(), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    dist.destroy_process_group()
raise ValueError("x")
PY
seen=""
for count in 0 1 3; do
    line="$("$folder/venv/bin/python" "$folder/raises.py" "$count" 2>&1 | tail -1)" || true
    echo "$count groups made and destroyed: $line"
    seen+="$line;"
done
[[ "$seen" == "ValueError: x;[rank0]: ValueError: x;[rank0]: [rank0]: [rank0]: ValueError: x;" ]]

#!/usr/bin/env bash
# safetensors 0.8.0 writes other bytes each time the same tensors and metadata are saved.
#
# Guess before the run: a file's bytes follow from what is saved, in the order of the dictionary.
# Seen on 2026-11-30 (CPython 3.11.7, numpy 2.4.6), six processes that save one array with six entries of metadata:
#   metadata of six entries: 6 different files
#   metadata of one entry: 1 different file
# The entries stand in the header in another order each time. A checksum of an adapter therefore says nothing about
# whether two trainings gave the same weights, and a store that keeps files by their hash keeps each save.
# Exit 0: still so. Needs a package index.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet safetensors==0.8.0 numpy==2.4.6

different_files() { # of six saves with the metadata's keys $1
    for _ in 1 2 3 4 5 6; do
        "$folder/venv/bin/python" - "$1" <<'PY'
import hashlib, sys
import numpy
from safetensors.numpy import save
print(hashlib.sha256(save({"weight": numpy.ones(3)}, {key: key for key in sys.argv[1]})).hexdigest())
PY
    done | sort -u | wc -l
}

six="$(different_files abcdef)" one="$(different_files a)"
printf 'metadata of six entries: %d different files\nmetadata of one entry: %d different file\n' "$six" "$one"
((six > 1 && one == 1))

#!/usr/bin/env bash
# peft 0.21.2: add_weighted_adapter with "linear" does not add up two adapters; what it adds besides is as large.
#
# Guess before the run: the combination "linear" of two adapters at weight 1 each changes the weights by the sum of
# their changes, as "cat" and "svd" do.
# Seen on 2026-11-30 (CPython 3.11.7, torch 2.13.0), two adapters of rank 4 of noise, distance from the sum in its
# norms:
#   linear: 1.01
#   cat: 0.00
#   svd of rank 8: 0.00
#   linear, an adapter with itself: 1.00
# It adds the factors, so that (A1 + A2)(B1 + B2) brings each adapter's one half times the other's, and an adapter
# combined with itself at 1 + 1 counts fourfold. Use "cat", or set both active. Exit 0: still so. Needs a package index.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet peft==0.21.2 torch==2.13.0 transformers==5.23.0 numpy==2.4.6

"$folder/venv/bin/python" - <<'PY'
import torch
from peft import LoraConfig, get_peft_model

torch.manual_seed(0)
configuration = LoraConfig(r=4, lora_alpha=4, target_modules=["0"], init_lora_weights=False)
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False)), configuration, adapter_name="first")
for name in ("second", "copy"):
    model.add_adapter(name, configuration)
layer = model.base_model.model[0]
for half in (layer.lora_A, layer.lora_B):
    half["copy"].load_state_dict(half["first"].state_dict())


def off(kind, other, **more):
    name = f"{kind}_{other}"
    model.add_weighted_adapter(["first", other], [1.0, 1.0], name, combination_type=kind, **more)
    first, second, both = (layer.get_delta_weight(n).detach() for n in ("first", other, name))
    return float((both - first - second).norm() / (first + second).norm())


linear, cat, svd = off("linear", "second"), off("cat", "second"), off("svd", "second", svd_rank=8)
twice = off("linear", "copy")
print(f"linear: {linear:.2f}")
print(f"cat: {cat:.2f}")
print(f"svd of rank 8: {svd:.2f}")
print(f"linear, an adapter with itself: {twice:.2f}")
assert linear > 0.8 and max(cat, svd) < 1e-4 and abs(twice - 1) < 1e-4
PY

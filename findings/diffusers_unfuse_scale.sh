#!/usr/bin/env bash
# diffusers 0.42.1: an adapter that was fused with a scale and unfused keeps that scale; each round it gets weaker.
#
# Guess before the run: unfuse_lora() undoes fuse_lora(lora_scale=0.7), so that both can be called again and again.
# Seen on 2026-11-30 (CPython 3.11.7, torch 2.13.0, peft 0.21.2), the adapter's share in what a layer gives:
#   fused 0.700, unfused and active 0.700
#   fused 0.490, unfused and active 0.490
#   fused 0.343, unfused and active 0.343
# A server that fuses for each request, or a comparison of scales in one process, samples with other scales than it
# says. Call set_adapters(name, 1.0) after unfuse_lora(). Exit 0: still so. Needs a package index.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet \
    diffusers==0.42.1 peft==0.21.2 torch==2.13.0 transformers==5.23.0 numpy==2.4.6

"$folder/venv/bin/python" - <<'PY' | tee "$folder/seen"
import torch
from diffusers import CogVideoXTransformer3DModel
from peft import LoraConfig

torch.manual_seed(0)
model = CogVideoXTransformer3DModel(
    num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=8,
    num_layers=1, sample_width=4, sample_height=4, sample_frames=5, max_text_seq_length=6,
)
model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q"], init_lora_weights=False), "x")
layer, inputs = model.transformer_blocks[0].attn1.to_q, torch.randn(5, 32)


def share(): # of the adapter in what the layer gives
    with torch.no_grad():
        found = layer(inputs) - inputs @ weight.T - layer.base_layer.bias
    return float((found * whole).sum() / whole.square().sum())


weight = layer.base_layer.weight.detach().clone()
whole = inputs @ layer.get_delta_weight("x").detach().T
for _ in range(3):
    model.fuse_lora(lora_scale=0.7)
    fused = share()
    model.unfuse_lora()
    print(f"fused {fused:.3f}, unfused and active {share():.3f}")
model.set_adapters("x", 1.0)
assert abs(share() - 1) < 1e-4
PY
[[ "$(<"$folder/seen")" == $'fused 0.700, unfused and active 0.700
fused 0.490, unfused and active 0.490
fused 0.343, unfused and active 0.343' ]]

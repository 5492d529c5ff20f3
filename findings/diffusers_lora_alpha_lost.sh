#!/usr/bin/env bash
# diffusers 0.42.1: an adapter of rank 4 and alpha 16 that is saved and loaded comes back at a quarter of its strength.
#
# Guess before the run: CogVideoXPipeline.save_lora_weights keeps what the adapter's strength depends on, or says that
# it does not; loaded again, the adapter changes the weights as it did.
# Seen on 2026-11-30 (CPython 3.11.7, torch 2.13.0, peft 0.21.2), a small CogVideoX transformer, adapters of noise:
#   trained: alpha 16, weights changed by 1.00
#   saved and loaded: alpha 4, weights changed by 0.25, warnings 0
#   saved with the adapter's configuration: alpha 16, weights changed by 1.00, warnings 0
# Without it alpha is taken for the rank. It travels only if the call is given transformer_lora_adapter_metadata, which
# peft's get_peft_model_state_dict does not bring along. Exit 0: still so. Needs a package index.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet \
    diffusers==0.42.1 peft==0.21.2 torch==2.13.0 transformers==5.23.0 numpy==2.4.6

"$folder/venv/bin/python" - <<'PY'
import tempfile
import warnings

import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict


def transformer():
    torch.manual_seed(0)
    return CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=16, num_layers=2, sample_width=8, sample_height=8, sample_frames=5, max_text_seq_length=8)


def change(model):
    """What all adapters add to the weights."""
    return torch.cat([module.get_delta_weight(name).flatten() for module in model.modules()
                      if hasattr(module, "get_delta_weight") for name in module.lora_A])


trained = transformer()
trained.add_adapter(LoraConfig(r=4, lora_alpha=16, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v"]))
whole = change(trained).norm()
print("trained: alpha 16, weights changed by 1.00")
for name, more in (("saved and loaded", {}),
                   ("saved with the adapter's configuration", _collate_lora_metadata({"transformer": trained}))):
    loaded = transformer()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        CogVideoXPipeline.save_lora_weights(folder, get_peft_model_state_dict(trained), **more)
        weights, metadata = CogVideoXPipeline.lora_state_dict(
            folder, weight_name="pytorch_lora_weights.safetensors", use_safetensors=True, return_lora_metadata=True)
        CogVideoXPipeline.load_lora_into_transformer(weights, loaded, metadata=metadata)
    alpha = {config.lora_alpha for config in loaded.peft_config.values()}.pop()
    share = float(change(loaded).detach().norm() / whole.detach())
    said = [w for w in said if "lora" in str(w.message).lower() or "alpha" in str(w.message).lower()]
    print(f"{name}: alpha {alpha}, weights changed by {share:.2f}, warnings {len(said)}")
    assert alpha == (16 if more else 4) and abs(share - alpha / 16) < 1e-3 and not said
PY

#!/usr/bin/env bash
# peft 0.21.2: layers_to_transform=[0] on CogVideoX adapts the first feed-forward layer of all blocks, and not block 0.
#
# Guess before the run: layers_to_transform counts the transformer's blocks, so that [0] adapts the four target layers of
# block 0 alone.
# Seen on 2026-11-30 (CPython 3.11.7, torch 2.13.0, diffusers 0.42.1), a small transformer of 12 blocks, targets to_q,
# to_out.0, ff.net.0.proj and ff.net.2:
#   [0]: 12 layers in blocks 0 1 2 3 4 5 6 7 8 9 10 11: ff.net.0.proj
#   [0], layers_pattern="transformer_blocks": 4 layers in blocks 0: ff.net.0.proj ff.net.2 to_out.0 to_q
# Without the pattern a number counts that has two names before it and one behind it: in this model that is the place in
# a feed-forward net's own list, never the block's number. Other numbers than 0 are an error; with 0 nothing is said, and
# the run trains. Give the pattern, and look at what print_trainable_parameters counts. Exit 0: still so. Needs a package
# index.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet peft==0.21.2 diffusers==0.42.1 torch==2.13.0 transformers==5.23.0 numpy==2.4.6

"$folder/venv/bin/python" - <<'PY'
from diffusers import CogVideoXTransformer3DModel
from peft import LoraConfig, get_peft_model

TARGETS = ["to_q", "to_out.0", "ff.net.0.proj", "ff.net.2"]


def adapted(**given):
    net = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=8,
        num_layers=12, sample_width=8, sample_height=8, sample_frames=5, max_text_seq_length=8)
    model = get_peft_model(net, LoraConfig(r=2, target_modules=TARGETS, **given))
    names = [name.split("transformer_blocks.")[1] for name, module in model.named_modules() if hasattr(module, "lora_A")]
    blocks = sorted({int(name.split(".")[0]) for name in names})
    return len(names), blocks, sorted({target for target in TARGETS for name in names if name.endswith("." + target)})


seen = []
for name, given in (("[0]", {"layers_to_transform": [0]}),
                    ('[0], layers_pattern="transformer_blocks"',
                     {"layers_to_transform": [0], "layers_pattern": "transformer_blocks"})):
    count, blocks, kinds = adapted(**given)
    print(f"{name}: {count} layers in blocks {' '.join(map(str, blocks))}: {' '.join(kinds)}")
    seen.append((count, len(blocks), kinds))
assert seen == [(12, 12, ["ff.net.0.proj"]), (4, 1, sorted(TARGETS))]
PY

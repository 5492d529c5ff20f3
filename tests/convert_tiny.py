"""Tiny SAT releases for the converter tests: the reference network's sizes, a one-block VAE, a two-layer T5."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from sgm.util import instantiate_from_config
from sgm.weights import assign_state
from sgm.weights.release import NETWORK_PREFIX, read_transformer
from tests.dit_tiny import TEXT_LENGTH, tiny_config
from tools.random_release import write_random_release

VAE_PARAMS = {"double_z": True, "z_channels": 16, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 32,
              "ch_mult": [1, 2, 2, 4], "attn_resolutions": [], "num_res_blocks": 1, "dropout": 0.0}  # fmt: skip
_CODERS = "vae_modules.cp_enc_dec.ContextParallel"


def model_section(release: Path, **network: Any) -> dict[str, Any]:
    """The parts of a YAML file's `model:` that hold weights."""
    return {
        "network_config": tiny_config(**network),
        "first_stage_config": {
            "target": "vae_modules.autoencoder.VideoAutoencoderInferenceWrapper",
            "params": {
                "ckpt_path": str(release / "vae" / "3d-vae.pt"),
                "encoder_config": {"target": f"{_CODERS}Encoder3D", "params": dict(VAE_PARAMS)},
                "decoder_config": {"target": f"{_CODERS}Decoder3D", "params": dict(VAE_PARAMS)},
            },
        },
        "conditioner_config": {
            "target": "sgm.modules.GeneralConditioner",
            "params": {"emb_models": [{
                "is_trainable": False, "input_key": "txt", "ucg_rate": 0.1,
                "target": "sgm.modules.encoders.modules.FrozenT5Embedder",
                "params": {"model_dir": str(release / "t5"), "max_length": TEXT_LENGTH},
            }]},
        },
    }  # fmt: skip


def make_release(folder: Path, dtype: torch.dtype = torch.float32, **network: Any) -> Path:
    """A release folder (transformer/, vae/, t5/, infer.yaml) with random weights that act; returns it."""
    model = model_section(folder, **network)
    write_random_release(model, folder, dtype=dtype)
    schedule = {"params": {"discretization_config": {"params": {"shift_scale": 3.0}}}}
    content = {"model": model | {"scale_factor": 1.15258426, "sampler_config": schedule}}
    (folder / "infer.yaml").write_text(json.dumps(content), encoding="utf-8")
    return folder


def network_of(checkpoint: Path, **options: Any) -> torch.nn.Module:
    """Our network with a checkpoint's base weights (and computed tables), in float32."""
    network = instantiate_from_config(tiny_config(**options)).eval()
    state = {name: t.float() for name, t in read_transformer(checkpoint).network.items() if ".matrix_" not in name}
    assign_state(network, network.computed_state() | state, source=str(checkpoint), may_lack=network.dead_keys())
    return network


def rewrite(checkpoint: Path, target: Path, change: Any) -> Path:
    """A copy of a release's weights file with `change(module)` done to its entries, and of the release's configuration
    beside it; returns `target`."""
    content = torch.load(checkpoint / "1000" / "mp_rank_00_model_states.pt", weights_only=True)
    changed = change(content["module"]) or content["module"]
    target.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"module": changed}, target)
    shutil.copy(checkpoint.parent / "infer.yaml", target.parent)
    return target


def adapter_matrices(rank: int = 4, layers: int = 2, width: int = 192, seed: int = 3) -> dict[str, torch.Tensor]:
    """Random LoRA matrices on all attention linears, under the engine's names."""
    draw = torch.Generator().manual_seed(seed)
    matrices = {}
    for k in range(layers):
        for name, parts in (("query_key_value", 3), ("dense", 1)):
            linear = f"{NETWORK_PREFIX}transformer.layers.{k}.attention.{name}"
            for part in range(parts):
                matrices[f"{linear}.matrix_A.{part}"] = torch.randn(rank, width, generator=draw) * width**-0.5
                matrices[f"{linear}.matrix_B.{part}"] = torch.randn(width, rank, generator=draw)
    return matrices

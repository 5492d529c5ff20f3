"""Tiny releases for the converter tests: SAT's of the reference network's sizes, diffusers' pipelines of all kinds."""

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
from tests.training_tiny import T5
from tools.random_release import write_random_release

VAE_PARAMS = {"double_z": True, "z_channels": 16, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 32,
              "ch_mult": [1, 2, 2, 4], "attn_resolutions": [], "num_res_blocks": 1, "dropout": 0.0}  # fmt: skip
SCHEDULE = dict(
    beta_start=0.00085, beta_end=0.0120, beta_schedule="scaled_linear", clip_sample=False,
    prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True, set_alpha_to_one=True,
)  # fmt: skip  # of every model's scheduler
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


# --- diffusers' pipelines -------------------------------------------------------------------------------------------

_ROTARY = {"use_rotary_positional_embeddings": True, "sample_frames": 9}
_IMAGE = {"in_channels": 32}
KINDS: dict[str, dict[str, Any]] = {  # what each model's transformer has beside the sizes
    "2b": {"sample_frames": 9},
    "5b": _ROTARY,
    "5b-i2v": _ROTARY | _IMAGE | {"use_learned_positional_embeddings": True},
    "1.5": _ROTARY | {"patch_size_t": 2, "patch_bias": False},
    "1.5-i2v": _ROTARY | _IMAGE | {"patch_size_t": 2, "patch_bias": False, "ofs_embed_dim": 24},
}


def make_pipeline(folder: Path, kind: str, text_length: int = TEXT_LENGTH) -> Any:
    """A pipeline of diffusers' own classes with random weights that act, saved in `folder`; returned, too."""
    import diffusers
    from transformers import T5EncoderModel, T5Tokenizer

    later, image = kind.startswith("1.5"), kind.endswith("i2v")
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=4, attention_head_dim=16, num_layers=2, time_embed_dim=24, text_embed_dim=32,
        sample_height=4, sample_width=6, max_text_seq_length=text_length, **KINDS[kind],
    )  # fmt: skip
    vae = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(32,) * 4, layers_per_block=1, down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4, scaling_factor=1.15258426 if kind == "2b" else 0.7,
        invert_scale_latents=later,
    )  # fmt: skip
    draw = torch.Generator().manual_seed(5)
    biases = {name: t for name, t in vae.state_dict().items() if t.ndim == 1}
    for spread, state in ((0.08, transformer.state_dict()), (0.3, biases)):
        for name, tensor in state.items():
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            tensor.copy_(centre + spread * torch.randn(tensor.shape, generator=draw))
    scheduler = diffusers.CogVideoXDPMScheduler(**SCHEDULE, snr_shift_scale=3.0 if kind == "2b" else 1.0)
    parts = (T5Tokenizer.from_pretrained(T5), T5EncoderModel.from_pretrained(T5), vae, transformer, scheduler)
    make = diffusers.CogVideoXImageToVideoPipeline if image else diffusers.CogVideoXPipeline
    pipeline = make(*parts)
    pipeline.save_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline

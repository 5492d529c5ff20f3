"""The tiny network of the reference cases, for the tests of network, adapters and tensor parallelism."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

GOLDEN = Path(__file__).resolve().parent / "golden"
TEXT_LENGTH, TEXT_WIDTH = 12, 32


def tiny_config(
    rotary: bool = False, learned: bool = False, patch_size: Any = 2, lora: dict[str, Any] | None = None, **changes: Any
) -> dict[str, Any]:
    """Config node of a two-layer network of width 192; `changes` go into its params."""
    if rotary:
        positions = {"hidden_size_head": 64, "text_length": TEXT_LENGTH, "learnable_pos_embed": learned}
        kind = "Rotary3DPositionEmbeddingMixin"
    else:
        positions = {"text_length": TEXT_LENGTH, "height_interpolation": 1.875, "width_interpolation": 1.875}
        kind = "Basic3DPositionEmbeddingMixin"
    modules = {
        "pos_embed_config": {"target": f"dit_video_concat.{kind}", "params": positions},
        "patch_embed_config": {
            "target": "dit_video_concat.ImagePatchEmbeddingMixin",
            "params": {"text_hidden_size": TEXT_WIDTH},
        },
        "adaln_layer_config": {"target": "dit_video_concat.AdaLNMixin", "params": {"qk_ln": True}},
        "final_layer_config": {"target": "dit_video_concat.FinalLayerMixin"},
    }
    if lora is not None:
        lora = dict(lora)
        modules["lora_config"] = {
            "target": lora.pop("target", "sat.model.finetune.lora2.LoraMixin"),
            "params": lora,
        }
    params = {
        "time_embed_dim": 24,
        "elementwise_affine": True,
        "num_frames": 9,
        "time_compressed_rate": 4,
        "latent_width": 10,
        "latent_height": 6,
        "num_layers": 2,
        "patch_size": patch_size,
        "in_channels": 16,
        "out_channels": 16,
        "hidden_size": 192,
        "adm_in_channels": 256,
        "num_attention_heads": 3,
        "transformer_args": {
            "vocab_size": 1,
            "max_sequence_length": 64,
            "layernorm_order": "pre",
            "skip_init": False,
            "model_parallel_size": 1,
            "is_decoder": False,
        },
        "modules": modules,
    }
    return {"target": "dit_video_concat.DiffusionTransformer", "params": params | changes}


def tiny_network(**options: Any) -> torch.nn.Module:
    """The network of `tiny_config`, in eval mode."""
    from sgm.util import instantiate_from_config

    return instantiate_from_config(tiny_config(**options)).eval()


def tiny_state(lora: bool = False, rotary: bool = False) -> dict[str, torch.Tensor]:
    """The reference weights in float32; without position tables, which the network computes."""
    stored = load_file(GOLDEN / "dit_state.safetensors")
    kept = {}
    for name, value in stored.items():
        if ("matrix_" in name and not lora) or (name.startswith("transformer.position_embeddings") and not rotary):
            continue
        kept[name] = value.float()
    return kept


def load_tiny(network: torch.nn.Module, lora: bool = False, rotary: bool = False) -> torch.nn.Module:
    """Put the reference weights and the computed tables into `network`; every key must fit.

    Without `lora` an adapter keeps its initial values, and a learned position table always does.
    """
    from sgm.weights import assign_state

    computed = network.computed_state()
    kept = {n for n in network.state_dict() if "matrix_" in n and not lora}
    kept |= {"mixins.pos_embed.pos_embedding"} - computed.keys()
    state = computed | tiny_state(lora, rotary)
    assign_state(network, state, source="the reference weights", may_lack=kept)
    return network


def merged_state(state: Mapping[str, torch.Tensor], scale: float = 1.0, alpha: float = 1.0) -> dict[str, torch.Tensor]:
    """By definition: W + scale * scaling * concat_i(B_i A_i) for every adapted linear, under the base's plain names."""
    from sgm.modules.transformer.lora_state import collect_pairs, lora_delta, lora_scaling, split_lora

    base, lora = split_lora(state)
    for linear, (a, b) in collect_pairs(lora).items():
        weight = base[f"{linear}.weight"]
        delta = lora_delta(a, b, scale * lora_scaling(a[0].shape[0], alpha))
        base[f"{linear}.weight"] = (weight.float() + delta).to(weight.dtype)
    return base


def random_inputs(
    batch: int = 2, frames: int = 3, height: int = 6, width: int = 10, channels: int = 16, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Latents, timesteps and text embeddings for the tiny network."""
    draw = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(batch, frames, channels, height, width, generator=draw),
        "timesteps": torch.linspace(19, 999, batch).round(),
        "context": torch.randn(batch, TEXT_LENGTH, TEXT_WIDTH, generator=draw),
    }

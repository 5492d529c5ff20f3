"""Models for the benchmarks: ours from a YAML file and diffusers' of the same sizes, with random weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sgm.config import merge_yaml
from sgm.convert import dit_keys, dit_sizes, vae_keys
from sgm.models.small_decoder import facts_of
from sgm.modules.autoencoding.small_decoder import SmallDecoder, SmallDecoderSizes
from sgm.modules.encoders.t5 import T5Encoder
from sgm.modules.encoders.t5_config import T5Config
from sgm.places import found_path
from sgm.util import instantiate_from_config

TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def our_network(config: str, dtype: str, device: torch.device, lora_rank: int = 0) -> nn.Module:
    """The `network_config` of a YAML file, in eval mode; with an adapter where `lora_rank` is given."""
    node = copy.deepcopy(merge_yaml([config])["model"]["network_config"])
    if lora_rank:
        lora = {"target": "sat.model.finetune.lora2.LoraMixin", "params": {"r": lora_rank}}
        node["params"]["modules"]["lora_config"] = lora
    with torch.device("meta"):
        network = instantiate_from_config(node, dtype=dtype)
    fill_randomly(network.to_empty(device=device))
    with torch.no_grad():
        for name, value in network.computed_state().items():
            network.get_parameter(name).copy_(value)
    return network.eval().requires_grad_(False)


def our_trained_network(config: str, dtype: str, device: torch.device, rank: int) -> nn.Module:
    """`our_network` in training mode: all of it learns, or a LoRA adapter of `rank` > 0 on it."""
    network = our_network(config, dtype, device, rank).train()
    fixed = network.computed_state()
    for name, parameter in network.named_parameters():
        parameter.requires_grad_("matrix_" in name if rank else name not in fixed)
    return network


def text_encoder(dtype: str) -> nn.Module:
    """The encoder of T5 v1.1 XXL in host memory that is not pinned, all weights zero: for times only."""
    sizes = {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    with torch.device("meta"):
        encoder = T5Encoder(T5Config(**sizes, feed_forward_proj="gated-gelu"))
    encoder = encoder.to(TYPES[dtype]).to_empty(device="cpu").eval().requires_grad_(False)
    for weight in encoder.parameters():
        weight.zero_()
    return encoder


def our_first_stage(config: str, dtype: str, device: torch.device) -> nn.Module:
    """The `first_stage_config` of a YAML file."""
    node = copy.deepcopy(merge_yaml([config])["model"]["first_stage_config"])
    node["params"]["ckpt_path"] = None
    with torch.device("meta"):
        stage = instantiate_from_config(node)
    fill_randomly(stage.to(TYPES[dtype]).to_empty(device=device))
    return stage


def small_decoder(config: str, dtype: str, device: torch.device) -> SmallDecoder:
    """A small decoder of the sizes of the one that a YAML file names, or else of the default ones."""
    named = merge_yaml([config])["model"]["first_stage_config"]["params"].get("small_decoder")
    sizes = facts_of(Path(found_path(named))).sizes if named else SmallDecoderSizes()
    torch.manual_seed(0)
    with device:
        decoder = SmallDecoder(sizes)
    return decoder.to(TYPES[dtype]).eval().requires_grad_(False)


def fill_randomly(module: nn.Module, seed: int = 0) -> None:
    """Weights that keep activations near unit size: matrices and filters by fan-in, norms near 1, small biases."""
    generator = torch.Generator(device=next(module.parameters()).device).manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0.0, weight[0].numel() ** -0.5, generator=generator)
            elif name.endswith("weight"):
                weight.normal_(1.0, 0.1, generator=generator)
            else:
                # the modulation's factor on the norm is conv_y of the latent: near 1, as in a trained model
                weight.normal_(1.0 if name.endswith("conv_y.conv.bias") else 0.0, 0.1, generator=generator)


def latent_size(config: str) -> tuple[int, int]:
    """Configured height and width of the latents."""
    params = merge_yaml([config])["model"]["network_config"]["params"]
    return params["latent_height"], params["latent_width"]


def token_count(network: nn.Module, frames: int) -> int:
    """Text and video tokens of a clip of `frames` latent frames at the configured size."""
    grid = network.patch.grid(frames, network.latent_height, network.latent_width)
    return network.mixins.pos_embed.text_length + grid.tokens


def network_inputs(network: nn.Module, frames: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Random latents (2, t, c, h, w), timesteps (2,) and text embeddings (2, l, width): a guidance pair."""
    size = (2, frames, network.in_channels, network.latent_height, network.latent_width)
    text = (2, network.mixins.pos_embed.text_length, network.mixins.patch_embed.text_hidden_size)
    x = torch.randn(size, device=device, dtype=network.dtype)
    return x, torch.tensor([500, 500], device=device), torch.randn(text, device=device, dtype=network.dtype)


def diffusers_network(dtype: str, device: torch.device) -> nn.Module:
    """The 2B transformer of diffusers. ImportError where diffusers is not installed."""
    from diffusers import CogVideoXTransformer3DModel

    return _build_in(dtype, device, CogVideoXTransformer3DModel)


def diffusers_network_like(network: nn.Module, config: str) -> nn.Module:
    """diffusers' transformer of the sizes of a YAML file, with our network's weights. ImportError without diffusers."""
    from diffusers import CogVideoXTransformer3DModel

    params = merge_yaml([config])["model"]["network_config"]["params"]
    model = CogVideoXTransformer3DModel(**dit_sizes.hf_config(params))
    model.load_state_dict(dit_keys.sat_to_hf(network.state_dict()))
    model.norm_out.norm.eps = 1e-6  # as in SAT
    return model.eval().requires_grad_(False)


def diffusers_coder_like(stage: nn.Module, config: str, coder: str) -> nn.Module:
    """diffusers' VAE of the sizes that a YAML file gives the `coder` ("encoder", "decoder"), with our weights in it.

    The other half is random: diffusers' halves are of one size, ours need not be. ImportError without diffusers.
    """
    from diffusers import AutoencoderKLCogVideoX

    params = merge_yaml([config])["model"]["first_stage_config"]["params"][f"{coder}_config"]["params"]
    model = AutoencoderKLCogVideoX(**vae_keys.hf_config(params, scale_factor=1.0))
    ours = {n: t for n, t in vae_keys.sat_to_hf(stage.state_dict()).items() if n.startswith(f"{coder}.")}
    found = model.load_state_dict(ours, strict=False)
    if found.unexpected_keys or any(name.startswith(f"{coder}.") for name in found.missing_keys):
        raise ValueError(f"the {coder} of {config} is not diffusers': {found}")
    return model.eval().requires_grad_(False)


def diffusers_trained_network(dtype: str, device: torch.device, rank: int) -> nn.Module:
    """`diffusers_network` in training mode with gradient checkpointing; an adapter through peft where rank > 0."""
    model = diffusers_network(dtype, device).train()
    model.enable_gradient_checkpointing()
    if not rank:
        return model.requires_grad_(True)
    from peft import LoraConfig

    model.add_adapter(LoraConfig(r=rank, lora_alpha=1, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    return model.to(device, TYPES[dtype])


def _build_in(dtype: str, device: torch.device, build: Any) -> nn.Module:
    with torch.device(device):
        model = build()
    return model.to(TYPES[dtype]).eval().requires_grad_(False)

"""Models for the benchmarks: ours from a YAML file and diffusers' of the same sizes, with random weights."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sgm.config import merge_yaml
from sgm.convert import dit_keys, dit_sizes, vae_keys
from sgm.models.small_decoder import facts_of
from sgm.modules.autoencoding.small_decoder import SmallDecoder, SmallDecoderSizes
from sgm.modules.autoencoding.strides import STRIDES
from sgm.modules.diffusionmodules.image_condition import OFS, sampled_frames
from sgm.modules.encoders.t5 import T5Config, T5Encoder
from sgm.places import found_path
from sgm.util import instantiate_from_config


class Clip(NamedTuple):
    """Latent frames, rows and columns of a clip, as the network handles them."""

    frames: int
    height: int
    width: int

    @classmethod
    def of(cls, config: str, frames: int | None = None, size: Sequence[int] | None = None) -> Clip:
        """Of `frames` latent frames and (height, width) pixels; by default as the YAML file's model was trained."""
        with torch.device("meta"):
            network = instantiate_from_config(merge_yaml([config])["model"]["network_config"])
        rows, columns = STRIDES.latent_size(*size) if size else network.trained_size
        trained = sampled_frames(network.positions.grid.t, network.patch.t)
        return cls(frames or trained, rows, columns)


TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def our_network(config: str, dtype: str, device: torch.device, lora_rank: int = 0, frames: int = 1) -> nn.Module:
    """The `network_config` of a YAML file, in eval mode; with an adapter where `lora_rank` is given.

    A table of positions that ends before `frames` latent frames is made longer.
    """
    node = copy.deepcopy(merge_yaml([config])["model"]["network_config"])
    node["params"]["num_frames"] = max(node["params"]["num_frames"], STRIDES.pixel_frames(frames))
    if lora_rank:
        lora = {"target": "sat.model.finetune.lora2.LoraMixin", "params": {"r": lora_rank}}
        node["params"]["modules"]["lora_config"] = lora
    with torch.device("meta"):
        network = instantiate_from_config(node, dtype=dtype)
    fill_randomly(network.to_empty(device=device))
    with torch.no_grad():
        for name, value in network.computed_state().items():
            network.state_dict()[name].copy_(value)  # a parameter or a buffer
    return network.eval().requires_grad_(False)


def our_trained_network(config: str, dtype: str, device: torch.device, rank: int, frames: int = 1) -> nn.Module:
    """`our_network` in training mode: all of it learns, or a LoRA adapter of `rank` > 0 on it."""
    network = our_network(config, dtype, device, rank, frames).train()
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


def token_count(network: nn.Module, clip: Clip) -> int:
    """Text and video tokens of a clip."""
    return network.mixins.pos_embed.text_length + network.patch.grid(*clip).tokens


def network_inputs(network: nn.Module, clip: Clip, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Random latents (2, t, c, h, w), timesteps (2,) and text embeddings (2, l, width): a guidance pair."""
    size = (2, clip.frames, network.in_channels, clip.height, clip.width)
    text = (2, network.mixins.pos_embed.text_length, network.mixins.patch_embed.text_hidden_size)
    x = torch.randn(size, device=device, dtype=network.dtype)
    return x, torch.tensor([500, 500], device=device), torch.randn(text, device=device, dtype=network.dtype)


def diffusers_network_like(network: nn.Module, config: str) -> nn.Module:
    """diffusers' transformer of the sizes of a YAML file, with our network's weights. ImportError without diffusers."""
    return diffusers_network_of(network, merge_yaml([config])["model"]["network_config"]["params"])


def diffusers_network_of(network: nn.Module, params: dict[str, Any]) -> nn.Module:
    """diffusers' transformer with our network's weights, in float32; `params` are of its `network_config`."""
    from diffusers import CogVideoXTransformer3DModel

    model = CogVideoXTransformer3DModel(**dit_sizes.sizes_of_params(params).hf_config())
    model.load_state_dict(dit_keys.sat_to_hf(network.state_dict()))
    model.norm_out.norm.eps = 1e-6  # as in SAT
    return model.eval().requires_grad_(False)


def diffusers_inputs(network: nn.Module, clip: Clip, inputs: tuple[Tensor, ...]) -> dict[str, Any]:
    """`network_inputs` as diffusers' transformer of this kind takes them, with rotations and ofs where it has them."""
    x, steps, text = inputs
    given = {"hidden_states": x, "encoder_hidden_states": text, "timestep": steps, "return_dict": False}
    table = network.positions.rotary(network.patch.grid(*clip), x)
    given |= {} if table is None else {"image_rotary_emb": (table.cos, table.sin)}
    return given if network.ofs_embed_dim is None else given | {"ofs": torch.full((1,), OFS).to(x)}


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


def diffusers_trained_network(config: str, dtype: str, device: torch.device, rank: int) -> nn.Module:
    """diffusers' transformer of a YAML file's sizes, in training mode with gradient checkpointing; an adapter through
    peft where rank > 0. ImportError without diffusers."""
    from diffusers import CogVideoXTransformer3DModel

    params = merge_yaml([config])["model"]["network_config"]["params"]
    with device:
        model = CogVideoXTransformer3DModel(**dit_sizes.sizes_of_params(params).hf_config())
    model = model.to(TYPES[dtype]).requires_grad_(not rank).train()
    model.enable_gradient_checkpointing()
    if not rank:
        return model
    from peft import LoraConfig

    model.add_adapter(LoraConfig(r=rank, lora_alpha=1, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    return model.to(device, TYPES[dtype])

"""The YAML file that runs a converted release: the shipped one of its kind with this network, schedule and paths."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sgm.config import merge_yaml
from sgm.convert.dit_sizes import Sizes
from sgm.modules.autoencoding.strides import STRIDES
from sgm.modules.diffusionmodules.image_condition import sampled_frames
from sgm.places import CONFIGS


def run_file(
    release: Path, sizes: Sizes, vae_params: Mapping[str, Any], factor: float, shift_scale: float, dtype: torch.dtype
) -> str:
    """Text of a YAML file for `sample_video.py`.

    Args:
        release: folder that the converter writes; the paths in the file are absolute.
        vae_params: `params` of the first stage's encoder and decoder.
        factor: scale factor of latents.
        shift_scale: shift of the noise schedule.
        dtype: of the transformer's weights; the run has it, too.
    """
    from omegaconf import OmegaConf

    release = release.expanduser().absolute()
    content = merge_yaml([CONFIGS / f"{sizes.nearest.config}_infer.yaml"])
    args, model = content["args"], content["model"]
    args |= {"load": str(release / "transformer"), "fp16": dtype == torch.float16, "bf16": dtype == torch.bfloat16}
    frames = sampled_frames(STRIDES.latent_frames(sizes.frames), sizes.patch[0])
    args |= {"sampling_num_frames": frames, "latent_channels": sizes.out_channels}
    args["input_file"] = str(CONFIGS / "test.txt")
    args |= {"image2video": True} if sizes.takes_image else {}
    if not sizes.is_published:
        args.pop("sampling_image_size", None)
    model["scale_factor"] = factor
    network, given = model["network_config"]["params"], sizes.sat_params()
    given["modules"] = network["modules"] | given["modules"]
    model["network_config"]["params"] = {n: v for n, v in network.items() if n != "ofs_embed_dim"} | given
    stage = model["first_stage_config"]["params"]
    stage["ckpt_path"] = str(release / "vae" / "3d-vae.pt")
    for part in ("encoder_config", "decoder_config"):
        stage[part]["params"] |= vae_params
    embedder = model["conditioner_config"]["params"]["emb_models"][0]["params"]
    embedder |= {"model_dir": str(release / "t5-v1_1-xxl"), "max_length": sizes.text_length}
    sigma_sampler = model["loss_fn_config"]["params"]["sigma_sampler_config"]
    for node in (model["denoiser_config"], sigma_sampler, model["sampler_config"]):
        node["params"]["discretization_config"]["params"] = {"shift_scale": shift_scale}
    return f"# {sizes.name}, written by tools/convert_weight_hf2sat.py\n" + OmegaConf.to_yaml(OmegaConf.create(content))

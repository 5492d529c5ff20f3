"""Do a SAT release and its converted diffusers folder give the same numbers? Compares transformer and VAE, one by one.

python tools/compare_diffusers.py infer.yaml --hf HF_FOLDER --device cuda    # with the adapters of args.lora
python tools/compare_diffusers.py infer.yaml --hf HF_FOLDER --lora SAT_LORA --hf_lora FOLDER    # with the adapter
Needs diffusers (tests/requirements.txt), for adapters peft. Both run in float32 on the same random inputs.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from sgm.convert.dit_sizes import Sizes, sizes_of_params
from sgm.modules.autoencoding.strides import STRIDES
from sgm.modules.diffusionmodules.image_condition import OFS, sampled_frames

TRANSFORMER, VAE = 5e-6, 5e-5  # largest differences that are rounding, for values of standard deviation 1


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("config", type=Path, help="YAML with the SAT model's section, paths filled in")
    add("--hf", type=Path, required=True, help="converted pipeline folder")
    add("--load", help="transformer weights, in place of args.load")
    add("--lora", help="SAT adapter to attach, in place of args.lora")
    add("--hf_lora", type=Path, help="the same adapter, exported")
    add("--device", default="cpu")
    add("--frames", type=int, help="latent frames (default: the network's; 1.5 takes even numbers)")
    add("--tolerance", type=float, default=1.0, help="factor on the allowed differences (5e-6, VAE 5e-5)")
    add("--allow-target", action="append", default=[], metavar="PREFIX", help="see sample_video.py")
    options = parser.parse_args(arguments)
    if (options.lora is None) != (options.hf_lora is None):
        parser.error("--lora and --hf_lora go together")
    return options


@torch.no_grad()
def transformer_outputs(options: argparse.Namespace, config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """(ours, theirs) on the CPU; only one network is on the device at a time."""
    from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel

    from sgm.inference.adapters import read_adapter
    from sgm.models.loading import Adapter, load_network
    from sgm.places import found_path
    from sgm.util import instantiate_from_config

    device = torch.device(options.device)
    node = config["model"]["network_config"]
    with torch.device("meta"):
        network = instantiate_from_config(node, dtype="fp32", defer_lora=True).eval()
    named = [options.lora] if options.lora else config.get("args", {}).get("lora") or []
    adapters = [Adapter.parse(text) for text in named]
    load = found_path(options.load or config["args"]["load"])
    load_network(
        network, load, device=device, dtype=torch.float32, allow_absent=True, adapters=adapters, read=read_adapter
    )
    inputs = _inputs(node["params"], options.frames)
    placed = {name: value.to(device) for name, value in inputs.items()}
    ofs = {"ofs": torch.tensor([OFS], device=device)} if network.ofs_embed_dim else {}
    ours = network(**placed).cpu()
    frames, height, width = (inputs["x"].shape[k] for k in (1, 3, 4))
    rotary = network.mixins.pos_embed.rotary(network.patch.grid(frames, height, width), placed["x"])
    del network
    model = CogVideoXTransformer3DModel.from_pretrained(options.hf / "transformer", torch_dtype=torch.float32)
    model = model.to(device).eval()
    model.norm_out.norm.eps = 1e-6
    if options.hf_lora:
        state, metadata = CogVideoXPipeline.lora_state_dict(options.hf_lora, return_lora_metadata=True)
        CogVideoXPipeline.load_lora_into_transformer(state, model, metadata=metadata)
    theirs = model(
        placed["x"], placed["context"], placed["timesteps"], image_rotary_emb=tuple(rotary) if rotary else None,
        return_dict=False, **ofs,
    )[0].cpu()  # fmt: skip
    return ours, theirs


def _inputs(params: Mapping[str, Any], frames: int | None) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    length = params["modules"]["pos_embed_config"]["params"]["text_length"]
    width = params["modules"]["patch_embed_config"]["params"]["text_hidden_size"]
    sizes = sizes_of_params(params)
    frames = frames or sampled_frames(STRIDES.latent_frames(sizes.frames), sizes.patch[0])
    size = (1, frames, sizes.in_channels, *_latent_size(sizes))
    return {
        "x": torch.randn(size, generator=draw),
        "timesteps": torch.tensor([499.0]),
        "context": torch.randn(1, length, width, generator=draw) * 0.3,
    }


def _latent_size(sizes: Sizes) -> tuple[int, int]:
    """Height and width of the latents that the model was trained at; the positions of 1.5 are made for larger ones."""
    return STRIDES.latent_size(*sizes.nearest.size) if sizes.is_published else (sizes.height, sizes.width_latent)


@torch.no_grad()
def vae_outputs(options: argparse.Namespace, config: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """(ours, theirs) of a short clip's moments and of 3 decoded latent frames, an eighth of the picture's area."""
    from diffusers import AutoencoderKLCogVideoX

    from sgm.places import found_path
    from sgm.util import instantiate_from_config

    device = torch.device(options.device)
    sizes = sizes_of_params(config["model"]["network_config"]["params"])
    height, width = (max(4, side // 3) for side in _latent_size(sizes))
    draw = torch.Generator().manual_seed(1)
    z = torch.randn(1, 16, 3, height, width, generator=draw).to(device)
    x = torch.rand(1, 3, STRIDES.pixel_frames(3), *STRIDES.pixel_size(height, width), generator=draw).to(device) * 2 - 1
    stage = copy.deepcopy(config["model"]["first_stage_config"])
    stage["params"]["ckpt_path"] = found_path(stage["params"]["ckpt_path"])
    ours = instantiate_from_config(stage).to(device).eval()
    mine = ours.moments(x).cpu(), ours.decode(z).cpu()
    del ours
    other = AutoencoderKLCogVideoX.from_pretrained(options.hf / "vae", torch_dtype=torch.float32).to(device).eval()
    theirs = other.encode(x).latent_dist.parameters.cpu(), other.decode(z).sample.cpu()
    return {"VAE encoder": (mine[0], theirs[0]), "VAE decoder": (mine[1], theirs[1])}


def run(options: argparse.Namespace) -> int:
    from sgm.config import merge_yaml
    from sgm.util import allow_target

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for prefix in options.allow_target:
        allow_target(prefix)
    config = merge_yaml([options.config])
    same = _agree("transformer", *transformer_outputs(options, config), options.tolerance * TRANSFORMER)
    if not (options.hf / "vae").is_dir():  # converted with --partial
        print(f"VAE: none in {options.hf}, not compared")
        outputs = {}
    else:
        outputs = vae_outputs(options, config)
    for name, (ours, theirs) in outputs.items():
        same &= _agree(name, ours, theirs, options.tolerance * VAE)
    rounded = "different; weights that convert_weight_sat2hf.py has rounded are: --fp32 keeps them"
    print("the same numbers" if same else rounded)
    return 0 if same else 1


def _agree(name: str, ours: Tensor, theirs: Tensor, tolerance: float) -> bool:
    spread, apart = ours.std().item(), (ours - theirs).abs().max().item()
    allowed = tolerance * max(1.0, spread)
    print(f"{name}: {tuple(ours.shape)}, std {spread:.3f}, largest difference {apart:.2e} (allowed {allowed:.2e})",
          flush=True)  # fmt: skip
    return apart <= allowed


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    from sgm.cli import exit_code

    return exit_code(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

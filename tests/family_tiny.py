"""Tiny models of the family: those of the reference set with the original's weights, and random ones of all kinds."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from sgm.models.diffusion import SATVideoDiffusionEngine
from sgm.weights import assign_state
from sgm.weights.release import NETWORK_PREFIX
from tests import training_tiny

# Of each case its configuration, and its network in the set.
KINDS = {"t2v_5b": ("5b", "5b"), "i2v_5b": ("5b_i2v", "5b_i2v"), "t2v_15": ("15", "15"), "i2v_15": ("15_i2v", "15_i2v")}


def model_of(folder: Path, case: str) -> dict[str, Any]:
    """The `model:` section of a case."""
    return yaml.safe_load((folder / f"tiny_{KINDS[case][0]}.yaml").read_text(encoding="utf-8"))["model"]


def engine_of(folder: Path, case: str, **changes: Any) -> SATVideoDiffusionEngine:
    """The engine of a case in float32, with its weights and without a conditioner; `changes` are keys of `model:`."""
    engine = SATVideoDiffusionEngine(**model_of(folder, case) | changes).eval()
    engine.sampler.verbose = False
    assign_state(engine.network, network_state(folder, KINDS[case][1]), source=str(folder))
    vae = {name: value.float() for name, value in load_file(folder / "vae_fp16.safetensors").items()}
    assign_state(engine.first_stage, vae, source=str(folder))
    return engine


def network_state(folder: Path, kind: str) -> dict[str, Tensor]:
    """A network of the set in float32, under the network's own names."""
    prefix = f"{kind}/{NETWORK_PREFIX}"
    with safe_open(folder / "networks_fp16.safetensors", "pt") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118  # it is no mapping
        return {name.removeprefix(prefix): file.get_tensor(name).float() for name in names}


def cases_of(folder: Path, case: str) -> dict[str, Tensor]:
    """The tensors of a case."""
    return load_file(folder / f"{case}.safetensors")


def facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "facts.json").read_text(encoding="utf-8"))


def replay(noise: Tensor) -> Callable[[Tensor], Tensor]:
    """A `noise_sampler` that gives recorded draws one after the other."""
    draws: Iterator[Tensor] = iter(noise)
    return lambda x: next(draws).to(x)


def text(cases: dict[str, Tensor], name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Conditions of a run and the zeros that it is steered away from."""
    crossattn = cases[f"{name}.crossattn"]
    return {"crossattn": crossattn}, {"crossattn": torch.zeros_like(crossattn)}


# --- random ones, with files ------------------------------------------------------------------------------------------

# Of each kind what differs from the tiny 2B model of the training tests: parameters of the network, keys of the engine.
_ROTARY = {"target": "dit_video_concat.Rotary3DPositionEmbeddingMixin",
           "params": {"hidden_size_head": 32, "text_length": 12}}  # fmt: skip
_IMAGE = {"noised_image_input": True, "noised_image_dropout": 0.05}
_LONG = {"patch_size": [2, 2, 2], "latent_height": 6, "latent_width": 8}
FAMILY: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "2b": ({}, {}, False),
    "5b": ({}, {}, False),
    "5b_i2v": ({"in_channels": 32}, _IMAGE, True),
    "1.5_5b": (_LONG, {}, False),
    "1.5_5b_i2v": (_LONG | {"in_channels": 32, "ofs_embed_dim": 32}, _IMAGE, False),
}


def kind_section(release: Path, kind: str) -> dict[str, Any]:
    """The `model:` section of a tiny model of a kind, for weights in `release`."""
    model = copy.deepcopy(training_tiny.model_section(release))
    network, engine, learned = FAMILY[kind]
    params = model["network_config"]["params"]
    params |= network
    if kind != "2b":
        params["modules"]["pos_embed_config"] = copy.deepcopy(_ROTARY)
        params["modules"]["pos_embed_config"]["params"] |= {"learnable_pos_embed": True} if learned else {}
        model["scale_factor"] = 0.7
        sampling = model["loss_fn_config"]["params"]["sigma_sampler_config"]
        for node in (model["denoiser_config"], sampling, model["sampler_config"]):
            node["params"]["discretization_config"] = {"target": training_tiny.DISCRETIZATION["target"]}
    return model | engine


def write_kind(release: Path, kind: str) -> dict[str, Any]:
    """Its weights in the release's layout; gives its `model:` section."""
    model = kind_section(release, kind)
    training_tiny.write_release(release, model["network_config"])
    return model


def write_short(section: dict[str, Any], folder: Path, **args: Any) -> Path:
    """`folder`/c.yaml: sampling with a section of `write_kind`, whose network gets positions for 9 frames of 16x32."""
    model = copy.deepcopy(section)
    model["network_config"]["params"]["num_frames"] = 9
    release = Path(model["first_stage_config"]["params"]["ckpt_path"]).parents[1]
    given = {
        "load": str(release / "transformer"), "force_inference": True, "device": "cpu",
        "sampling_image_size": [16, 32], "output_dir": str(folder / "out"), **args,
    }  # fmt: skip
    return training_tiny.write_yaml(folder / "c.yaml", {"args": given, "model": model})

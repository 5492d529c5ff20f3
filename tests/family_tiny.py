"""The four tiny models of the family's reference set: their engines, with the original's weights, and their cases."""

from __future__ import annotations

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

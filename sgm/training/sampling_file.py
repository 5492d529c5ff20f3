"""The configuration that samples from a finished run: `infer.yaml` in the run's folder."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from sgm.cache.identity import starts_from_picture
from sgm.config import RunConfig
from sgm.files import write_text
from sgm.modules.autoencoding.strides import STRIDES
from sgm.modules.diffusionmodules.image_condition import sampled_frames
from sgm.modules.transformer.patch_embed import PatchSize
from sgm.places import CONFIGS, INSTALLED, PROJECT, shown
from sgm.training.options import TrainArgs, trains_adapter
from sgm.util import allowed_packages
from sgm.weights.preflight import with_paths

FILE = "infer.yaml"


def write_sampling_file(folder: Path, config: RunConfig[TrainArgs], dtype: str) -> str | None:
    """Write the file; returns the command that samples with it, None where the model section has no sampler.

    Raises:
        SaveError: it cannot be written.
    """
    from omegaconf import OmegaConf

    args, data = config.args, (config.data or {}).get("params") or {}
    adapter_alone = args.lora_only and trains_adapter(config.model)
    if "sampler_config" not in config.model or (adapter_alone and not args.load):
        return None
    run = str(folder.absolute())
    network = config.model["network_config"]["params"]
    frames = STRIDES.latent_frames(network["num_frames"])
    sampled = sampled_frames(frames - (frames + 1) % 2, PatchSize.parse(network["patch_size"]).t)
    sampling: dict[str, Any] = {
        "mode": "inference", "load": str(Path(args.load or "").absolute()) if adapter_alone else run,
        "lora": [run] if adapter_alone else [], "fp16": dtype == "fp16", "bf16": dtype == "bf16",
        "force_inference": args.force_train, "input_file": str(CONFIGS / "test.txt"),
        "sampling_num_frames": sampled, "sampling_fps": max(1, round(data.get("fps", 8))),
        "sampling_image_size": data.get("video_size"),
    }  # fmt: skip
    model = with_paths(config.model, lambda path: str(Path(path).absolute()) if Path(path).exists() else path)
    write_text(folder / FILE, OmegaConf.to_yaml(OmegaConf.create({"args": sampling, "model": model})))
    program = ["cogvideox-sat", "sample"] if INSTALLED else ["bash", shown(PROJECT / "inference.sh")]
    picture = "@@picture.png" if starts_from_picture(config.model) else ""
    allowed = [word for package in allowed_packages() for word in ("--allow-target", package)]
    prompt = f"a caption like those of the clips{picture}"
    return shlex.join([*program, shown(folder / FILE), *allowed, "--prompt", prompt])

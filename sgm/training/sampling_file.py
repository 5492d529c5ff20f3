"""The configuration that samples from a finished run: `infer.yaml` in the run's folder."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from sgm.config import RunConfig
from sgm.files import write_text
from sgm.modules.autoencoding.strides import STRIDES
from sgm.places import CONFIGS, INSTALLED, PROJECT, shown
from sgm.training.options import TrainArgs, trains_lora
from sgm.weights.preflight import with_paths

FILE = "infer.yaml"


def write_sampling_file(folder: Path, config: RunConfig[TrainArgs], dtype: str) -> str | None:
    """Write the file; returns the command that samples with it, None where the model section has no sampler.

    Raises:
        SaveError: it cannot be written.
    """
    from omegaconf import OmegaConf

    args, data = config.args, (config.data or {}).get("params") or {}
    adapter_alone = args.lora_only and trains_lora(config.model)
    if "sampler_config" not in config.model or (adapter_alone and not args.load):
        return None
    run = str(folder.absolute())
    frames = STRIDES.latent_frames(config.model["network_config"]["params"]["num_frames"])
    sampling: dict[str, Any] = {
        "mode": "inference", "load": str(Path(args.load or "").absolute()) if adapter_alone else run,
        "lora": [run] if adapter_alone else [], "fp16": dtype == "fp16", "bf16": dtype == "bf16",
        "force_inference": args.force_train, "input_file": str(CONFIGS / "test.txt"),
        "sampling_num_frames": frames - (frames + 1) % 2, "sampling_fps": max(1, round(data.get("fps", 8))),
        "sampling_image_size": data.get("video_size"),
    }  # fmt: skip
    model = with_paths(config.model, lambda path: str(Path(path).absolute()) if Path(path).exists() else path)
    write_text(folder / FILE, OmegaConf.to_yaml(OmegaConf.create({"args": sampling, "model": model})))
    program = ["cogvideox-sat", "sample"] if INSTALLED else ["bash", shown(PROJECT / "inference.sh")]
    return shlex.join([*program, shown(folder / FILE), "--prompt", "a caption like those of the clips"])

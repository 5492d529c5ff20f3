"""What a sampling run needs before anything heavy: its configuration checked, and the device that it runs on."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch

from sgm.config import ConfigError, RunConfig, check_model_section
from sgm.distributed import DistInfo, init_distributed
from sgm.inference.adapters import with_adapters, with_fetched
from sgm.inference.options import SampleArgs
from sgm.weights.preflight import check_paths, with_found_paths


def checked(config: RunConfig[SampleArgs], *, paths: bool = True) -> RunConfig[SampleArgs]:
    """`config` with its model section checked and its weights found.

    Args:
        paths: demand that they are there.
    Raises:
        ConfigError: listing every problem.
    """
    from sgm.models.diffusion import SATVideoDiffusionEngine

    config = replace(config, model=check_model_section(config.model, SATVideoDiffusionEngine))
    config = with_found_paths(config)
    config = with_adapters(with_fetched(config) if paths else config)
    args, model = config.args, config.model
    small = args.decoder == "small"
    if paths and args.decode_latents:  # by the first stage alone
        check_paths({"first_stage_config": model.get("first_stage_config")}, None, small_decoder=small)
    elif paths:
        check_paths(model, args.load, args.lora, small_decoder=small)
    return config


def for_inference(model: dict[str, Any]) -> dict[str, Any]:
    """The model section with what the original's sampling script sets: no loss, no activation checkpoints, one rank."""
    model = {k: v for k, v in model.items() if k != "loss_fn_config"}
    network = dict(model["network_config"])
    params = dict(network.get("params") or {})
    transformer = dict(params.get("transformer_args") or {})
    params["transformer_args"] = transformer | {"checkpoint_activations": False, "model_parallel_size": 1}
    return model | {"network_config": network | {"params": params | {"defer_lora": True}}}


def join_processes(wanted: str | None) -> tuple[DistInfo, torch.device]:
    """This process's place among those of the run, and its device, made the current one, for `args.device`.

    Raises:
        ConfigError: there is no such device here.
    """
    device = None if wanted is None else _parse_device(wanted)
    info = init_distributed(device.type if device else None)
    if device is None or device.type == "cpu" or device.index is None:
        return info, info.device
    if device.index >= torch.cuda.device_count():
        raise ConfigError(f"args.device is {wanted!r}, but this machine shows {torch.cuda.device_count()} GPU(s).")
    torch.cuda.set_device(device)
    return info, device


def without_fp16_on_cpu(config: RunConfig[SampleArgs], device: torch.device) -> RunConfig[SampleArgs]:
    """On a CPU float16 is tens of times slower than float32, and some operations lack it."""
    if device.type != "cpu" or not config.args.fp16:
        return config
    note = "args.fp16: a CPU has no use for float16; this run computes in float32"
    return replace(config, args=replace(config.args, fp16=False), notes=(*config.notes, note))


def _parse_device(name: str) -> torch.device:
    unknown = ConfigError(f"args.device is {name!r}; choose cpu, cuda or cuda:N.")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise unknown from error
    if device.type not in ("cpu", "cuda"):
        raise unknown
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"args.device is {name!r}, but PyTorch sees no GPU; use --device cpu.")
    if device.type == "cuda" and device.index is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(f"args.device is {name!r}, but each of several processes takes its own GPU: use cuda.")
    return device

"""One process of a sampling run: check, place itself among the processes, build, go through the prompts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sgm.config import ConfigError, RunConfig, check_model_section
from sgm.distributed import DistInfo, init_distributed, own_rank, shutdown
from sgm.inference.adapters import with_adapters
from sgm.inference.fit import SamplingError
from sgm.inference.generation import out_of_memory_advice
from sgm.inference.options import SampleArgs
from sgm.inference.pipeline import Pipeline
from sgm.inference.plan import report
from sgm.inference.progress import Progress
from sgm.inference.prompts import gather, listed
from sgm.inference.runner import Runner
from sgm.inference.writer import find_latents
from sgm.models.autoencoder import VideoAutoencoderInferenceWrapper
from sgm.modules.diffusionmodules.guiders import IdentityGuider
from sgm.modules.encoders.modules import text_is_local
from sgm.parallel.team import Layout, choose_layout, form_team
from sgm.weights.preflight import check_paths, with_found_paths


def sample(config: RunConfig[SampleArgs], check: Callable[[], None], *, dry_run: bool = False) -> int:
    """Run `config` in this process; returns the exit status. `check` is called at every sampling step, and may raise.

    Raises:
        ValueError subclasses of this package: bad configuration, weights, prompts or output, each with its remedy.
    """
    from sgm.models.diffusion import SATVideoDiffusionEngine

    config = replace(config, model=check_model_section(config.model, SATVideoDiffusionEngine))
    config = with_adapters(with_found_paths(config))
    if not dry_run:
        check_paths(*_paths_to_check(config), small_decoder=config.args.decoder == "small")
    info = init_distributed(_device_type(config.args.device, several=int(os.environ.get("WORLD_SIZE", "1")) > 1))
    try:
        device = _rank_device(config.args.device, info)
        config = _without_fp16_on_cpu(config, device)
        progress = Progress(info.rank == 0, device, check)
        for note in config.notes:
            progress.line(f"note: {note}")
        if dry_run:
            _print_plan(config, progress, info.rank)
            return 0
        pipeline = Pipeline(config, device, with_text_encoder=config.args.decode_latents is None)
        _say_all(pipeline.notes, progress)
        layout = _layout(config, pipeline, info.world_size)
        if layout.clip > 1:
            progress.line(f"note: {layout}")
        pipeline.join(form_team(layout))
        _run(Runner(config, pipeline, progress))  # teams do not wait for one another
    finally:
        shutdown()
    return 0


def _layout(config: RunConfig[SampleArgs], pipeline: Pipeline, world: int) -> Layout:
    """How the processes divide what is asked for."""
    args = config.args
    stage = pipeline.engine.first_stage_model
    together = stage.cp_size if isinstance(stage, VideoAutoencoderInferenceWrapper) else 1
    asked = args.cfg_parallel or args.sequence_parallel_size or together > 1
    if world == 1 and not asked:
        return Layout()
    if args.decode_latents:
        clips = len(find_latents(Path(args.decode_latents)))
    elif args.input_type == "cli" and not args.prompts:
        clips = world
    else:
        clips = len(listed(args.prompts, args.input_file, config.files)[0])
    if not asked and pipeline.shortcuts is not None and pipeline.shortcuts.measures:
        return Layout(world)  # what is measured must not differ between processes that wait for each other
    guided = not args.decode_latents and not isinstance(pipeline.engine.sampler.guider, IdentityGuider)
    asked_for = args.cfg_parallel, args.sequence_parallel_size
    return choose_layout(world, clips, guided, *asked_for, together)


def _without_fp16_on_cpu(config: RunConfig[SampleArgs], device: torch.device) -> RunConfig[SampleArgs]:
    """On a CPU float16 is tens of times slower than float32, and some operations lack it."""
    if device.type != "cpu" or not config.args.fp16:
        return config
    note = "args.fp16: a CPU has no use for float16; this run computes in float32"
    return replace(config, args=replace(config.args, fp16=False), notes=(*config.notes, note))


def _paths_to_check(config: RunConfig[SampleArgs]) -> tuple[dict[str, Any], str | None, list[str]]:
    """Of a configuration what this run reads: parts of the model section, transformer, adapters."""
    if not config.args.decode_latents:
        return config.model, config.args.load, config.args.lora
    return {"first_stage_config": config.model.get("first_stage_config")}, None, []


def _run(runner: Runner) -> None:
    try:
        runner.run()
    except torch.OutOfMemoryError as error:
        raise SamplingError(out_of_memory_advice(runner.args)) from error


def _say_all(lines: Iterable[str], progress: Progress) -> None:
    for line in lines:
        progress.line(line)


def _print_plan(config: RunConfig[SampleArgs], progress: Progress, rank: int) -> None:
    args = config.args
    # On all ranks: it makes process groups.
    pipeline = Pipeline(config, progress.device, with_text_encoder=text_is_local(config.model))
    asks = args.decode_latents or (args.input_type == "cli" and not args.prompts)
    prompts = [] if asks else gather(args.prompts, args.input_file, config.files, pipeline.visual.pictures)[0]
    remarks = [] if args.decode_latents else pipeline.remarks(prompts)
    _say_all([*pipeline.notes, *(f"warning: {line}" for line in remarks)], progress)
    layout = _layout(config, pipeline, own_rank()[1])
    if layout.world > 1:
        progress.line(f"note: {layout}")
    if rank == 0:
        print(report(config, pipeline, prompts), flush=True)


def _device_type(device: str | None, several: bool) -> str | None:
    if device is None:
        return None
    kind = _parse_device(device).type
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"args.device is {device!r}; choose cpu, cuda or cuda:N.")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"args.device is {device!r}, but PyTorch sees no GPU; use --device cpu.")
    if several and kind == "cuda" and _parse_device(device).index is not None:
        raise ConfigError(f"args.device is {device!r}, but each of several processes takes its own GPU: use cuda.")
    return kind


def _parse_device(device: str) -> torch.device:
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"args.device is {device!r}; choose cpu, cuda or cuda:N.") from error


def _rank_device(wanted: str | None, info: DistInfo) -> torch.device:
    """The process's device, made the current one: kernels are launched on that."""
    device = _parse_device(wanted) if wanted is not None else info.device
    if device.type != "cuda" or device.index is None:
        return info.device
    if device.index >= torch.cuda.device_count():
        raise ConfigError(f"args.device is {wanted!r}, but this machine shows {torch.cuda.device_count()} GPU(s).")
    torch.cuda.set_device(device)
    return device

"""One process of a sampling run: check, place itself among the processes, build, go through the prompts."""

from __future__ import annotations

import sys

import torch

from sgm.config import ConfigError, RunConfig, check_model_section
from sgm.inference.options import SampleArgs
from sgm.inference.pipeline import SamplingError, TextToVideo
from sgm.inference.preflight import check_paths
from sgm.inference.progress import Progress
from sgm.inference.runner import Runner, describe, out_of_memory_advice


def sample(config: RunConfig[SampleArgs], *, dry_run: bool = False) -> int:
    """Run `config` in this process; returns the exit status.

    Raises:
        ValueError subclasses of this package: bad configuration, weights, prompts or output, each with its remedy.
    """
    from sgm.distributed import init_distributed, shutdown
    from sgm.models.diffusion import SATVideoDiffusionEngine

    check_model_section(config.model, SATVideoDiffusionEngine)
    if not dry_run:
        _ensure_demo(config)
        check_paths(config.model, config.args.load)
    info = init_distributed(_device_type(config.args.device))
    try:
        device = torch.device(config.args.device) if _names_one_gpu(config.args.device) else info.device
        progress = Progress(info.rank == 0, device)
        for note in config.notes:
            progress.line(f"note: {note}")
        pipeline = TextToVideo(config, device)
        if dry_run:
            _print_plan(config, pipeline, info.rank)
            return 0
        _run(Runner(config, pipeline, progress, info.rank, info.world_size))
        if info.world_size > 1:
            torch.distributed.barrier()
    finally:
        shutdown()
    return 0


def _run(runner: Runner) -> None:
    try:
        runner.run()
    except torch.OutOfMemoryError as error:
        raise SamplingError(out_of_memory_advice(runner.args.placement, runner.args.batch_size)) from error


def _print_plan(config: RunConfig[SampleArgs], pipeline: TextToVideo, rank: int) -> None:
    if rank == 0:
        print(config.as_yaml())
        print(describe(config, pipeline), file=sys.stdout, flush=True)


def _device_type(device: str | None) -> str | None:
    if device is None:
        return None
    kind = torch.device(_normal(device)).type
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"args.device is {device!r}; choose cpu, cuda or cuda:N.")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"args.device is {device!r}, but PyTorch sees no GPU; use --device cpu.")
    return kind


def _normal(device: str) -> str:
    try:
        torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"args.device is {device!r}; choose cpu, cuda or cuda:N.") from error
    return device


def _names_one_gpu(device: str | None) -> bool:
    return device is not None and ":" in device


def _ensure_demo(config: RunConfig[SampleArgs]) -> None:
    """The demo configuration has no trained weights yet: make random ones at first use, and say so."""
    from sgm.weights.random_release import DEMO_FOLDER, ensure_demo_weights

    if config.args.load and config.args.load.startswith(DEMO_FOLDER):
        ensure_demo_weights(config.model)

"""One process of a sampling run: check, place itself among the processes, build, go through the prompts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sgm.config import ConfigError, RunConfig
from sgm.distributed import DistInfo, own_rank, shutdown
from sgm.inference.generation import Generation
from sgm.inference.grid import Axis, comparison_of, count_of, make_grid
from sgm.inference.model import TextToVideo
from sgm.inference.options import SampleArgs
from sgm.inference.pipeline import Pipeline
from sgm.inference.plan import report
from sgm.inference.progress import Progress
from sgm.inference.prompts import gather, listed
from sgm.inference.runner import Runner
from sgm.inference.setup import checked, join_processes, without_fp16_on_cpu
from sgm.inference.writer import find_latents
from sgm.models.autoencoder import VideoAutoencoderInferenceWrapper
from sgm.modules.diffusionmodules.guiders import IdentityGuider
from sgm.modules.encoders.modules import text_is_local
from sgm.parallel.apply import most_shares
from sgm.parallel.team import Layout, choose_layout, form_team


def sample(
    config: RunConfig[SampleArgs], check: Callable[[], None], *, dry_run: bool = False, grid: Sequence[str] = ()
) -> int:
    """Run `config` in this process; returns the exit status. `check` is called at every sampling step, and may raise.

    Args:
        grid: axes of a comparison, which is made in place of the prompts' clips.
    Raises:
        ValueError subclasses of this package: bad configuration, weights, prompts or output, each with its remedy.
    """
    config = checked(config, paths=not dry_run)
    info, device = join_processes(config.args.device)
    config = without_fp16_on_cpu(config, device)
    _sample(config, Progress(info.rank == 0, device, check), info, dry_run, grid)
    shutdown()  # not after an error: the other ranks may wait for this one, and NCCL would wait for them
    return 0


def _sample(
    config: RunConfig[SampleArgs], progress: Progress, info: DistInfo, dry_run: bool, grid: Sequence[str]
) -> None:
    for note in config.notes:
        progress.line(f"note: {note}")
    config, axes = comparison_of(grid, config) if grid else (config, [])
    if dry_run:
        _print_plan(config, progress, info.rank)
        if axes and info.rank == 0:
            print(f"# grid: {count_of(axes)} clips", flush=True)
        return
    model = TextToVideo(config, progress.device, with_text_encoder=config.args.decode_latents is None)
    if axes:
        _compare(model, axes, progress, info.world_size)
        return
    layout = layout_of(config, model.pipeline, info.world_size)
    if layout.clip > 1:
        progress.line(f"note: {layout}")
    model.pipeline.join(form_team(layout))
    with model.generation(config, progress) as generation:
        Runner(generation).run()  # teams do not wait for one another


def _compare(model: TextToVideo, axes: Sequence[Axis], progress: Progress, world: int) -> None:
    if world > 1:
        raise ConfigError("--grid is made by one process; start it without NPROC (--nproc).")
    model.shown, told = True, set[str]()

    def tell(message: Warning | str, *_: Any, **__: Any) -> None:
        if (text := str(message)) not in told:
            progress.warn(text)
        told.add(text)

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = tell
        progress.line(f"  {make_grid(model, axes, progress.check, progress.line)}")


def layout_of(config: RunConfig[SampleArgs], pipeline: Pipeline, world: int) -> Layout:
    """How the processes divide what is asked for."""
    args = config.args
    stage = pipeline.engine.first_stage_model
    together = stage.cp_size if isinstance(stage, VideoAutoencoderInferenceWrapper) else 1
    asked = args.cfg_parallel or max(args.sequence_parallel_size or 1, together) > 1
    if world == 1 and not asked:
        return Layout()
    if args.decode_latents:
        clips = len(find_latents(Path(args.decode_latents)))
    elif args.input_type == "cli" and not args.prompts:
        clips = world
    else:
        clips = len(listed(args.prompts, args.input_file, config.files)[0])
    if not asked and config.accelerate.reuse_error:
        return Layout(world)  # what is measured must not differ between processes that wait for each other
    guided = not args.decode_latents and not isinstance(pipeline.engine.sampler.guider, IdentityGuider)
    asked_for = args.cfg_parallel, args.sequence_parallel_size
    return choose_layout(world, clips, guided, *asked_for, together, most_shares(pipeline.engine.network))


def _print_plan(config: RunConfig[SampleArgs], progress: Progress, rank: int) -> None:
    args = config.args
    # On all ranks: it makes process groups.
    pipeline = Pipeline(config, progress.device, with_text_encoder=text_is_local(config.model))
    asks = args.decode_latents or (args.input_type == "cli" and not args.prompts)
    prompts = [] if asks else gather(args.prompts, args.input_file, config.files, pipeline.visual.pictures)[0]
    for note in pipeline.notes:
        progress.line(note)
    if not args.decode_latents:
        Generation(config, pipeline, progress).fitting(prompts)
    layout = layout_of(config, pipeline, own_rank()[1])
    if layout.world > 1:
        progress.line(f"note: {layout}")
    if rank == 0:
        print(report(config, pipeline, prompts), flush=True)

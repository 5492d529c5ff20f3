"""One training run, from a checked configuration to its exit code."""

from __future__ import annotations

import dataclasses
import math
import os
import random
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import Subset

from sgm import distributed
from sgm.cache.batches import CachedBatches, in_lengths
from sgm.cache.ready import ReadyCache, ready_cache
from sgm.config import ConfigError, RunConfig, check_model_section
from sgm.data.loader import create_loader
from sgm.data.report import first_reasons
from sgm.data.sources import exists
from sgm.distributed import DistInfo, from_first
from sgm.inference.preflight import check_paths, placeholders_in, with_found_paths
from sgm.lock import sole_holder
from sgm.models.diffusion import SATVideoDiffusionEngine
from sgm.places import found_path, lies_in_demo
from sgm.training.checkpoints.folder import LOCK, new_run
from sgm.training.checkpoints.load import find_resume
from sgm.training.checkpoints.same_run import CONFIG_FILE, differences, resume_hash
from sgm.training.checkpoints.saver import Saver, resume
from sgm.training.checkpoints.state import CheckpointError
from sgm.training.evaluate import Evaluation, evaluation_batches
from sgm.training.faults import SkipGuard, TrainingStopped, out_of_memory_advice
from sgm.training.memory import MemoryNeeds, free_memory
from sgm.training.optimizers.groups import count, parameter_groups
from sgm.training.optimizers.schedule import LearningRate
from sgm.training.options import TrainArgs, training_advice, trains_lora
from sgm.training.setup.deepspeed import DeepSpeedPlan, plan_deepspeed
from sgm.training.setup.parts import (
    arrange_first_stage,
    build_datasets,
    cache_request,
    check_clips,
    checkpointing_mode,
    load_engine,
    mark_prior,
    memory_needs,
    planned_needs,
    split_validation,
)
from sgm.training.setup.start import start_engine
from sgm.training.trainer import Trainer
from sgm.training.watch.boards import Board, TensorBoard, WeightsAndBiases
from sgm.training.watch.run_log import RunLog
from sgm.training.watch.timing import PhaseClock, phases_of_step
from sgm.weights.save import probe


def train(
    config: RunConfig[TrainArgs], *, dry_run: bool = False, make_data: Callable[[Path], bool] | None = None
) -> int:
    """Train as configured, over all processes of the launch. Returns the exit code.

    Args:
        dry_run: print the resolved configuration and the plan, make nothing.
        make_data: called for a data folder that is not there, on one process a machine; true if it made the folder.
    Raises:
        ConfigError, WeightsError, DatasetError, CheckpointError, TrainingStopped: with what to change.
    """
    check_model_section(config.model, SATVideoDiffusionEngine)
    config = with_found_places(config)
    args = config.args
    kind = device_type(args.device)
    info = distributed.init_distributed(kind)
    if not dry_run:
        _make_what_is_missing(config, info, make_data)
    _check_places(config, dry_run)
    distributed.ensure_groups(args.model_parallel_size)
    plan = plan_deepspeed(config.deepspeed, device_type=kind, data_parallel_size=distributed.data_parallel_world_size())
    check_clips(config, plan.dtype)
    say = print if info.rank == 0 else _silent
    advice = training_advice(args, config.model, plan.optimizer.lr)
    for note in (*config.notes, *plan.notes, *_activation_note(config), *advice):
        say(note if note.startswith("warning") else f"note: {note}", flush=True)
    if dry_run:
        return _dry_run(config, plan, info, say)
    with ExitStack() as stack:
        needs: list[MemoryNeeds] = []
        try:
            trainer = _prepare(config, plan, info, stack, needs, say)
            return trainer.fit()
        except torch.OutOfMemoryError as error:
            if not needs:
                raise
            raise TrainingStopped(out_of_memory_advice(needs[0])) from error


def _prepare(
    config: RunConfig[TrainArgs],
    plan: DeepSpeedPlan,
    info: DistInfo,
    stack: ExitStack,
    needs: list[MemoryNeeds],
    say: Callable[..., None],
) -> Trainer:
    """Everything up to the first iteration; what must be closed goes onto `stack`."""
    _check_writable(config.args.save)
    found = _find_resume(config, say)
    request = cache_request(config, plan.dtype)
    cache = ready_cache(request, info, say) if request else None
    folder = found.parent if found else _run_folder(config.args)
    if folder:
        _hold(folder, stack)
    seed_all(config.args.seed)  # the same on all ranks, for what is initialised at random
    engine, loaded = load_engine(config, plan, info.device)
    if loaded:
        say(f"weights: {loaded.source}", *(f"note: {note}" for note in loaded.notes), sep="\n", flush=True)
    ranks = distributed.data_parallel_world_size()
    needs.append(memory_needs(engine, config, plan, ranks))
    groups = parameter_groups(engine)
    types = plan.dtype + (", products in bf16" if engine.kernels.cpu_bf16 else "")
    say(f"training {count(groups):,} of {sum(p.numel() for p in engine.parameters()):,} values; {info.world_size} "
        f"process{'es' if info.world_size > 1 else ''}, {types}, ZeRO {plan.stage}", flush=True)  # fmt: skip
    say("\n".join(needs[0].report(free_memory(info.device))), flush=True)

    reports = folder or Path(from_first(lambda: stack.enter_context(_temporary_folder())))
    train_sets, valid_sets = _datasets(config, reports, cache)
    for line in left_out([*train_sets, *valid_sets]):
        say(line, flush=True)
    if config.args.cache_lengths:
        train_sets = [in_lengths(dataset, config.args.cache_lengths) for dataset in train_sets]
    loader = stack.enter_context(_loader(config.args, plan, train_sets))
    config = _with_epochs(config, plan, sum(map(len, train_sets)))  # type: ignore[arg-type]
    args = config.args

    ds_engine = start_engine(engine, groups, plan, info.device.type)
    arrange_first_stage(engine, config, plan)
    schedule = LearningRate(args.schedule(plan.optimizer.lr), ds_engine.basic_optimizer.param_groups)
    out = sys.stdout if info.rank == 0 else None
    log = stack.enter_context(RunLog(folder, args.train_iters, out, show_phases=plan.time_phases))
    trainer = Trainer(ds_engine, loader, schedule, args, log, SkipGuard(args.max_skipped_steps))
    trainer.dtype, trainer.clipping = plan.dtype, plan.clipping
    trainer.clock = phases_of_step(PhaseClock(True, info.device), engine)
    trainer.saver = Saver(folder, config, trains_lora(config.model)) if folder else None
    trainer.evaluation = _evaluation(config, plan, valid_sets, folder)
    seed_all(args.seed + distributed.data_parallel_rank())
    if found:
        resume(trainer, found)
        say(f"resumed {found} at iteration {trainer.iteration}", flush=True)
    if info.rank == 0:
        log.boards = _boards(config, folder, trainer.iteration)
    if folder and info.rank == 0:
        (folder / CONFIG_FILE).write_text(config.as_yaml(), encoding="utf-8")
        say(f"run folder {folder}", flush=True)
    return trainer


def device_type(wanted: str | None) -> str:
    """ "cpu" or "cuda"; raises ConfigError."""
    if wanted is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted not in ("cpu", "cuda"):
        raise ConfigError(
            f"args.device is {wanted!r}; choose cpu or cuda. Each process takes the GPU of its local rank; to use "
            "another one, set CUDA_VISIBLE_DEVICES."
        )
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("args.device is cuda, but PyTorch sees no GPU; use --device cpu.")
    return wanted


# --- places -------------------------------------------------------------------------------------------------------


def with_found_places(config: RunConfig[TrainArgs]) -> RunConfig[TrainArgs]:
    """Relative paths that are not below the current folder are looked for in the project's."""
    args = config.args
    valid = args.valid_data and [found_path(folder) for folder in args.valid_data]
    args = dataclasses.replace(
        args,
        train_data=[found_path(folder) for folder in args.train_data],
        prior_data=[found_path(folder) for folder in args.prior_data],
        valid_data=valid,
        cache_dir=args.cache_dir and found_path(args.cache_dir),
    )
    return with_found_paths(dataclasses.replace(config, args=args))


def _make_what_is_missing(
    config: RunConfig[TrainArgs], info: DistInfo, make_data: Callable[[Path], bool] | None
) -> None:
    """The demo's clips, by the first process of a machine while the others wait."""
    if info.local_rank == 0:
        for folder in map(Path, config.args.data_folders) if make_data else ():
            if not folder.expanduser().exists():
                make_data(folder.expanduser())
    distributed.wait_for_all()


def _check_places(config: RunConfig[TrainArgs], dry_run: bool) -> None:
    """Every path edited and there; a dry run has made nothing, so the demo's may be absent.

    Raises:
        ConfigError: names each that is not.
    """
    # With a cache only what is missing from it needs the encoders, whose absence is noticed then.
    check_paths({} if config.args.cache_dir else config.model, config.args.load)
    args = config.args
    folders = {"train_data": args.train_data, "prior_data": args.prior_data, "valid_data": args.valid_data or []}
    problems = [f"args.{place} is still the placeholder {text!r}" for place, text in placeholders_in(folders)]
    problems += [
        f"args.{name}: no folder {path}, nor a manifest or shard"
        for name, paths in folders.items()
        for path in paths
        if not problems and not exists(Path(path).expanduser()) and not (dry_run and lies_in_demo(path))
    ]
    if problems:
        raise ConfigError(
            "\n".join([*problems, "A data folder holds videos/NAME.mp4 and labels/NAME.txt (README, 'Fine-tuning')."])
        )


def _find_resume(config: RunConfig[TrainArgs], say: Callable[..., None]) -> Path | None:
    """The iteration folder to go on from, if asked for and found."""
    args = config.args
    if not args.resume:
        return None
    explain = partial(differences, config=config)
    if args.resume != "auto":
        return find_resume(Path(args.resume), None, resume_hash(config), explain)
    if not args.save:
        raise ConfigError("--resume looks for runs in args.save, which is not set; set it or give the run's folder")
    found = find_resume(Path(args.save), args.experiment_name, resume_hash(config))
    if found is None:
        say(f"no earlier run of this configuration in {args.save}: starting a new one", flush=True)
        other = find_resume(Path(args.save), args.experiment_name, None)
        if other:
            changed = "; ".join(explain(other.parent)) or f"see its {CONFIG_FILE}"
            say(f"warning: {other} is of another configuration: {changed}", flush=True)
    return found


def _run_folder(args: TrainArgs) -> Path | None:
    """save/NAME-MM-DD-HH-MM, new, chosen by rank 0."""
    if not args.save:
        return None

    def choose() -> str:
        return str(new_run(Path(args.save).expanduser() / f"{args.experiment_name}-{datetime.now():%m-%d-%H-%M}"))

    return Path(from_first(choose))


def _check_writable(save: str | None) -> None:
    """Raises CheckpointError, on every rank."""

    def problem() -> str | None:
        try:
            probe(Path(save).expanduser())  # type: ignore[arg-type]
        except OSError as error:
            return error.strerror or str(error)
        return None

    reason = from_first(problem) if save else None
    if reason:
        raise CheckpointError(f"cannot write in args.save, {save}: {reason}. Set it to another folder.")


def _hold(folder: Path, stack: ExitStack) -> None:
    """Keep other commands from training into the same folder until `stack` is left.

    Raises:
        CheckpointError: on every rank; another command does so already.
    """
    if not from_first(lambda: stack.enter_context(sole_holder(folder / LOCK))):
        raise CheckpointError(
            f"another command is still training into {folder}; end it or wait for it. To go on from another run, give "
            "its folder to --resume."
        )


def _temporary_folder() -> AbstractContextManager[str]:
    return tempfile.TemporaryDirectory(prefix="cogvideox-train-")


# --- parts --------------------------------------------------------------------------------------------------------


def _datasets(config: RunConfig[TrainArgs], reports: Path, cache: ReadyCache | None) -> tuple[list[Any], list[Any]]:
    """(training, validation) sets; validation is empty where no evaluation is asked for."""
    args = config.args
    build = cache.datasets if cache else partial(build_datasets, config.data)
    train_sets = build(args.train_data, reports, "train_data")
    prior_sets = build(args.prior_data, reports, "prior_data")
    for dataset in prior_sets:
        mark_prior(dataset)
    if not args.eval_interval and not args.epochs:
        return train_sets + prior_sets, []
    if args.valid_data == args.train_data:
        return train_sets + prior_sets, train_sets
    if args.valid_data:
        return train_sets + prior_sets, build(args.valid_data, reports, "valid_data")
    train_sets, valid_sets = split_validation(train_sets, args.split, args.seed)
    return train_sets + prior_sets, valid_sets


def left_out(datasets: list[Any]) -> list[str]:
    """A warning for each data set that cannot use all videos of its folder."""
    lines = []
    for dataset in datasets:
        whole = dataset.dataset if isinstance(dataset, Subset) else dataset
        rejected = whole.report.rejected if hasattr(whole, "report") else []
        if rejected:
            lines.append(
                f"warning: {whole.data_dir}: {len(rejected)} of {len(rejected) + len(whole)} videos are left out, all "
                f"named in {whole.report_path} (first: {first_reasons(rejected, 1)})"
            )
    return list(dict.fromkeys(lines))


def _loader(args: TrainArgs, plan: DeepSpeedPlan, datasets: list[Any]) -> Any:
    return create_loader(
        datasets,
        plan.micro_batch,
        args.num_workers,
        seed=args.seed,
        rank=distributed.data_parallel_rank(),
        world_size=distributed.data_parallel_world_size(),
        order=args.data_order,
        weights=args.train_data_weights,
        prefetch=args.prefetch_factor,
        read=CachedBatches if args.cache_dir else None,
    )


def _with_epochs(config: RunConfig[TrainArgs], plan: DeepSpeedPlan, clips: int) -> RunConfig[TrainArgs]:
    """`epochs` as iterations, and the intervals that default to one epoch."""
    args = config.args
    if args.epochs is None:
        return config
    samples = plan.micro_batch * plan.accumulation * distributed.data_parallel_world_size()
    per_epoch = math.ceil(clips / samples)
    args = dataclasses.replace(
        args, train_iters=args.epochs * per_epoch, eval_interval=args.eval_interval or per_epoch,
        save_interval=args.save_interval or per_epoch,
    )  # fmt: skip
    return dataclasses.replace(config, args=args)


def _evaluation(
    config: RunConfig[TrainArgs], plan: DeepSpeedPlan, datasets: list[Any], folder: Path | None
) -> Evaluation | None:
    args = config.args
    if not datasets or not args.eval_interval:
        return None
    size = args.eval_batch_size or plan.micro_batch
    return Evaluation(
        datasets,
        batch_size=size,
        batches=evaluation_batches(datasets, size, args.eval_iters, args.strict_eval),
        seed=args.seed,
        folder=folder,
        latents_only=args.only_log_video_latents or bool(args.cache_dir),
        log_video=args.log_image and "sampler_config" in config.model,
        fps=round(((config.data or {}).get("params") or {}).get("fps", 8)),
        prompts=tuple(args.eval_prompts),
    )


def _boards(config: RunConfig[TrainArgs], folder: Path | None, iteration: int) -> list[Board]:
    """What the run reports to, from the first rank."""
    args = config.args
    boards: list[Board] = []
    events = Path(args.summary_dir).expanduser() if args.summary_dir else folder and folder / "tensorboard"
    if args.tensorboard and events:
        boards.append(TensorBoard(events, iteration))
    if args.wandb:
        boards.append(WeightsAndBiases(folder or Path(args.experiment_name), args.wandb_project_name, config.as_dict()))
    return boards


def seed_all(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


# --- what is said -------------------------------------------------------------------------------------------------


def _activation_note(config: RunConfig[TrainArgs]) -> list[str]:
    switches = config.model["network_config"]["params"].get("transformer_args") or {}
    inner, outer = switches.get("checkpoint_activations", False), config.args.checkpoint_activations
    if inner == outer:
        return []
    mode = checkpointing_mode(config.model, config.args)
    return [f"checkpoint_activations is {outer} in args and {inner} in transformer_args: {mode} holds"]


def _dry_run(config: RunConfig[TrainArgs], plan: DeepSpeedPlan, info: DistInfo, say: Callable[..., None]) -> int:
    args = config.args
    say(config.as_yaml())
    ranks = distributed.data_parallel_world_size()
    batch = plan.micro_batch * plan.accumulation * ranks
    extent = f"{args.epochs} epochs" if args.epochs else f"{args.train_iters} iterations"
    say(f"plan: {extent} of {batch} clips ({plan.micro_batch} x {plan.accumulation} accumulation x {ranks} ranks) on "
        f"{info.device}, {plan.dtype}, ZeRO {plan.stage}{' with CPU offload' if plan.offload else ''}, optimizer "
        f"{plan.optimizer.name} at {plan.optimizer.lr:g}")  # fmt: skip
    say("\n".join(planned_needs(config, plan, ranks).report(free_memory(info.device))))
    return 0


def _silent(*_: Any, **__: Any) -> None:
    """Ranks other than the first say nothing."""


def exit_quietly(code: int) -> None:
    """End the process with `code` after orderly shutdown of the groups; a failed rank does not wait for the others."""
    sys.stdout.flush()
    sys.stderr.flush()
    if code == 0:
        distributed.shutdown()
        return
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        os._exit(code)
    sys.exit(code)


__all__ = ["device_type", "exit_quietly", "from_first", "seed_all", "train", "with_found_places"]

"""One training run, from a checked configuration to its exit code, and the files sampled on its way."""

from __future__ import annotations

import dataclasses
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import Dataset

from sgm import distributed
from sgm.cache.ready import ReadyCache, ready_cache, starts_from_picture
from sgm.cli import MOSTLY_SKIPPED, flush_output, print_line
from sgm.config import ConfigError, RunConfig, check_model_section
from sgm.data.loader import clip_count
from sgm.distributed import DistInfo, from_first
from sgm.files import SaveError, remove_if_empty, write_text
from sgm.models.diffusion import SATVideoDiffusionEngine
from sgm.modules.autoencoding.strides import STRIDES
from sgm.modules.diffusionmodules.image_condition import sampled_frames
from sgm.modules.diffusionmodules.wrappers import OpenAIWrapper
from sgm.modules.transformer.patch_embed import PatchSize
from sgm.parallel.apply import share_network, share_tokens
from sgm.parallel.team import Team, training_team
from sgm.places import CONFIGS, INSTALLED, PROJECT, shown
from sgm.training.checkpoints.folder import check_writable, hold, new_run_folder
from sgm.training.checkpoints.load import (
    CONFIG_FILE,
    Earlier,
    find_checkpoint,
    keep_clips_per_step,
    load_state,
    require_longer,
)
from sgm.training.checkpoints.state import seed_all
from sgm.training.distill.engine import DistillationEngine
from sgm.training.evaluate import Evaluation, PromptEvaluation, eval_prompts, evaluation_batches
from sgm.training.faults import TrainingStopped, out_of_memory_advice
from sgm.training.memory import MemoryNeeds, free_memory, gib
from sgm.training.optimizers.schedule import LearningRate
from sgm.training.optimizers.spec import count, parameter_groups
from sgm.training.options import TrainArgs, training_advice, trains_adapter
from sgm.training.prior import BaseNetwork
from sgm.training.setup.data import check_clips, clip_sets, left_out, prompt_sets, training_loader
from sgm.training.setup.deepspeed import DeepSpeedPlan, plan_deepspeed
from sgm.training.setup.engine import rehearse_start, start_engine
from sgm.training.setup.estimate import memory_needs, planned_needs
from sgm.training.setup.model import (
    arrange_first_stage,
    checkpointing_mode,
    load_engine,
    stream_obstacles,
    training_kernels,
)
from sgm.training.setup.places import check_places, with_found_places
from sgm.training.trainer import Trainer
from sgm.training.watch.run_log import Board, RunLog, TensorBoard, WeightsAndBiases
from sgm.training.watch.timing import PhaseClock
from sgm.util import allowed_packages
from sgm.weights.preflight import with_paths

Say = Callable[[str], None]


def train(config: RunConfig[TrainArgs], *, dry_run: bool = False) -> int:
    """Train as configured, over all processes of the launch. Returns the exit code.

    Args:
        dry_run: print the resolved configuration and the plan, make nothing.
    Raises:
        ConfigError, WeightsError, DatasetError, CheckpointError, TrainingStopped: with what to change.
    """
    model = check_model_section(config.model, SATVideoDiffusionEngine)
    config = with_found_places(dataclasses.replace(config, model=model))
    args = config.args
    kind = device_type(args.device)
    info = distributed.init_distributed(kind)
    check_places(config, dry_run)
    distributed.ensure_groups(args.model_parallel_size)
    team = training_team(args.sequence_parallel_size)
    plan = plan_deepspeed(config.deepspeed, device_type=kind, data_parallel_size=distributed.data_parallel_world_size())
    advice = check_clips(config, plan.dtype)
    say = rank_zero_printer(info.rank)
    if team.size > 1:
        advice.append(f"{team.size} processes train on a clip together, each on a share of its tokens")
    advice += training_advice(args, config.model, plan.optimizer.lr)
    for note in (*config.notes, *plan.notes, *_activation_note(config), *advice):
        say(note if note.startswith("warning") else f"note: {note}")
    if dry_run:
        return _dry_run(config, plan, info, say)
    if args.save:
        check_writable(args.save)
    earlier = find_checkpoint(config, say)
    if earlier:
        plan = keep_clips_per_step(plan, earlier, config.deepspeed or {}, distributed.data_parallel_world_size())
    with ExitStack() as stack:
        parts = _load(config, plan, earlier, info, team, stack, say)
        try:
            code = _start(parts, config, plan, info, stack, say).fit()
        except torch.OutOfMemoryError as error:
            raise TrainingStopped(out_of_memory_advice(parts.needs)) from error
        if code == 0 and parts.folder and info.rank == 0:
            _say_how_to_sample(parts.folder, config, plan.dtype, say)
        return code


def _say_how_to_sample(folder: Path, config: RunConfig[TrainArgs], dtype: str, say: Say) -> None:
    try:
        command = write_sampling_file(folder, config, dtype)
    except SaveError as error:  # all that is needed is saved already
        command = None
        say(f"warning: {error}")
    if command:
        say(f"to sample: {command}")


@dataclass(frozen=True)
class _Loaded:
    """What is there before the clips.

    Attributes:
        earlier: the checkpoint to go on from. folder: the run's; None where nothing is saved.
        groups: the parameters that learn, in an optimizer's groups.
    """

    earlier: Earlier | None
    cache: ReadyCache | None
    folder: Path | None
    engine: SATVideoDiffusionEngine
    groups: list[dict[str, Any]]
    needs: MemoryNeeds


def _load(
    config: RunConfig[TrainArgs],
    plan: DeepSpeedPlan,
    earlier: Earlier | None,
    info: DistInfo,
    team: Team,
    stack: ExitStack,
    say: Say,
) -> _Loaded:
    """Where to write, the cache, the engine with its weights; what must be closed goes onto `stack`."""
    args = config.args
    cache = ready_cache(config, plan.dtype, info, say) if args.cache_dir else None
    folder = earlier.folder.parent if earlier else None
    if args.save and not folder:
        folder = new_run_folder(args.save, args.experiment_name)
        stack.callback(remove_if_empty, folder)  # what ends before it has learnt anything leaves nothing
    if folder:
        hold(folder, stack)
    seed_all(args.seed)  # the same on all ranks, for what is initialised at random
    engine, loaded = load_engine(config, plan, info.device)
    share_network(engine, team)
    if isinstance(engine.base, BaseNetwork) and isinstance(engine.base.copied, OpenAIWrapper):
        share_tokens(engine.base.copied.diffusion_model, team)
    if loaded:
        say("\n".join([f"weights: {loaded.source}", *(f"note: {note}" for note in loaded.notes)]))
    needs = memory_needs(engine, config, plan, distributed.replica_count())
    groups = parameter_groups(engine)
    types = plan.dtype + (", products in bf16" if engine.kernels.cpu_bf16 else "")
    say(f"training {count(groups):,} of {sum(p.numel() for p in engine.parameters()):,} values; {info.world_size} "
        f"process{'es' if info.world_size > 1 else ''}, {types}, ZeRO {plan.stage}")  # fmt: skip
    say("\n".join([*_frozen_lines(engine, args, plan), *needs.report(free_memory(info.device))]))
    return _Loaded(earlier, cache, folder, engine, groups, needs)


def _start(
    parts: _Loaded, config: RunConfig[TrainArgs], plan: DeepSpeedPlan, info: DistInfo, stack: ExitStack, say: Say
) -> Trainer:
    """Everything else up to the first iteration."""
    folder, engine = parts.folder, parts.engine
    reports = folder or Path(from_first(lambda: stack.enter_context(TemporaryDirectory(prefix="cogvideox-train-"))))
    if isinstance(engine, DistillationEngine):
        clips = prompt_sets(config.args, engine)
        say(f"{sum(map(clip_count, clips.train))} prompts")
    else:
        clips = clip_sets(config, reports, parts.cache)
    for line in left_out([*clips.train, *clips.valid]):
        say(line)
    loader = stack.enter_context(training_loader(config.args, plan.micro_batch, clips.train))
    config = _with_epochs(config, plan, sum(loader.sampler.sizes), parts.earlier)
    if parts.earlier:
        require_longer(parts.earlier, config.args.train_iters)
    args = config.args

    ds_engine = start_engine(engine, parts.groups, plan, info.device.type)
    arrange_first_stage(engine, plan)
    schedule = LearningRate(args.schedule(plan.optimizer.lr), ds_engine.basic_optimizer.param_groups)
    out = sys.stdout if info.rank == 0 else None
    log = stack.enter_context(RunLog(folder, args.train_iters, out, show_phases=plan.time_phases))
    clock = PhaseClock(True, info.device)
    if engine.conditioner is not None:
        clock.watch(engine.conditioner, "text")
    evaluation = _evaluation(config, plan, clips.valid, folder)
    trainer = Trainer(ds_engine, loader, schedule, config, plan, log, clock, folder, evaluation)
    seed_all(args.seed + distributed.data_parallel_rank())
    if parts.earlier:
        trainer.resume(parts.earlier.folder)
        say("\n".join(_resumed(trainer, parts.earlier)))
    if info.rank == 0:
        log.boards = _boards(config, folder, trainer.iteration)
    if folder and info.rank == 0:
        write_text(folder / CONFIG_FILE, config.as_yaml())
        say(f"run folder {folder}")
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


def _with_epochs(
    config: RunConfig[TrainArgs], plan: DeepSpeedPlan, clips: int, earlier: Earlier | None
) -> RunConfig[TrainArgs]:
    """`epochs` as iterations, and the intervals that default to one epoch."""
    args = config.args
    if args.epochs is None:
        return config
    samples = plan.clips_per_step(distributed.data_parallel_world_size())
    per_epoch = math.ceil(clips / samples)
    train_iters = args.epochs * per_epoch
    if earlier and earlier.clips_per_step != samples:
        left = max(0, args.epochs * clips - load_state(earlier.folder, 0).consumed_samples)
        train_iters = earlier.record.iteration + math.ceil(left / samples)
    args = dataclasses.replace(
        args, train_iters=train_iters, eval_interval=args.eval_interval or per_epoch,
        save_interval=args.save_interval or per_epoch,
    )  # fmt: skip
    return dataclasses.replace(config, args=args)


def _evaluation(
    config: RunConfig[TrainArgs], plan: DeepSpeedPlan, datasets: Sequence[Dataset], folder: Path | None
) -> Evaluation | None:
    args = config.args
    if not datasets or not args.eval_interval:
        return None
    size = args.eval_batch_size or plan.micro_batch
    return (PromptEvaluation if args.distill else Evaluation)(
        datasets,
        batch_size=size,
        batches=evaluation_batches(datasets, size, args.eval_iters, args.strict_eval),
        seed=args.seed,
        folder=folder,
        latents_only=args.only_log_video_latents or bool(args.cache_dir),
        log_video=args.log_image and "sampler_config" in config.model,
        fps=round(((config.data or {}).get("params") or {}).get("fps", 8)),
        prompts=eval_prompts(args.eval_prompts, starts_from_picture(config.model)),
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


# --- what is said -------------------------------------------------------------------------------------------------


def rank_zero_printer(rank: int) -> Say:
    """Prints a line at once, on the first rank; the others say nothing."""
    return print_line if rank == 0 else lambda line: None


def _resumed(trainer: Trainer, earlier: Earlier) -> list[str]:
    """Where a run goes on, and all that is not as it was."""
    end, before, schedule = trainer.args.train_iters, earlier.then.get("args.train_iters"), trainer.schedule
    lines = [f"resumed {earlier.folder} at iteration {trainer.iteration} of {end}"]
    lines += [f"note: changed since: {change}" for change in earlier.changes]
    if end != before:
        lines.append(
            f"note: the run's end moves from iteration {before} to {end}: the learning rate goes on with "
            f"{schedule.current:.3g} and falls until step {schedule.settings.total_steps}"
        )
    plan, ranks = trainer.plan, distributed.data_parallel_world_size()
    record, share = earlier.record, distributed.clip_world_size() * distributed.model_parallel_world_size()
    then = _set_up(record.world_size, record.clip_processes, record.zero_stage, earlier.clips_per_step)
    now = _set_up(dist.get_world_size(), share, plan.stage, plan.clips_per_step(ranks))
    if then != now:
        lines.append(
            f"note: {then} -> {now} ({plan.micro_batch} x {plan.accumulation} accumulation x {ranks} ranks): the "
            f"optimizer's state is kept value for value, the clips go on in their order after {trainer.loader.consumed}"
        )
    return lines


def _set_up(processes: int, a_clip: int, zero_stage: int, clips: int) -> str:
    shared = f", {a_clip} a clip" if a_clip > 1 else ""
    return f"{processes} processes{shared}, ZeRO {zero_stage}, {clips} clips a step"


def _activation_note(config: RunConfig[TrainArgs]) -> list[str]:
    switches = config.model["network_config"]["params"].get("transformer_args") or {}
    inner, outer = switches.get("checkpoint_activations", False), config.args.checkpoint_activations
    if inner == outer:
        return []
    mode = checkpointing_mode(config.model, config.args)
    return [f"checkpoint_activations is {outer} in args and {inner} in transformer_args: {mode} holds"]


def _frozen_lines(engine: SATVideoDiffusionEngine, args: TrainArgs, plan: DeepSpeedPlan) -> list[str]:
    """Where the frozen weights of blocks lie, if that was asked for."""
    if not args.stream_frozen:
        return []
    if engine.frozen is None and (obstacles := stream_obstacles(args, plan, engine)):
        return [f"note: frozen weights stay on the device (args.stream_frozen: auto): {' and '.join(obstacles)}"]
    if engine.frozen is None:
        return ["note: args.stream_frozen has no effect: all weights of the blocks learn"]
    kind = "pinned " if engine.frozen.pinned else ""
    size, buffers = gib(engine.frozen.host_bytes), gib(engine.frozen.device_bytes)
    return [f"frozen weights of blocks: {size} of {kind}CPU memory, two blocks of them ({buffers}) on the device"]


def _dry_run(config: RunConfig[TrainArgs], plan: DeepSpeedPlan, info: DistInfo, say: Say) -> int:
    args = config.args
    training_kernels(config.accelerate, info.device)
    rehearse_start(plan, info.device)
    say(config.as_yaml())
    ranks = distributed.data_parallel_world_size()
    batch = plan.clips_per_step(ranks)
    extent = f"{args.epochs} epochs" if args.epochs else f"{args.train_iters} iterations"
    say(f"plan: {extent} of {batch} clips ({plan.micro_batch} x {plan.accumulation} accumulation x {ranks} ranks) on "
        f"{info.device}, {plan.dtype}, ZeRO {plan.stage}{' with CPU offload' if plan.offload else ''}, optimizer "
        f"{plan.optimizer.name} at {plan.optimizer.lr:g}")  # fmt: skip
    say("\n".join(planned_needs(config, plan, distributed.replica_count()).report(free_memory(info.device))))
    return 0


def exit_quietly(code: int) -> None:
    """End the process with `code` after orderly shutdown of the groups; a failed rank does not wait for the others."""
    flush_output()
    if code in (0, MOSTLY_SKIPPED):
        first = not dist.is_initialized() or dist.get_rank() == 0
        distributed.shutdown()
        if first or not code:
            return
        sys.exit(0)  # the first rank says it for all: the launcher ends the others of one that fails
    distributed.leave(code)


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

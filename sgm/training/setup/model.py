"""The diffusion engine of a training run: its `model:` section, what goes with what, its loaded weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch

from sgm.cache.stand_ins import CachedFirstStage, cached_model_section
from sgm.config import AccelerateArgs, ConfigError, RunConfig
from sgm.data.dataset import SETTING_OF
from sgm.models.autoencoder import VideoAutoencoderInferenceWrapper
from sgm.models.diffusion import SATVideoDiffusionEngine
from sgm.models.loading import LoadedNetwork, load_first_stage, load_network, load_text_encoder
from sgm.modules.diffusionmodules.image_condition import sampled_frames
from sgm.modules.diffusionmodules.loss import VideoDiffusionLoss
from sgm.modules.ops.choice import Kernels, choose_kernels
from sgm.modules.ops.recompute import MODES, ActivationOffload, stronger_mode
from sgm.modules.transformer.lora import LoraMixin
from sgm.parallel.apply import check_shares
from sgm.training.distill.engine import DistillationEngine, check_distill
from sgm.training.memory import room_to_pin
from sgm.training.options import AUTO, TrainArgs
from sgm.training.prior import BaseNetwork
from sgm.training.setup.deepspeed import DeepSpeedPlan
from sgm.util import instantiate_from_config
from sgm.weights.streaming import frozen_parameters, set_aside


def training_model_section(model: Mapping[str, Any], args: TrainArgs) -> dict[str, Any]:
    """The `model:` section as training builds it: switches of `args` carried into the network, adapters put off."""
    section = cached_model_section(model) if args.cache_dir else copy.deepcopy(dict(model))
    evaluates = bool(args.eval_interval or args.epochs)
    if args.distill and not (evaluates and args.log_image and not args.only_log_video_latents):  # writes no videos
        section["first_stage_config"] = None
    params = section["network_config"].setdefault("params", {})
    params["defer_lora"] = True
    switches = params.setdefault("transformer_args", {})
    switches["checkpoint_activations"] = checkpointing_mode(model, args)
    switches["model_parallel_size"] = args.model_parallel_size
    return section


def checkpointing_mode(model: Mapping[str, Any], args: TrainArgs) -> bool | str:
    """What the two places of `checkpoint_activations` ask for together.

    Raises:
        ConfigError: a value that is none of the choices.
    """
    switches = model["network_config"].get("params", {}).get("transformer_args") or {}
    inner = switches.get("checkpoint_activations", False)
    if inner not in MODES:
        raise ConfigError(
            f"transformer_args.checkpoint_activations is {inner!r}; choose true, false, selective or products"
        )
    return stronger_mode(inner, args.checkpoint_activations)


def check_switches(args: TrainArgs, plan: DeepSpeedPlan, engine: SATVideoDiffusionEngine) -> None:
    """Whether each switch of `args`, and each mixin beyond a release's own, goes with the rest of a configuration.

    Raises:
        ConfigError, ParallelError: it does not.
    """
    recomputed, size = engine.network.transformer.checkpoint_activations, args.sequence_parallel_size
    graphs = {"args.cuda_graphs": args.cuda_graphs}
    zero3 = {"deepspeed.zero_optimization.stage: 3": plan.stage == 3}
    split = {"args.model_parallel_size above 1": args.model_parallel_size > 1}
    shared = {"args.sequence_parallel_size above 1": size > 1}
    loss = {f"the loss_fn_config {type(engine.loss_fn).__name__}": not isinstance(engine.loss_fn, VideoDiffusionLoss)}
    if args.cuda_graphs:  # nothing else may run code between the network's kernels
        _refuse_with("args.cuda_graphs", {"checkpoint_activations": recomputed} | zero3 | split | shared)
    if args.offload_activations:  # else layers keep all that they calculate
        _refuse_with("args.offload_activations", {"checkpoint_activations: false": not recomputed})
    for name in engine.network.further_configs:
        _refuse_with(f"modules.{name}_config", graphs | zero3 | split)
    if args.prior_data:  # the network runs a second time within a step, and the loss takes another target
        _refuse_with("args.prior_data", graphs | zero3 | loss)
    streams_frozen(args, plan, engine)
    if args.add_image_channels and not engine.noised_image_input:
        raise ConfigError(
            "args.add_image_channels is for models that begin with a picture: set in_channels of the network to twice "
            "its out_channels, as configs/image_to_video.yaml does, or leave it out"
        )
    if size > 1:
        _refuse_with("args.sequence_parallel_size above 1", zero3)
    stage = engine.first_stage_model
    if isinstance(stage, VideoAutoencoderInferenceWrapper) and stage.cp_size > size:
        raise ConfigError(
            f"first_stage_config.params.cp_size asks for {stage.cp_size} processes a clip, which in training "
            f"args.sequence_parallel_size gives, and it is {size}: set it to {stage.cp_size}, too, or cp_size to 1"
        )
    check_shares(engine.network, size)


def streams_frozen(args: TrainArgs, plan: DeepSpeedPlan, engine: SATVideoDiffusionEngine) -> bool:
    """Whether a run keeps frozen weights of blocks on the host: it is asked for, and there are some.

    Args:
        engine: as configured, without adapters or with them. What does not learn is frozen from now on.
    Raises:
        ConfigError: it does not go with the rest of a configuration.
    """
    obstacles = stream_obstacles(args, plan, engine)
    if args.stream_frozen != AUTO:
        _refuse_with("args.stream_frozen", dict.fromkeys(obstacles, True))
    return bool(args.stream_frozen) and not obstacles and bool(streamed_parameters(engine))


def stream_obstacles(args: TrainArgs, plan: DeepSpeedPlan, engine: SATVideoDiffusionEngine) -> list[str]:
    """What keeps frozen weights of blocks from being streamed; nothing where there are none, or nobody asks."""
    if not args.stream_frozen:
        return []
    engine.freeze_untrained()
    if not streamed_parameters(engine):
        return []
    obstacles = {
        "checkpoint_activations: false": not engine.network.transformer.checkpoint_activations,
        "args.cuda_graphs": args.cuda_graphs,
        "deepspeed.zero_optimization.stage: 3": plan.stage == 3,
        "args.model_parallel_size above 1": args.model_parallel_size > 1,
        "args.prior_data or args.distill where more than LoRA learns": (args.prior_data or args.distill)
        and trains_more_than_lora(engine),
    }
    return [name for name, there in obstacles.items() if there]


def trains_more_than_lora(engine: SATVideoDiffusionEngine) -> bool:
    """Whether weights learn that are no adapter's; also of an engine that has none yet."""
    more = engine.also_trainable_prefixes or engine.network.further_configs
    return "all" not in engine.not_trainable_prefixes or bool(more)


def streamed_parameters(engine: SATVideoDiffusionEngine) -> list[torch.Tensor]:
    """Frozen weights of the network's blocks."""
    return [p for block in engine.network.streamable_blocks() for p in frozen_parameters(block)]


def _refuse_with(switch: str, obstacles: Mapping[str, Any]) -> None:
    found = [name for name, there in obstacles.items() if there]
    if found:
        raise ConfigError(f"{switch} does not go with {' and '.join(found)}; leave one of them out")


def meta_engine(
    model: Mapping[str, Any], dtype: str, kind: type[SATVideoDiffusionEngine] = SATVideoDiffusionEngine
) -> SATVideoDiffusionEngine:
    """The engine without weights or memory, for estimates and for loading."""
    with torch.device("meta"):
        return kind(**model, dtype=dtype)


def checked_engine(model: dict[str, Any], args: TrainArgs, plan: DeepSpeedPlan) -> SATVideoDiffusionEngine:
    """`meta_engine` of a `training_model_section`, whose parts go with what a run asks of them.

    Raises:
        ConfigError: they do not.
    """
    engine = meta_engine(model, plan.dtype, DistillationEngine if args.distill else SATVideoDiffusionEngine)
    check_distill(args, plan.stage, engine)
    check_switches(args, plan, engine)
    for part, there in {"conditioner": engine.conditioner, "loss_fn": engine.loss_fn}.items():
        if there is None and f"{part}_config" not in model and not (args.distill and part == "loss_fn"):
            raise ConfigError(f"model.{part}_config is missing, which training needs")
    return engine


def clip_size(config: RunConfig[TrainArgs], engine: SATVideoDiffusionEngine) -> tuple[int, int, int]:
    """(frames, height, width) in pixels of the longest clip; where no size is given that which `engine` samples."""
    given = (config.data or {}).get("params") or {}
    params = {SETTING_OF.get(name, name): value for name, value in given.items()}
    network = config.model["network_config"]["params"]
    if params.get("buckets"):
        return max(((int(f), int(h), int(w)) for f, h, w in params["buckets"]), key=math.prod)
    height, width = params.get("video_size") or engine.strides.pixel_size(*engine.network.trained_size)
    return int(params.get("max_num_frames") or network["num_frames"]), int(height), int(width)


def training_kernels(fast: AccelerateArgs, device: torch.device) -> Kernels:
    """Raises ConfigError: what is for sampling alone, being less exact, or does not run on `device`."""
    if on := fast.approximate():
        raise ConfigError(f"accelerate: {', '.join(on)} are for sampling; leave them out of a training configuration")
    return choose_kernels(fast.kernels, fast.attention, device, fast.cpu_bf16)


def freeze_untrained(engine: SATVideoDiffusionEngine) -> None:
    """Leave gradients to what learns.

    Raises:
        ConfigError: that is nothing, or lacks what is named as trainable.
    """
    trained = engine.freeze_untrained()
    for prefix in engine.also_trainable_prefixes:
        if not any(name.startswith(prefix) for name in trained):
            raise ConfigError(
                f"model.also_trainable_prefixes: no trainable parameter's name begins with {prefix!r}; names are like "
                "model.diffusion_model.mixins.patch_embed.proj.weight (tools/inspect_weights.py lists a file's)"
            )
    if not trained:
        raise ConfigError(
            f"model.not_trainable_prefixes {list(engine.not_trainable_prefixes)} leaves nothing to train; "
            "['all'] needs a lora_config beside it, as configs/lora.yaml has it, or a mixin of your own in modules"
        )


def load_engine(
    config: RunConfig[TrainArgs], plan: DeepSpeedPlan, device: torch.device
) -> tuple[SATVideoDiffusionEngine, LoadedNetwork | None]:
    """The engine on `device` with all weights, adapters attached, and only what learns requiring gradients.

    Raises:
        WeightsError: weights are missing or do not fit.
        ConfigError: the configuration trains nothing, or `accelerate.kernels` do not run on `device`.
    """
    args = config.args
    kernels = training_kernels(config.accelerate, device)
    model = training_model_section(config.model, args)
    engine = checked_engine(model, args, plan)
    streams = streams_frozen(args, plan, engine)
    loaded = _load_or_start_network(engine, args, model["network_config"], plan.dtype, device, streams)
    autoencoder = loaded_autoencoder(engine)
    if autoencoder is not None:
        load_first_stage(autoencoder, device=device, dtype=engine.dtype)
        autoencoder.set_low_memory(args.vae_low_memory)
    if engine.conditioner is not None and not args.cache_dir:
        load_text_encoder(engine.conditioner, device=device, dtype=engine.dtype)
    engine.use_kernels(kernels)
    freeze_untrained(engine)
    with set_aside(streamed_parameters(engine) if streams else (), device):
        engine.to(device)
    if streams:
        engine.stream_frozen(device, pin=device.type == "cuda" and room_to_pin(streamed_parameters(engine)))
    if args.prior_data:
        engine.base, engine.base_weight = BaseNetwork(engine.model), args.prior_weight
    if isinstance(engine, DistillationEngine) and args.distill:
        frames, height, width = clip_size(config, engine)
        size = engine.strides.latent_size(height, width)
        latents = sampled_frames(engine.strides.latent_frames(frames), engine.network.patch.t)
        shape = (latents, engine.network.out_channels, *size)
        engine.begin(args.distill, shape, config.model["sampler_config"])
    if args.offload_activations:
        engine.offload_activations(ActivationOffload(device))
    if args.cuda_graphs and device.type == "cuda":
        engine.use_graphs()
    return engine, loaded


def _load_or_start_network(
    engine: SATVideoDiffusionEngine,
    args: TrainArgs,
    section: Mapping[str, Any],
    dtype: str,
    device: torch.device,
    streams: bool,
) -> LoadedNetwork | None:
    """Weights from `args.load`, or random ones; and an adapter's, if there is to be one.

    All come to `device`, but for the frozen ones of blocks that are to be streamed.

    A distillation's teacher is all that `args.load` holds: its LoRA becomes part of the base, beside the student's own.
    """
    loaded, place = None, torch.device("cpu") if streams else device
    if args.load:
        loaded = load_network(
            engine.network, args.load, allow_absent=args.force_train, device=place, dtype=engine.dtype, trains=True,
            merge=args.distill is not None, add_image_channels=args.add_image_channels,
        )  # fmt: skip
        loaded.notes = [n for n in loaded.notes if not n.startswith("lora_config is set")]
        lora = dict(engine.network.mixins.items()).get("lora")
        if isinstance(lora, LoraMixin):
            said = "the LoRA in this file is trained further"
            loaded.notes.append(f"{said}: rank {lora.r}, factor {lora.scaling:g}, whatever lora_config says")
    else:
        started = instantiate_from_config(section, dtype=dtype)
        engine.model.diffusion_model = started.to(place)
    if streams:
        engine.freeze_untrained()
    with set_aside(streamed_parameters(engine) if streams else (), device):
        engine.network.attach_mixins()  # new adapters begin on `device`, with its random numbers
        engine.network.to(device, engine.dtype)
    return loaded


def loaded_autoencoder(engine: SATVideoDiffusionEngine) -> VideoAutoencoderInferenceWrapper | None:
    """The autoencoder that a run has: whole, or of a run on cached clips that start from a picture its encoder."""
    stage = engine.first_stage_model
    if isinstance(stage, CachedFirstStage):
        return stage.image_stage
    return None if stage is None else engine.autoencoder


def arrange_first_stage(engine: SATVideoDiffusionEngine, plan: DeepSpeedPlan) -> None:
    """Lay the first stage's weights out as fused kernels read them: after DeepSpeed, which cannot hand such tensors to
    other ranks, has started. ZeRO 3 keeps its own layout.
    """
    autoencoder = loaded_autoencoder(engine)
    if autoencoder is not None and engine.kernels.fused and plan.stage != 3:
        autoencoder.set_channels_last()

"""From a training configuration to its parts: engine with loaded weights, data sets, loader, memory estimate."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import Dataset, Subset

from sgm.cache.ready import CacheRequest
from sgm.cache.stand_ins import cached_model_section
from sgm.config import AccelerateArgs, ConfigError, RunConfig
from sgm.data.buckets import Bucket
from sgm.data.section import DataSection
from sgm.distributed import wait_for_all
from sgm.models.diffusion import SATVideoDiffusionEngine
from sgm.models.loading import LoadedNetwork, load_first_stage, load_network, load_text_encoder
from sgm.modules.autoencoding.strides import STRIDES
from sgm.modules.encoders.modules import text_is_local
from sgm.modules.ops.choice import choose_kernels
from sgm.modules.ops.recompute import MODES, stronger_mode
from sgm.modules.transformer.positions import LARGEST_STRETCH
from sgm.training.memory import MemoryNeeds
from sgm.training.options import TrainArgs, split_shares
from sgm.training.prior import BaseNetwork, needs_copy
from sgm.training.setup.deepspeed import DeepSpeedPlan
from sgm.util import instantiate_from_config

T5_XXL_VALUES = 4_762_310_656

# --- the engine ---------------------------------------------------------------------------------------------------


def training_model_section(model: Mapping[str, Any], args: TrainArgs) -> dict[str, Any]:
    """The `model:` section as training builds it: switches of `args` carried into the network, LoRA put off."""
    model = cached_model_section(model) if args.cache_dir else copy.deepcopy(dict(model))
    params = model["network_config"].setdefault("params", {})
    params["defer_lora"] = True
    switches = params.setdefault("transformer_args", {})
    switches["checkpoint_activations"] = checkpointing_mode(model, args)
    switches["model_parallel_size"] = args.model_parallel_size
    return model


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


def refuse_approximations(accelerate: AccelerateArgs) -> None:
    """Switches that make sampling faster and less exact have no place in training.

    Raises:
        ConfigError: naming them.
    """
    on = accelerate.approximate()
    if on:
        raise ConfigError(f"accelerate: {', '.join(on)} are for sampling; leave them out of a training configuration")


def check_graphs(args: TrainArgs, plan: DeepSpeedPlan, checkpointing: bool | str) -> None:
    """Whether `args.cuda_graphs` goes with the rest of a configuration.

    Raises:
        ConfigError: something else runs code between the network's kernels.
    """
    obstacles = {
        "checkpoint_activations": checkpointing,
        "deepspeed.zero_optimization.stage: 3": plan.stage == 3,
        "args.model_parallel_size above 1": args.model_parallel_size > 1,
    }
    found = [name for name, there in obstacles.items() if there]
    if args.cuda_graphs and found:
        raise ConfigError(f"args.cuda_graphs does not go with {' and '.join(found)}; leave one of them out")


def check_prior(args: TrainArgs, plan: DeepSpeedPlan, loss_fn: Any) -> None:
    """Whether `args.prior_data` goes with the rest of a configuration.

    Raises:
        ConfigError: the network cannot be run a second time within a step, or the loss takes no other target.
    """
    obstacles = {
        "args.cuda_graphs": args.cuda_graphs,
        "deepspeed.zero_optimization.stage: 3": plan.stage == 3,
        f"the loss_fn_config {type(loss_fn).__name__}": not hasattr(loss_fn, "detailed"),
    }
    found = [name for name, there in obstacles.items() if there]
    if args.prior_data and found:
        raise ConfigError(f"args.prior_data does not go with {' and '.join(found)}; leave one of them out")


def meta_engine(model: Mapping[str, Any], dtype: str) -> SATVideoDiffusionEngine:
    """The engine without weights or memory, for estimates and for loading."""
    with torch.device("meta"):
        return SATVideoDiffusionEngine(**model, dtype=dtype)


def load_engine(
    config: RunConfig[TrainArgs], plan: DeepSpeedPlan, device: torch.device
) -> tuple[SATVideoDiffusionEngine, LoadedNetwork | None]:
    """The engine on `device` with all weights, adapters attached, and only what learns requiring gradients.

    Raises:
        WeightsError: weights are missing or do not fit.
        ConfigError: the configuration trains nothing.
        KernelError: `accelerate.kernels` do not run on `device`.
    """
    args = config.args
    fast = config.accelerate
    refuse_approximations(fast)
    kernels = choose_kernels(fast.kernels, fast.attention, device, fast.cpu_bf16)
    model = training_model_section(config.model, args)
    engine = meta_engine(model, plan.dtype)
    check_graphs(args, plan, engine.network.transformer.checkpoint_activations)
    check_prior(args, plan, engine.loss_fn)
    to = {"device": device, "dtype": engine.dtype}
    loaded = None
    if args.load:
        loaded = load_network(engine.network, args.load, allow_absent=args.force_train, **to)
        loaded.notes = [n for n in loaded.notes if not n.startswith("lora_config is set")]
    else:
        network = instantiate_from_config(model["network_config"], dtype=plan.dtype)
        engine.model.diffusion_model = network.to(device)
    network = engine.network
    if network.has_lora_config and "lora" not in network.mixins:
        network.attach_lora()
        network.to(device, engine.dtype)
    if engine.first_stage_model is not None and not args.cache_dir:
        load_first_stage(engine.first_stage_model, **to)
        engine.first_stage_model.set_low_memory(args.vae_low_memory)
    if engine.conditioner is not None and not args.cache_dir:
        load_text_encoder(engine.conditioner, **to)
    engine.use_kernels(kernels)
    if not engine.freeze_untrained():
        raise ConfigError(
            f"model.not_trainable_prefixes {list(engine.not_trainable_prefixes)} leaves nothing to train; "
            "['all'] needs a lora_config beside it (see the comments in configs/cogvideox_2b_sft.yaml)"
        )
    engine.to(device)
    if args.prior_data:
        engine.base, engine.base_weight = BaseNetwork(engine.model), args.prior_weight
    if args.cuda_graphs and device.type == "cuda":
        engine.use_graphs()
    return engine, loaded


def arrange_first_stage(engine: SATVideoDiffusionEngine, config: RunConfig[TrainArgs], plan: DeepSpeedPlan) -> None:
    """Lay the first stage's weights out as fused kernels read them: after DeepSpeed, which cannot hand such tensors to
    other ranks, has started. ZeRO 3 keeps its own layout.
    """
    if engine.first_stage_model is None or config.args.cache_dir or plan.stage == 3:
        return
    if engine.kernels.fused:
        engine.first_stage_model.set_channels_last()


# --- data ---------------------------------------------------------------------------------------------------------


def build_datasets(data: Mapping[str, Any] | None, folders: Sequence[str], reports: Path, name: str) -> list[Dataset]:
    """One data set a folder. Rank 0 checks the videos and writes `reports/NAME_k.jsonl`; the others take its word.

    Raises:
        ConfigError: no `data:` section, or one that does not fit its class.
        DatasetError: a folder without usable clips.
    """
    if not data:
        raise ConfigError("training needs a `data:` section (target: data_video.SFTDataset and its params)")
    section = DataSection.parse(data)
    cls, params = section.cls, section.params
    takes_report = "report" in inspect.signature(cls).parameters
    first = dist.get_rank() == 0
    made: list[Dataset] = []
    for k, folder in enumerate(folders):
        extra: dict[str, Any] = {"data_dir": str(Path(folder).expanduser())}
        if takes_report:
            extra["report"] = reports / f"{name}_{k}.jsonl"
        if first or not takes_report:
            made.append(cls(**{**params, **extra}))
        wait_for_all()
        if not first and takes_report:
            made.append(cls(**{**params, **extra, "validate": "report"}))
    return made


def cache_request(config: RunConfig[TrainArgs], dtype: str, batch_size: int | None = None) -> CacheRequest | None:
    """The cache that a run wants, if it wants one; `dtype` of its encoders, `batch_size` of its VAE."""
    args = config.args
    if not args.cache_dir:
        return None
    return CacheRequest(
        folder=args.cache_dir,
        model=config.model,
        data=config.data,
        clips=args.data_folders,
        storage=args.cache_dtype,
        dtype=dtype,
        fill=args.cache_fill,
        workers=args.num_workers,
        batch_size=batch_size,
        low_memory=args.vae_low_memory,
        accelerate=config.accelerate,
    )


def mark_prior(dataset: Any) -> None:
    """Let a data set's items say that they keep what the model knows.

    Raises:
        ConfigError: a class that is not made for it.
    """
    if not hasattr(dataset, "prior"):
        raise ConfigError(f"args.prior_data: {type(dataset).__name__} gives items without `prior`, see SFTDataset")
    dataset.prior = True


def check_clips(config: RunConfig[TrainArgs], dtype: str) -> None:
    """Whether the `data:` section's clips are possible and the network has positions for them; loads nothing.

    Raises:
        ConfigError: wrong settings, too many frames, a side that the network cannot cut into patches, or one of more
            than `LARGEST_STRETCH` times the network's own.
    """
    section = DataSection.parse(config.data) if config.data else None
    settings = section and section.settings()
    if section is None or settings is None:
        return
    model = training_model_section(config.model, config.args)
    model["conditioner_config"] = None
    network = meta_engine(model, dtype).network
    clips = settings.buckets or (Bucket(settings.max_num_frames, *settings.video_size),)
    problems = [f"{clip}: {problem}" for clip in clips if (problem := _unsuitable(clip, network))]
    if problems:
        sizes = " and ".join(section.names_of("max_num_frames", "video_size"))
        keys = "data.params.buckets does" if settings.buckets else f"data.params.{sizes} do"
        raise ConfigError(f"{keys} not suit this network: {'; '.join(problems)}")


def _unsuitable(clip: Bucket, network: Any) -> str | None:
    """Why a network cannot train on such clips, or None."""
    if clip.height % STRIDES.size_step or clip.width % STRIDES.size_step:
        return f"height and width must be multiples of {STRIDES.size_step}"
    try:
        grid = network.patch.grid(STRIDES.latent_frames(clip.frames), *STRIDES.latent_size(clip.height, clip.width))
        network.mixins.pos_embed.check_grid(grid)
    except ValueError as error:
        return str(error)
    stretch = network.mixins.pos_embed.stretch(grid)
    if stretch > LARGEST_STRETCH:
        own = "x".join(map(str, STRIDES.pixel_size(network.latent_height, network.latent_width)))
        return f"a side is {stretch:.2g} times that of the network's {own} pixels, more than {LARGEST_STRETCH:g}"
    return None


def split_validation(datasets: Sequence[Dataset], split: str, seed: int) -> tuple[list[Dataset], list[Dataset]]:
    """(training, validation) parts of each data set, by `split`'s first two shares; validation may come out empty."""
    train_share, valid_share, test_share = split_shares(split)
    train: list[Dataset] = []
    valid: list[Dataset] = []
    for dataset in datasets:
        count = len(dataset)  # type: ignore[arg-type]
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
        held = int(count * valid_share)
        last = count - int(count * test_share)
        train.append(Subset(dataset, sorted(order[held:last])) if last - held < count else dataset)
        if held:
            valid.append(Subset(dataset, sorted(order[:held])))
    return train, valid


# --- memory -------------------------------------------------------------------------------------------------------


def memory_needs(
    engine: SATVideoDiffusionEngine, config: RunConfig[TrainArgs], plan: DeepSpeedPlan, data_parallel_size: int
) -> MemoryNeeds:
    """Sizes of a run for the estimate; `engine` may lie on the meta device (then without adapters)."""
    trained = sum(p.numel() for p in engine.parameters() if p.requires_grad)
    values = sum(p.numel() for p in engine.parameters())
    if config.args.prior_data and needs_copy(engine.model):
        values += sum(p.numel() for p in engine.model.parameters())
    frames, height, width = _clip_size(config)
    network = engine.network
    grid = network.patch.grid(engine.strides.latent_frames(frames), *engine.strides.latent_size(height, width))
    return MemoryNeeds(
        trained=trained,
        frozen=values - trained,
        tokens=network.mixins.pos_embed.text_length + grid.tokens,
        width=network.hidden_size,
        layers=network.num_layers,
        vae_values=_widest_map(engine, config.model, frames, height, width),
        vae_low_memory=config.args.vae_low_memory,
        micro_batch=plan.micro_batch,
        dtype=plan.dtype,
        ranks=data_parallel_size,
        stage=plan.stage,
        offload=plan.offload,
        moment_bytes=plan.optimizer.moment_bytes,
        ema=plan.optimizer.keeps_ema,
        encoder_values=_values(engine.first_stage_model) + _values(engine.conditioner),
        bucket=_bucket_values(plan, trained),
        checkpointing=network.transformer.checkpoint_activations,
    )


def planned_needs(config: RunConfig[TrainArgs], plan: DeepSpeedPlan, data_parallel_size: int) -> MemoryNeeds:
    """`memory_needs` before anything is loaded. A text encoder whose files are not here counts as T5 XXL."""
    model = training_model_section(config.model, config.args)
    absent = 0 if text_is_local(model) else T5_XXL_VALUES
    if absent:
        model["conditioner_config"] = None
    engine = meta_engine(model, plan.dtype)
    if engine.network.has_lora_config:
        with torch.device("meta"):
            engine.network.attach_lora()
    engine.freeze_untrained()
    needs = memory_needs(engine, config, plan, data_parallel_size)
    return replace(needs, frozen=needs.frozen + absent, encoder_values=needs.encoder_values + absent)


def _clip_size(config: RunConfig[TrainArgs]) -> tuple[int, int, int]:
    """(frames, height, width) in pixels of the longest clip."""
    params = (config.data or {}).get("params") or {}
    network = config.model["network_config"]["params"]
    if params.get("buckets"):
        return max(((int(f), int(h), int(w)) for f, h, w in params["buckets"]), key=math.prod)
    height, width = params.get("video_size") or STRIDES.pixel_size(network["latent_height"], network["latent_width"])
    return int(params.get("max_num_frames") or network["num_frames"]), int(height), int(width)


def _widest_map(engine: SATVideoDiffusionEngine, model: Mapping[str, Any], frames: int, height: int, width: int) -> int:
    """Values of the first stage's largest feature map: its first level at full resolution."""
    if not hasattr(engine.first_stage_model, "encoder") or model.get("latent_input"):
        return 0
    channels = model["first_stage_config"]["params"]["encoder_config"]["params"]["ch"]
    return int(channels) * frames * height * width


def _values(part: nn.Module | None) -> int:
    return sum(p.numel() for p in part.parameters()) if part is not None else 0


def _bucket_values(plan: DeepSpeedPlan, trained: int) -> int:
    """Values in the buffers through which ZeRO 1 and 2 reduce gradients; DeepSpeed's defaults where nothing is said."""
    if plan.stage not in (1, 2):
        return 0
    zero = plan.config["zero_optimization"]
    size = int(zero.get("reduce_bucket_size", 5e8))
    if not plan.offload and not zero.get("contiguous_gradients", True):
        return min(size, trained)  # a flat copy of a bucket's gradients; else buffers of full size, whatever is trained
    return size * (2 if zero.get("overlap_comm") else 1)

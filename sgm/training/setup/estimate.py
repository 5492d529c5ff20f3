"""The memory that a configuration needs: its sizes, from an engine that is loaded or lies on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from sgm.config import RunConfig
from sgm.models.diffusion import SATVideoDiffusionEngine
from sgm.modules.diffusionmodules.image_condition import sampled_frames
from sgm.modules.encoders.modules import text_is_local
from sgm.parallel.apply import most_shares
from sgm.training.distill.engine import DistillationEngine
from sgm.training.memory import MemoryNeeds
from sgm.training.options import TrainArgs
from sgm.training.prior import needs_copy
from sgm.training.setup.deepspeed import DeepSpeedPlan
from sgm.training.setup.model import (
    checked_engine,
    clip_size,
    freeze_untrained,
    loaded_autoencoder,
    streams_frozen,
    training_model_section,
    trains_more_than_lora,
)
from sgm.weights.streaming import frozen_parameters

T5_XXL_VALUES = 4_762_310_656


def memory_needs(
    engine: SATVideoDiffusionEngine, config: RunConfig[TrainArgs], plan: DeepSpeedPlan, replicas: int
) -> MemoryNeeds:
    """Sizes of a run for the estimate; `engine` may lie on the meta device (then without adapters).

    Args:
        replicas: processes that hold the same weights.
    """
    trained = sum(p.numel() for p in engine.parameters() if p.requires_grad)
    values = sum(p.numel() for p in engine.parameters())
    if (config.args.prior_data or config.args.distill) and needs_copy(engine.model):
        values += sum(p.numel() for p in engine.model.parameters())
    frames, height, width = clip_size(config, engine)
    network, autoencoder = engine.network, loaded_autoencoder(engine)
    latents = sampled_frames(engine.strides.latent_frames(frames), network.patch.t)
    grid = network.patch.grid(latents, *engine.strides.latent_size(height, width))
    frozen = [sum(p.numel() for p in frozen_parameters(block)) for block in network.streamable_blocks()]
    picture = _widest_map(engine, config.model, 1, height, width) if engine.noised_image_input else 0
    return MemoryNeeds(
        trained=trained,
        frozen=values - trained,
        tokens=network.mixins.pos_embed.text_length + grid.tokens,
        width=network.hidden_size,
        layers=network.num_layers,
        vae_values=picture if config.args.cache_dir else _widest_map(engine, config.model, frames, height, width),
        picture_values=picture,
        vae_low_memory=config.args.vae_low_memory,
        micro_batch=plan.micro_batch,
        dtype=plan.dtype,
        ranks=replicas,
        shares=config.args.sequence_parallel_size,
        most_shares=1 if config.args.cuda_graphs or config.args.distill else most_shares(network),
        stage=plan.stage,
        offload=plan.offload,
        moment_bytes=plan.optimizer.moment_bytes,
        ema=plan.optimizer.keeps_ema,
        encoder_values=_values(engine.first_stage_model) + _values(engine.conditioner),
        picture_encoder=_values(autoencoder.encoder) if (autoencoder and engine.noised_image_input) else 0,
        bucket=_bucket_values(plan, trained),
        checkpointing=network.transformer.checkpoint_activations,
        in_blocks=sum(frozen),
        in_block=max(frozen),
        streams=streams_frozen(config.args, plan, engine),
        offloads_inputs=config.args.offload_activations,
        refused=_refused(config.args, engine),
    )


def _refused(args: TrainArgs, engine: SATVideoDiffusionEngine) -> frozenset[str]:
    """What the checks in `setup.model`, and those of `args`, would refuse beside the rest of a configuration."""
    has_base = args.prior_data or args.distill  # a second network in each step
    by_reason = {
        "zero_optimization.stage=3": has_base or args.cuda_graphs or engine.network.further_configs,
        "args.checkpoint_activations": args.cuda_graphs,
        "args.cache_dir": args.distill,
        "args.stream_frozen": args.cuda_graphs
        or args.model_parallel_size > 1
        or (has_base and trains_more_than_lora(engine)),
    }
    return frozenset(option for option, reason in by_reason.items() if reason)


def planned_needs(config: RunConfig[TrainArgs], plan: DeepSpeedPlan, replicas: int) -> MemoryNeeds:
    """`memory_needs` before anything is loaded. A text encoder whose files are not here counts as T5 XXL."""
    model = training_model_section(config.model, config.args)
    absent = 0 if text_is_local(model) else T5_XXL_VALUES
    if absent:
        model["conditioner_config"] = None
    engine = checked_engine(model, config.args, plan)
    with torch.device("meta"):
        engine.network.attach_mixins()
    freeze_untrained(engine)
    if isinstance(engine, DistillationEngine):
        engine.add_critic(rate=1.0)  # of which the sizes matter here
    needs = memory_needs(engine, config, plan, replicas)
    return replace(needs, frozen=needs.frozen + absent, encoder_values=needs.encoder_values + absent)


def _widest_map(engine: SATVideoDiffusionEngine, model: Mapping[str, Any], frames: int, height: int, width: int) -> int:
    """Values of the first stage's largest feature map: its first level at full resolution."""
    if loaded_autoencoder(engine) is None or model.get("latent_input"):
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

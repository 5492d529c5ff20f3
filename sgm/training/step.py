"""One training iteration on a DeepSpeed engine: micro-batches, loss, gradient, update, or a clean skip.

Axes: b batch, f pixel frames, t latent frames, c channels, h w height and width.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor

from sgm.cache.dataset import FIRST_FRAME
from sgm.data.clips import to_unit_range
from sgm.distributed import model_parallel_rank, model_parallel_world_size, same_for_clip
from sgm.models.diffusion import SATVideoDiffusionEngine
from sgm.modules.diffusionmodules.denoiser import append_dims
from sgm.modules.diffusionmodules.image_condition import image_latents, repeat_first
from sgm.training.checkpoints.partitions import load_scaler_state, scaler_state
from sgm.training.distill.engine import DistillationEngine
from sgm.training.faults import OVERFLOW
from sgm.training.setup.engine import TrainingEngine
from sgm.training.watch.timing import PhaseClock
from sgm.weights.streaming import Download

LOG_SIGMA = (-3.0, 0.5)  # mean and spread of the noise level's logarithm, in pixels from -1 to 1


def noised(image: Tensor) -> Tensor:
    """Pictures (b, 3, 1, h, w) with noise, not clamped. As in the original, each one's level (`LOG_SIGMA`) is drawn and
    found in float32 on the CPU.
    """
    mean, spread = LOG_SIGMA
    log_sigma = torch.normal(mean, spread, size=(len(image),), device="cpu")
    sigma = log_sigma.exp().to(image.device, image.dtype, non_blocking=True)
    return image + torch.randn_like(image) * append_dims(sigma, image.ndim)


def kept_or_zeros(images: Tensor, dropout: float) -> Tensor:
    """Latents of a batch's pictures, or with probability `dropout` zeros; the same on all processes of a clip.

    As in the original Python's generator is asked: what torch draws afterwards is the same with and without dropout.
    """
    return same_for_clip(torch.zeros_like(images) if random.random() < dropout else images)


def first_frame(engine: SATVideoDiffusionEngine, batch: Mapping[str, Any], device: torch.device) -> Tensor:
    """First frames (b, 3, 1, h, w) in [-1, 1], in the engine's type, of a batch of clips or of cached ones."""
    if FIRST_FRAME in batch:
        pixels = to_unit_range(batch[FIRST_FRAME].to(device, non_blocking=True))
    else:
        pixels = batch[engine.input_key][:, 0].to(device, non_blocking=True)
    return pixels.to(engine.dtype).unsqueeze(2)


BINS = 10
BIN_NAMES = tuple(f"{100 * k:03d}-{100 * k + 99:03d}" for k in range(BINS))  # in thousandths of the schedule


def bin_sums(logs: Mapping[str, Tensor], device: torch.device) -> Tensor:
    """(2, BINS) float64: sum of losses and number of samples by timestep, of what is finite.

    `logs`: `sample_loss` (b,) and `timestep_share` (b,) in [0, 1]; where they are absent all is 0.
    """
    sums = torch.zeros(2, BINS, dtype=torch.float64, device=device)
    if "sample_loss" not in logs:
        return sums
    loss = logs["sample_loss"].double()
    finite = torch.isfinite(loss)
    place = (logs["timestep_share"] * BINS).long().clamp_(0, BINS - 1)
    members = torch.nn.functional.one_hot(place, BINS).double() * finite[:, None]
    return torch.stack([torch.where(finite, loss, 0.0) @ members, members.sum(0)])


def bin_means(sums: Sequence[float], counts: Sequence[float]) -> list[float | None]:
    """Mean loss of each bin; None for an empty one."""
    return [total / count if count else None for total, count in zip(sums, counts)]


_BAD = 1  # place of the number of bad losses among what ranks share


@dataclass(frozen=True)
class StepOutcome:
    """What an iteration did, equal on all ranks.

    Attributes:
        loss: mean over ranks and micro-batches; NaN where one was not finite.
        grad_norm: norm of the whole gradient before clipping, unscaled; None where it is not finite.
        stop: some rank asks to end the run.
        by_timestep: for each of `BINS` equal parts of the timesteps, the sum of losses and the number of samples.
        data_wait: seconds that this rank waited for its micro-batches.
    """

    loss: float
    grad_norm: float | None
    applied: bool
    reason: str = ""
    stop: bool = False
    by_timestep: tuple[list[float], list[float]] = ([0.0] * BINS, [0.0] * BINS)
    data_wait: float = 0.0


def batch_latents(engine: SATVideoDiffusionEngine, batch: Mapping[str, Any], device: torch.device) -> Tensor:
    """Scaled latents (b, t, c, h, w) of a batch's clips: a draw from the first stage's posterior."""
    # Converted there: the CPU would take longer, and what it makes is not page-locked.
    x = batch[engine.input_key].to(device, non_blocking=True).to(engine.dtype)
    if not engine.latent_input:
        x = rearrange(x, "b f c h w -> b c f h w")
    return same_for_clip(rearrange(engine.encode_first_stage(x), "b c t h w -> b t c h w").contiguous())


def engine_inputs(
    engine: SATVideoDiffusionEngine, batch: Mapping[str, Any], device: torch.device
) -> tuple[Tensor, Mapping[str, Any]]:
    """What the engine takes of a batch: latents in a number that its patches divide, and the batch, for models that
    start from a picture with `concat_images` (b, t, c, h, w). A distillation has no clips, but noise.

    Random draws, in the original's order: the picture's noise level (CPU) and noise, its posterior, the clip's
    posterior, and whether the batch goes without pictures (Python's `random`).
    """
    if isinstance(engine, DistillationEngine):
        return engine.start_noise(batch, device), batch
    first = None
    if engine.noised_image_input:
        first = engine.encode_image(noised(first_frame(engine, batch, device)), frames=1)
    z = repeat_first(batch_latents(engine, batch, device), engine.network.patch.t)
    if first is None:
        return z, batch
    first = kept_or_zeros(first, engine.noised_image_dropout)
    return z, {**batch, "concat_images": image_latents(first, z.shape[1], engine.noised_image_all_concat)}


def training_step(
    ds_engine: TrainingEngine,
    batches: Iterator[Mapping[str, Any]],
    clipping: float = 0.0,
    stop_requested: bool = False,
    clock: PhaseClock | None = None,
) -> StepOutcome:
    """Draw the micro-batches of one optimizer step and take it, unless loss or gradient are not finite on some rank.

    `clipping`: largest gradient norm (0: none) where DeepSpeed does not clip, see `DeepSpeedPlan.clipping`. `clock`
    learns how long each phase took.

    A skipped step leaves weights, optimizer and, unless the gradient overflowed in float16, the loss scale as they
    were.
    """
    clock = clock or PhaseClock()
    underway: list[Download] = []
    poison, waited = torch.ones((), dtype=torch.float64, device=ds_engine.device), 0.0
    scaler = scaler_state(ds_engine)
    for _ in range(ds_engine.gradient_accumulation_steps()):
        asked = time.perf_counter()
        with clock.phase("data"):
            batch = next(batches)
        waited += time.perf_counter() - asked
        with clock.phase("vae"):
            z, batch = engine_inputs(ds_engine.module, batch, ds_engine.device)
        with clock.phase("forward"):  # DeepSpeed's own, which prepares the backward pass
            loss, logs = ds_engine(z, batch)
        sums = _sum_over_ranks(loss, stop_requested, bin_sums(logs, loss.device))
        underway.append(Download(sums))
        # A gradient that is NaN throughout makes DeepSpeed drop what has been accumulated, in every ZeRO stage. The
        # device decides it, so that nobody waits for the forward pass here.
        poison = torch.where(sums[_BAD] > 0, math.nan, poison)
        with clock.phase("backward"):
            ds_engine.backward(loss * poison.to(loss.dtype))
        with clock.phase("optimizer"):
            norm = _finish_unwrapped(ds_engine, clipping)
            ds_engine.step()
    total, bad, stop, *bins = (sum(column) for column in zip(*(sums.read().tolist() for sums in underway)))
    if norm is None and (reported := ds_engine.get_global_grad_norm()) is not None:
        norm = float(reported)
    applied = ds_engine.was_step_applied() and norm is not None and math.isfinite(norm)
    if bad:
        load_scaler_state(ds_engine, scaler)
    reason = "the loss is not finite" if bad else OVERFLOW if scaler is not None else "the gradient is not finite"
    return StepOutcome(
        loss=math.nan if bad else total / dist.get_world_size() / len(underway),
        grad_norm=norm if applied else None,
        applied=applied,
        reason="" if applied else reason,
        stop=stop > 0,
        by_timestep=(bins[:BINS], bins[BINS:]),
        data_wait=waited,
    )


def _sum_over_ranks(loss: Tensor, stop: bool, bins: Tensor) -> Tensor:
    """Summed over all ranks, float64: the loss where finite, how many are not, how many want to stop, and `bins`."""
    value = loss.detach().double()
    finite = torch.isfinite(value)
    wants_stop = torch.full_like(value, float(stop))
    own = torch.stack([torch.where(finite, value, 0.0), (~finite).double(), wants_stop])
    sums = torch.cat([own, bins.flatten()])
    dist.all_reduce(sums)
    return sums


def _finish_unwrapped(ds_engine: TrainingEngine, clipping: float) -> float | None:
    """Norm of the gradient, then clipped, in float32 without ZeRO at the end of accumulation; None elsewhere.

    There DeepSpeed neither reports the norm nor looks for NaN, so a bad gradient is removed here: an optimizer passes
    over parameters without one.
    """
    optimizer = ds_engine.basic_optimizer
    if ds_engine.optimizer is not optimizer or not ds_engine.is_gradient_accumulation_boundary():
        return None
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = gradient_norm(parameters)
    if not math.isfinite(norm):
        ds_engine.zero_grad()
    elif clipping and norm > clipping:
        torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], clipping / (norm + 1e-6))
    return norm


def gradient_norm(parameters: list[Tensor]) -> float:
    """L2 norm of all gradients, counting each part of a tensor-parallel weight once."""
    split = model_parallel_world_size() > 1
    counted = [
        p.grad
        for p in parameters
        if p.grad is not None and (not split or getattr(p, "model_parallel", False) or model_parallel_rank() == 0)
    ]
    squares = torch.stack(torch._foreach_norm(counted)).double().square().sum() if counted else torch.zeros(()).double()
    if split:
        from sat import mpu

        squares = squares.to(parameters[0].device)
        dist.all_reduce(squares, group=mpu.get_model_parallel_group())
    return float(squares.sqrt())

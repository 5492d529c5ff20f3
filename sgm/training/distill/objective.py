"""Distribution matching: the mathematics of what moves a few-step student and its critic.

A student's estimate x of the clean latent is noised again, x_t = a_t x + sqrt(1 - a_t^2) eps. Its gradient is that of
KL(student || teacher) at that level, D_critic(x_t) - D_teacher(x_t), where the critic is a network that learns to
denoise what the student makes (Yin et al. 2023, arXiv 2311.18828, eq. 7 and 8; several steps and the critic's own rate:
Yin et al. 2024, arXiv 2405.14867, 4.2 and 4.4). Only the levels between a step's own and the next one's are compared
in trajectory distribution matching (Luo et al. 2025, arXiv 2503.06674): what a step makes is then right where the next
one takes it over, and nothing finer is asked of it.

Axes: b batch, t latent frames, c channels, h w.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sgm.config import ConfigError
from sgm.modules.diffusionmodules.denoiser import append_dims
from sgm.modules.diffusionmodules.sampling import SamplingSchedule, VideoDDIMSampler
from sgm.training.distill.options import ALL, DistillArgs


def compared_timesteps(schedule: SamplingSchedule, levels: str) -> list[range]:
    """For each step of a student the timesteps at which its estimate is compared with the teacher.

    `levels`: see `DistillArgs`. A step's own is left out: the first one's is pure noise, which says nothing.
    """
    begins = schedule.timesteps
    ends = [0] * len(begins) if levels == ALL else [*begins[1:], 0]
    tops = [begins[0]] * len(begins) if levels == ALL else begins
    return [range(end, top) if end < top else range(end, end + 1) for end, top in zip(ends, tops)]


def guidance_tables(sampler: VideoDDIMSampler, count: int, settings: DistillArgs) -> list[Tensor]:
    """For each step of a student (count,) the teacher's guidance scale by timestep.

    That is what the settings say, or the scale of the teacher's first step at or above the timestep.

    Raises:
        ConfigError: the sampler's guider does not say its scale.
    """
    given = settings.guidance_scale
    if not given:
        return [_own_scales(sampler, count)] * settings.steps
    each = given * settings.steps if len(given) == 1 else given
    return [torch.full((count,), scale, device="cpu") for scale in each]


def _own_scales(sampler: VideoDDIMSampler, count: int) -> Tensor:
    steps = torch.tensor(sampler.schedule().timesteps[::-1], device="cpu")
    scales = torch.tensor(sampler.guidance_scales()[::-1], device="cpu")
    if not all(map(math.isfinite, scales.tolist())):
        raise ConfigError(
            f"{type(sampler.guider).__name__} does not say its scale; give the teacher's: "
            "--set args.distill.guidance_scale=6"
        )
    place = torch.searchsorted(steps, torch.arange(count, device="cpu")).clamp(max=len(steps) - 1)
    return scales[place]


def matching_loss(estimate: Tensor, critic: Tensor, teacher: Tensor) -> Tensor:
    """(b,) half the square of (D_critic - D_teacher) / mean |x - D_teacher|, which is the gradient with respect to x.

    All (b, ...) float32; x, the student's estimate, alone carries a gradient. (arXiv 2311.18828, eq. 8.)
    """
    away = (estimate.detach() - teacher).abs().flatten(1).mean(1)
    gradient = (critic - teacher) / append_dims(away, estimate.ndim).clamp(min=1e-6)
    target = estimate.detach() - gradient
    return 0.5 * (estimate - target).square().flatten(1).mean(1)

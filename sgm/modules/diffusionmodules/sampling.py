"""Samplers: from noise to a clean latent, given a denoiser callable and a schedule. Networks and files are not known.

Notation: a = sqrt(abar), the signal rate of a variance-preserving process, from 0 (pure noise) to 1 (clean);
lambda = ln(a / sqrt(1 - a^2)), half the log signal-to-noise ratio; D = the denoiser's estimate of the clean latent;
primes mark the next step. Coefficients are computed in float64 from float32 schedule values, and run through lambda =
-inf at the first step of a zero-terminal-SNR schedule (Lin et al. 2023) without special cases.

Shape letters: b batch, t latent frames, c channels, h w.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor
from tqdm import tqdm

from sgm.modules.diffusionmodules.discretizer import Discretization, Timesteps
from sgm.modules.diffusionmodules.guiders import Conditions, Guider, IdentityGuider
from sgm.typed import Count
from sgm.util import Config, Role, instantiate_from_config

# denoiser(x (b, t, c, h, w), signal rate (b,), conditions, idx=timesteps (b,), **extras) -> clean estimate like x
DenoiserFn = Callable[..., Tensor]
NoiseSampler = Callable[[Tensor], Tensor]  # stands for torch.randn_like
Callback = Callable[[int, int, Tensor, Tensor], None]  # (step index, steps in all, x after the step, D)

# Guidance that adds less than this part of the branches' difference is not computed: 1/500 of what bfloat16 rounds off
# the network's answer. DynamicCFG comes this near to 1 at 2 of 50 steps.
NEGLIGIBLE = 2.0**-17


def guides(scale: float) -> bool:
    """Whether guidance of this scale is computed: where not, the conditional branch alone is asked."""
    return abs(scale - 1) >= NEGLIGIBLE


# --- update rules -----------------------------------------------------------------------------------------------------


def half_log_snr(a: float) -> float:
    """lambda(a) = ln(a / sqrt(1 - a^2)); -inf at a = 0, +inf at a = 1."""
    if a <= 0:
        return -math.inf
    return math.inf if a >= 1 else math.log(a) - 0.5 * math.log1p(-a * a)


def noise_ratio(a: float, a_next: float) -> float:
    """sigma' / sigma = sqrt((1 - a'^2) / (1 - a^2))."""
    return math.sqrt((1 - a_next**2) / (1 - a**2))


def ddim_step(x: Tensor, denoised: Tensor, a: float, a_next: float) -> Tensor:
    """Deterministic DDIM (Song et al. 2020, arXiv 2010.02502, eq. 12 with sigma_t = 0).

    x' = a' D + sigma' eps with eps = (x - a D) / sigma, that is x' = A x + (a' - a A) D with A = sigma' / sigma.
    """
    ratio = noise_ratio(a, a_next)
    return ratio * x + (a_next - a * ratio) * denoised


def extrapolate_2m(denoised: Tensor, previous: Tensor | None, a_prev: float, a: float, a_next: float) -> Tensor:
    """Second-order multistep estimate (1 + 1/(2r)) D - D_prev/(2r), r = (lambda - lambda_prev) / (lambda' - lambda).

    Lu et al. 2022, DPM-Solver++ (arXiv 2211.01095), Algorithm 2. The first step has no `previous` and is of first
    order; so is the second one after a step from a = 0, where r is infinite.
    """
    if previous is None:
        return denoised
    h = half_log_snr(a_next) - half_log_snr(a)
    weight = h / (2 * (half_log_snr(a) - half_log_snr(a_prev)))
    return (1 + weight) * denoised - weight * previous


def dpmpp_ode_step(x: Tensor, estimate: Tensor, a: float, a_next: float) -> Tensor:
    """DPM-Solver++(2M), data prediction (Lu et al. 2022, Algorithm 2): (sigma'/sigma) x - a' expm1(-h) D."""
    h = half_log_snr(a_next) - half_log_snr(a)
    return noise_ratio(a, a_next) * x - a_next * math.expm1(-h) * estimate


def dpmpp_sde_step(x: Tensor, estimate: Tensor, noise: Tensor, a: float, a_next: float) -> Tensor:
    """SDE-DPM-Solver++(2M), the same paper's solver of the diffusion SDE (Lu et al. 2022).

    x' = (sigma'/sigma) e^-h x - a' expm1(-2h) D + sigma' sqrt(1 - e^-2h) eps. From a = 0 (h = inf) x drops out.
    """
    h = half_log_snr(a_next) - half_log_snr(a)
    fresh = -math.expm1(-2 * h)
    deviation = math.sqrt(1 - a_next**2) * math.sqrt(fresh)
    return noise_ratio(a, a_next) * math.exp(-h) * x + a_next * fresh * estimate + deviation * noise


# --- schedule of one run ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One step of a run: signal rates before, at and after it, and the training timestep of the network call."""

    index: int
    total: int
    timestep: int
    a_prev: float  # nan on the first step
    a: float
    a_next: float

    @property
    def is_last(self) -> bool:
        return self.index == self.total - 1


@dataclass(frozen=True)
class SamplingSchedule:
    """Rising signal rates (n + 1, the last is 1) and falling timesteps (n) of a run of n steps."""

    signal: tuple[float, ...]
    timesteps: tuple[int, ...]

    def steps(self) -> Iterator[Step]:
        n = len(self.timesteps)
        for i, timestep in enumerate(self.timesteps):
            a_prev = self.signal[i - 1] if i else math.nan
            yield Step(i, n, timestep, a_prev, self.signal[i], self.signal[i + 1])


@dataclass(frozen=True)
class LinearStep:
    """The arithmetic of one step: x' = x X + estimate D + previous D_prev + noise, with X the sample before it, D the
    estimate and D_prev that of the step before. `signal` is the signal rate a of X."""

    signal: float
    x: float
    estimate: float
    previous: float


# --- samplers ---------------------------------------------------------------------------------------------------------


class VideoDDIMSampler:
    """Deterministic DDIM, and the schedule, guidance and video options that the other samplers inherit.

    Args:
        num_steps: steps of a run; a call may ask for another number.
        guider_config: target of a guider; None for no guidance.
        device: taken from the original's YAML files; the schedule is a handful of numbers, and sampling runs where the
            start noise lies.
        fixed_frames: that many leading latent frames are kept: the caller puts them, clean, into the start value.
        sdedit: noise the kept frames to each step's level before it (Meng et al. 2021, arXiv 2108.01073), instead of
            showing them clean.
    """

    takes_call_scale = True
    # Share of a run's steps that are taken, the last ones, from a clip noised to where they begin (SDEdit: Meng et al.
    # 2021, arXiv 2108.01073). None: a run starts from noise.
    strength: float | None = None
    # Kept frames are shown clean while the signal rate is below this, and noised to the step's level from there on.
    # None: all the time as `sdedit` says.
    clean_below: float | None = None

    def __init__(
        self,
        discretization_config: Annotated[Config, Role(Discretization)],
        num_steps: Timesteps | None = None,
        guider_config: Annotated[Config, Role(Guider)] | None = None,
        verbose: bool = False,
        device: torch.device | str = "cuda",
        fixed_frames: Count = 0,
        sdedit: bool = False,
    ) -> None:
        self.discretization = instantiate_from_config(discretization_config)
        self.num_steps = num_steps
        self.guider: Guider = IdentityGuider() if guider_config is None else instantiate_from_config(guider_config)
        self.verbose = verbose
        self.device = device
        self.fixed_frames = fixed_frames
        self.sdedit = sdedit

    def schedule(self, num_steps: int | None = None) -> SamplingSchedule:
        """The schedule of a run of `num_steps` (None: the configured number).

        Raises:
            ValueError: no number of steps anywhere, one out of range, a `strength` of less than one step, or a
                discretization that is no signal rate.
        """
        n = self.num_steps if num_steps is None else num_steps
        if n is None:
            raise ValueError("no number of steps: set sampler_config.params.num_steps, or give num_steps to the call.")
        values, timesteps = self.discretization(n, do_append_zero=False, device="cpu", return_idx=True)
        signal = (*values.tolist(), 1.0)
        if signal[0] < 0 or any(after <= before for before, after in itertools.pairwise(signal)):
            raise ValueError(
                f"{type(self).__name__} needs signal rates that rise from 0 to 1, but "
                f"{type(self.discretization).__name__} gives {signal[0]:.4g} to {signal[-2]:.4g}. "
                "Set discretization_config to ZeroSNRDDPMDiscretization."
            )
        first = n - self._steps_taken(n)
        return SamplingSchedule(signal[first:], tuple(reversed(timesteps.tolist()))[first:])

    def _steps_taken(self, n: int) -> int:
        if self.strength is None:
            return n
        taken = min(int(n * self.strength), n)
        if taken < 1:
            raise ValueError(
                f"a strength of {self.strength:g} is less than one of {n} steps: give at least {1 / n:.3g}, or more "
                "steps."
            )
        return taken

    def denoise(
        self,
        denoiser: DenoiserFn,
        x: Tensor,
        step: Step,
        cond: Conditions,
        uc: Conditions,
        scale: float | Tensor | None,
        **additional_model_inputs: Any,
    ) -> Tensor:
        """The guided clean estimate, float32 (b, ...): one plain conditional call where `scale` is the number 1, or the
        guider's own does not guide."""
        signal = x.new_full((x.shape[0],), step.a)
        position = self._guidance_position(step)
        if not isinstance(scale, Tensor) and (scale == 1 or not guides(self.guider.scale_at(position, scale))):
            idx = x.new_full((x.shape[0],), step.timestep)
            return denoiser(x, signal, cond, idx=idx, **additional_model_inputs).float()
        guided_x, guided_signal, guided_cond = self.guider.prepare_inputs(x, signal, cond, uc)
        idx = x.new_full((guided_x.shape[0],), step.timestep)
        denoised = denoiser(guided_x, guided_signal, guided_cond, idx=idx, **additional_model_inputs).float()
        return self.guider(denoised, (1 - signal**2).sqrt(), step_index=position, scale=scale)

    def guidance_scales(self, num_steps: int | None = None, scale: float | None = None) -> tuple[float, ...]:
        """The guider's factor on (conditional - unconditional) at each step of a run, 1 where nothing is guided."""
        steps = tuple(self.schedule(num_steps).steps())
        return tuple(self.guider.scale_at(self._guidance_position(step), scale) for step in steps)

    def linear_steps(self, num_steps: int | None = None) -> tuple[LinearStep, ...]:
        """The factors that `update` puts on its arguments at each step of a run, found by asking it."""
        return tuple(
            LinearStep(step.a, *(self._factor(step, which) for which in range(3)))
            for step in self.schedule(num_steps).steps()
        )

    def _factor(self, step: Step, which: int) -> float:
        x, denoised, previous = (torch.tensor(float(k == which), dtype=torch.float64) for k in range(3))
        return float(self.update(x, denoised, previous if step.index else None, step, torch.zeros_like))

    def _guidance_position(self, step: Step) -> int:
        """The configured number of steps minus the timestep: see DynamicCFG, which is the one to read it.

        Under a `strength` the number of those taken, as in diffusers.
        """
        return (step.total if self.strength is not None else self.num_steps or step.total) - step.timestep

    def __call__(
        self,
        denoiser: DenoiserFn,
        x: Tensor,
        cond: Conditions,
        uc: Conditions | None = None,
        num_steps: int | None = None,
        scale: float | Tensor | None = None,
        noise_sampler: NoiseSampler | None = None,
        callback: Callback | None = None,
        *,
        fixed_frames: int | None = None,
        scale_emb: Tensor | None = None,
        ofs: Tensor | None = None,
    ) -> Tensor:
        """Sample.

        Args:
            denoiser: `denoiser(x (b, t, c, h, w), signal rate (b,), conditions, idx=timesteps (b,), **extras)`; with
                guidance b is twice the number of samples, unconditional ones first.
            x: start noise (b, t, c, h, w), standard normal.
            cond, uc: conditions and unconditional conditions (None: the same as `cond`).
            num_steps: steps of this run; None for the configured number.
            scale: replaces the guider's scale where that allows it; the number 1 turns guidance off for this run.
            noise_sampler: stands for `torch.randn_like`, one for one and in the original's order (including the draws
                that it discards), so that a run can be repeated with recorded or per-sample noise.
            callback: called after each step as (step index, steps in all, x, estimate).
            fixed_frames: replaces the configured number; None keeps that.
        Returns:
            Clean latents (b, t, c, h, w), float32.
        Raises:
            ValueError: see `schedule`; or more fixed frames than x has.
        """
        extras = {name: value for name, value in (("scale_emb", scale_emb), ("ofs", ofs)) if value is not None}
        x = x.float()
        prefix = x[:, : self._fixed_count(x, fixed_frames)]
        draw = torch.randn_like if noise_sampler is None else noise_sampler
        scale = self._call_scale(scale)
        previous: Tensor | None = None
        schedule = self.schedule(num_steps)
        hidden = None if self.verbose else True  # None: where there is no terminal
        for step in tqdm(schedule.steps(), total=len(schedule.timesteps), desc="sampling", disable=hidden):
            x = self._with_prefix(x, prefix, step.a, draw)
            denoised = self.denoise(denoiser, x, step, cond, cond if uc is None else uc, scale, **extras)
            x = self.update(x, denoised, previous, step, draw)
            previous = denoised
            if callback is not None:
                callback(step.index, step.total, x, denoised)
        return torch.cat([prefix, x[:, prefix.shape[1] :]], dim=1)

    def update(self, x: Tensor, denoised: Tensor, previous: Tensor | None, step: Step, draw: NoiseSampler) -> Tensor:
        """x at `step` -> x at the next one. `previous` is the estimate of the step before, None on the first."""
        return ddim_step(x, denoised, step.a, step.a_next)

    def _call_scale(self, scale: float | Tensor | None) -> float | Tensor | None:
        if scale is not None and not self.takes_call_scale:
            warnings.warn(
                f"{type(self).__name__} ignores scale={scale} given to the call, as the original does: set "
                "the scale in guider_config.",
                stacklevel=3,
            )
            return None
        return scale

    def _fixed_count(self, x: Tensor, asked: int | None) -> int:
        count = self.fixed_frames if asked is None else asked
        if not 0 <= count <= x.shape[1]:
            raise ValueError(f"fixed_frames={count} does not fit a latent of {x.shape[1]} frames.")
        return count

    def _with_prefix(self, x: Tensor, prefix: Tensor, a: float, draw: NoiseSampler) -> Tensor:
        """x (b, t, c, h, w) with its first frames replaced by the kept ones, noised to signal rate a under sdedit
        and from `clean_below` on."""
        kept = prefix.shape[1]
        if kept == 0:
            return x
        if self.sdedit if self.clean_below is None else a >= self.clean_below:
            prefix = a * prefix + math.sqrt(1 - a**2) * draw(prefix)
        return torch.cat([prefix, x[:, kept:]], dim=1)


class VPSDEDPMPP2MSampler(VideoDDIMSampler):
    """SDE-DPM-Solver++ 2M, the release's default. The last step returns the estimate itself.

    Random draws: one on the first step, none on the last, two on every other (the first of which is discarded: the
    original computes a first-order step before the second-order one), 2n - 3 in all.
    """

    def update(self, x: Tensor, denoised: Tensor, previous: Tensor | None, step: Step, draw: NoiseSampler) -> Tensor:
        if step.is_last:
            return denoised
        noise = draw(x)
        if previous is not None:
            noise = draw(x)  # the original's second draw, the one it uses
        estimate = extrapolate_2m(denoised, previous, step.a_prev, step.a, step.a_next)
        return dpmpp_sde_step(x, estimate, noise, step.a, step.a_next)


class VPODEDPMPP2MSampler(VideoDDIMSampler):
    """DPM-Solver++ 2M, deterministic. The last step returns the estimate itself.

    Kept quirk: a call's `scale` is ignored (a warning says so); only the guider's configured scale counts.
    """

    takes_call_scale = False

    def update(self, x: Tensor, denoised: Tensor, previous: Tensor | None, step: Step, draw: NoiseSampler) -> Tensor:
        if step.is_last:
            return denoised
        estimate = extrapolate_2m(denoised, previous, step.a_prev, step.a, step.a_next)
        return dpmpp_ode_step(x, estimate, step.a, step.a_next)


class RenoisingSampler(VideoDDIMSampler):
    """Multistep consistency sampling (Song et al. 2023, arXiv 2303.01469, Algorithm 1): x' = a' D + sigma' eps.

    For students that estimate the clean latent well from any level. Random draws: one a step, none on the last, which
    returns the estimate itself.
    """

    def update(self, x: Tensor, denoised: Tensor, previous: Tensor | None, step: Step, draw: NoiseSampler) -> Tensor:
        if step.is_last:
            return denoised
        return step.a_next * denoised + math.sqrt(1 - step.a_next**2) * draw(x)

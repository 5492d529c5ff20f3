"""The engine of a distillation: teacher, student and critic on one base, by distribution matching.

A student's estimate x of the clean latent is noised again, x_t = a_t x + sqrt(1 - a_t^2) eps. Its gradient is that of
KL(student || teacher) at that level, D_critic(x_t) - D_teacher(x_t), where the critic is a network that learns to
denoise what the student makes (Yin et al. 2023, arXiv 2311.18828, eq. 7 and 8; several steps and the critic's own rate:
Yin et al. 2024, arXiv 2405.14867, 4.2 and 4.4). Only the levels between a step's own and the next one's are compared
in trajectory distribution matching (Luo et al. 2025, arXiv 2503.06674): what a step makes is then right where the next
one takes it over, and nothing finer is asked of it.

Axes: b batch, t latent frames, c channels, h w.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from sgm.config import ConfigError
from sgm.models.diffusion import Cond, SATVideoDiffusionEngine
from sgm.modules.diffusionmodules.denoiser import DiscreteDenoiser, Network, append_dims
from sgm.modules.diffusionmodules.denoiser_scaling import VideoScaling
from sgm.modules.diffusionmodules.few_steps import FewSteps
from sgm.modules.diffusionmodules.guiders import guide, join_conditions
from sgm.modules.diffusionmodules.loss import add_noise, snr_weight, weighted_error
from sgm.modules.diffusionmodules.sampling import SamplingSchedule, VideoDDIMSampler
from sgm.modules.diffusionmodules.wrappers import NetworkWrapper, OpenAIWrapper
from sgm.modules.ops.graphs import NetworkGraphs
from sgm.modules.ops.recompute import ActivationOffload
from sgm.training.options import ALL, DistillArgs, TrainArgs
from sgm.training.prior import BaseNetwork
from sgm.util import instantiate_from_config

if TYPE_CHECKING:
    from sgm.models.network import DiffusionTransformer  # brings SAT, and with it seconds


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


Wrapped = TypeVar("Wrapped", bound=nn.Module)
COND = "cond"  # entry of a batch: conditions of its prompts


class DistillationEngine(SATVideoDiffusionEngine):
    """`model` is the student. The teacher is the network as it was loaded, the critic a second one that learns.

    Where adapters learn, the three share the base's weights; else each has its own.

    Attributes:
        teacher: the same, without gradients.
        unconditional: conditions (1, ...) that the teacher's guidance steers away from.
    """

    critic: NetworkWrapper[DiffusionTransformer]
    teacher: Network
    unconditional: Cond

    def begin(self, settings: DistillArgs, shape: tuple[int, int, int, int], sampler_config: Mapping[str, Any]) -> None:
        """To be called when the weights lie where they stay, and what learns requires gradients.

        From here on `sampler` is the student's.

        Args:
            sampler_config: of the model section, the teacher's.
        """
        self.shape = shape
        self.teacher = BaseNetwork(self.model)
        self.add_critic(settings.critic_rate)
        assert isinstance(self.denoiser, DiscreteDenoiser)  # see `check_distill`
        self._table = self.denoiser.sigmas
        self._guidance = guidance_tables(self.sampler, len(self._table), settings)
        schedule = self.sampler.schedule(settings.steps)
        self.few_steps = FewSteps(settings.steps, schedule.timesteps, settings.sampler)
        self.sampler = instantiate_from_config(self.few_steps.sampler_config(sampler_config))
        self._steps = list(schedule.steps())
        self._compared = compared_timesteps(schedule, settings.levels)

    def add_critic(self, rate: float) -> None:
        """A second network that begins as `model` and learns at `rate` times its pace."""
        self.critic = _second(self.model, rate)

    def use_graphs(self) -> None:
        super().use_graphs()
        if isinstance(self.critic, OpenAIWrapper):  # as `model`, or the line above had refused it
            self.critic.graphs = NetworkGraphs(self.critic.diffusion_model)

    def offload_activations(self, offload: ActivationOffload) -> None:
        super().offload_activations(offload)
        self.critic.diffusion_model.transformer.offload = offload

    def start_noise(self, batch: Mapping[str, Any], device: torch.device) -> Tensor:
        """The noise (b, t, c, h, w) that the student begins with for a batch of prompts."""
        return torch.randn(len(batch["txt"]), *self.shape, device=device)

    def forward(self, z: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of student and critic together, at one step of the student's way from the noise z (b, t, c, h, w).

        The gradient of neither reaches the other. Logged: the critic's loss by timestep, and the student's, which has
        no minimum to go to: it says how far critic and teacher are apart.
        """
        cond = {name: value.to(z.device, self.dtype, non_blocking=True) for name, value in batch[COND].items()}
        number = int(torch.randint(len(self._steps), (), device="cpu"))
        step = self._steps[number]
        x = self._way_to(number, z, cond)
        estimate = self._estimate(self.model, x, step.a, step.timestep, cond)

        span = self._compared[number]
        idx = torch.randint(span.start, span.stop, (len(z),), device="cpu")
        signal = self._table[idx].to(z.device, non_blocking=True)
        noised = add_noise(estimate.detach(), torch.randn_like(estimate), signal)
        seen = self.denoiser(self.critic, noised, signal, cond, idx=idx.to(z.device, non_blocking=True)).float()
        wanted = self._guided_teacher(noised, signal, idx, self._guidance[number][idx], cond)

        critic_loss = weighted_error(seen, estimate.detach(), snr_weight(signal), "l2")
        student_loss = matching_loss(estimate, seen.detach(), wanted)
        logs = {"sample_loss": critic_loss.detach(), "timestep_share": idx.to(z.device) / len(self._table)}
        loss = student_loss.mean() + critic_loss.mean()
        return loss, {"loss": loss.detach()} | logs

    # --- student ------------------------------------------------------------------------------------------------------

    def _estimate(self, network: Network, x: Tensor, a: float, timestep: int, cond: Cond) -> Tensor:
        """The clean estimate of one step, unguided, as the sampler asks for it."""
        idx = x.new_full((len(x),), timestep)
        return self.denoiser(network, x, x.new_full((len(x),), a), cond, idx=idx).float()

    @torch.no_grad()
    def _way_to(self, number: int, x: Tensor, cond: Cond) -> Tensor:
        """x at the student's step `number`, from where it begins."""
        previous: Tensor | None = None
        for step in self._steps[:number]:
            estimate = self._estimate(self.model, x, step.a, step.timestep, cond)
            x = self.sampler.update(x, estimate, previous, step, torch.randn_like)
            previous = estimate
        return x

    # --- teacher ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _guided_teacher(self, x: Tensor, signal: Tensor, idx: Tensor, scale: Tensor, cond: Cond) -> Tensor:
        """The teacher's clean estimate at timesteps idx (b,), guided by scale (b,), both on the CPU."""
        uncond = {name: value.to(x.device).expand_as(cond[name]) for name, value in self.unconditional.items()}
        both = join_conditions(cond, uncond)
        double = torch.cat([idx] * 2).to(x.device, non_blocking=True)
        answers = self.denoiser(self.teacher, torch.cat([x] * 2), torch.cat([signal] * 2), both, idx=double)
        return guide(answers.float(), scale.to(x.device, non_blocking=True).view(-1, *[1] * (x.ndim - 1)))


def _second(model: Wrapped, rate: float) -> Wrapped:
    """A network of the same values, which shares the frozen ones and learns the others at `rate` times the pace.

    A second network, not a second adapter that is switched to: what is computed again in a backward pass, or recorded
    in a graph, finds its own.
    """
    second = copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})
    for parameter in second.parameters():
        if parameter.requires_grad:
            vars(parameter)["lr_scale"] = rate  # for `parameter_groups`
    return second


def check_distill(args: TrainArgs, zero_stage: int, engine: SATVideoDiffusionEngine) -> None:
    """Whether `args.distill` goes with the rest of a configuration.

    Raises:
        ConfigError: the network cannot be run several times within a step, or parts say too little.
    """
    if not args.distill:
        return
    if zero_stage == 3:
        raise ConfigError(
            "args.distill does not go with deepspeed.zero_optimization.stage: 3; use 0, 1 or 2: "
            "--set deepspeed.zero_optimization.stage=2"
        )
    if engine.noised_image_input:
        raise ConfigError(
            "args.distill: models that start from a picture are not distilled here; take a text-to-video one"
        )
    if not engine.has_sampler:
        raise ConfigError("args.distill needs model.sampler_config: the teacher is the model sampled as it says")
    if not (isinstance(engine.denoiser, DiscreteDenoiser) and isinstance(engine.denoiser.scaling, VideoScaling)):
        raise ConfigError(
            "args.distill needs model.denoiser_config DiscreteDenoiser with VideoScaling, as in "
            "configs/cogvideox_2b_infer.yaml"
        )
    try:
        engine.sampler.schedule(args.distill.steps)
    except ValueError as error:
        raise ConfigError(f"args.distill.steps is {args.distill.steps}: {error}") from error
    guidance_tables(engine.sampler, len(engine.denoiser.sigmas), args.distill)

"""Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598), with the unconditional half first in the batch.

A guider prepares the denoiser's inputs and combines its outputs. A sampler calls, at every step,
`prepare_inputs(x, sigma, cond, uncond)` and then `guider(denoised, sigma, step_index=..., scale=...)`.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from torch import Tensor

from sgm.modules.diffusionmodules.discretizer import Timesteps
from sgm.typed import Range

# Conditions with a batch axis; any other entry must be the same in both halves.
BATCHED_CONDITIONS = ("vector", "crossattn", "concat")

Conditions = Mapping[str, Any]
Scale = Annotated[float, Range(-1e6, 1e6)]


def guide(denoised: Tensor, scale: float | Tensor) -> Tensor:
    """(2b, ...) [unconditional; conditional] -> (b, ...): u + scale (c - u)."""
    uncond, cond = denoised.chunk(2)
    return uncond + scale * (cond - uncond)


def join_conditions(cond: Conditions, uncond: Conditions) -> dict[str, Any]:
    """Stack the unconditional entries before the conditional ones along the batch.

    Raises:
        ValueError: the two do not hold the same entries, or a shared entry differs.
    """
    if set(cond) != set(uncond):
        raise ValueError(f"conditions hold {sorted(cond)}, unconditional ones {sorted(uncond)}: they must match.")
    joined: dict[str, Any] = {}
    for name, value in cond.items():
        if name in BATCHED_CONDITIONS:
            joined[name] = torch.cat([uncond[name], value], dim=0)
        elif _same(value, uncond[name]):
            joined[name] = value
        else:
            raise ValueError(
                f"condition {name!r} differs between the conditional and the unconditional half; "
                f"only {', '.join(BATCHED_CONDITIONS)} may."
            )
    return joined


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and bool((a == b).all()))
    return bool(a == b) if not isinstance(a, Tensor) and not isinstance(b, Tensor) else False


class Guider(ABC):
    """How often the denoiser sees a sample in one step, and what is made of its answers."""

    @abstractmethod
    def prepare_inputs(
        self, x: Tensor, sigma: Tensor, cond: Conditions, uncond: Conditions
    ) -> tuple[Tensor, Tensor, Conditions]:
        """x (b, ...), sigma (b,) and conditions -> the same for the denoiser, batch b or 2b."""

    @abstractmethod
    def __call__(
        self, denoised: Tensor, sigma: Tensor, *, step_index: float | None = None, scale: float | Tensor | None = None
    ) -> Tensor:
        """The denoiser's answer -> (b, ...).

        Args:
            denoised: (b or 2b, ...) as `prepare_inputs` asked for.
            sigma: (b,) noise level, for guiders whose scale follows it (none of those here does).
            step_index: position that a scale schedule is read at.
            scale: replaces the configured scale, where the guider allows it; None keeps that.
        """

    def scale_at(self, step_index: float, scale: float | None = None) -> float:
        """What (conditional - unconditional) is multiplied with at a position of the schedule, `scale` as in a call.

        Infinite, that is never small, where a guider does not say.
        """
        return math.inf


class IdentityGuider(Guider):
    """No guidance: the conditional answer alone. `scale` has nothing to act on and must be None or 1."""

    def prepare_inputs(
        self, x: Tensor, sigma: Tensor, cond: Conditions, uncond: Conditions
    ) -> tuple[Tensor, Tensor, Conditions]:
        return x, sigma, dict(cond)

    def __call__(
        self, denoised: Tensor, sigma: Tensor, *, step_index: float | None = None, scale: float | Tensor | None = None
    ) -> Tensor:
        self._demand_none(scale)
        return denoised

    def scale_at(self, step_index: float, scale: float | None = None) -> float:
        self._demand_none(scale)
        return 1.0

    def _demand_none(self, scale: float | Tensor | None) -> None:
        if scale is not None and not (isinstance(scale, int | float) and scale == 1):
            raise ValueError(f"scale={scale} needs a guider: set sampler_config.params.guider_config to VanillaCFG.")


class VanillaCFG(Guider):
    """Guidance with a constant scale; a call's own `scale` replaces it."""

    def __init__(self, scale: Scale) -> None:
        self.scale = scale

    def prepare_inputs(
        self, x: Tensor, sigma: Tensor, cond: Conditions, uncond: Conditions
    ) -> tuple[Tensor, Tensor, Conditions]:
        return torch.cat([x] * 2), torch.cat([sigma] * 2), join_conditions(cond, uncond)

    def __call__(
        self, denoised: Tensor, sigma: Tensor, *, step_index: float | None = None, scale: float | Tensor | None = None
    ) -> Tensor:
        return guide(denoised, self.scale if scale is None else scale)

    def scale_at(self, step_index: float, scale: float | None = None) -> float:
        return self.scale if scale is None else scale


class DynamicCFG(VanillaCFG):
    """Guidance with a scale that swings between 1 and 1 + `scale`, as the CogVideoX release uses it.

    s = 1 + scale (1 - cos(pi (k / num_steps)^exp)) / 2

    Kept quirk: k is not the number of the step but the sampler's number of steps minus the *timestep* (0 to 999), two
    different units in one subtraction. So k is -949 at the first of 50 steps and the scale jumps about (2.29, 2.54,
    6.97, 6.42, ...) instead of rising smoothly. The released models are sampled this way, and other
    implementations do the same. The formula here is read at whatever k the sampler gives.

    Kept quirk: a call's own `scale` has no effect (a warning says so); only the configured one counts.

    Args:
        scale: height of the swing.
        exp: an integer, since k is mostly negative.
        num_steps: the schedule's length; need not be the sampler's.
    """

    def __init__(self, scale: Scale, exp: Annotated[int, Range(0, 64)], num_steps: Timesteps) -> None:
        super().__init__(scale)
        self.exp = exp
        self.num_steps = num_steps

    def scale_at(self, step_index: float, scale: float | None = None) -> float:
        """The scale at position k; `scale` has no effect."""
        return 1 + self.scale * (1 - math.cos(math.pi * (step_index / self.num_steps) ** self.exp)) / 2

    def __call__(
        self, denoised: Tensor, sigma: Tensor, *, step_index: float | None = None, scale: float | Tensor | None = None
    ) -> Tensor:
        if step_index is None:
            raise ValueError("DynamicCFG needs step_index, the position that its scale is read at.")
        if scale is not None:
            warnings.warn(
                f"DynamicCFG ignores scale={scale} given to the call: it follows its own configured curve. "
                "For a constant scale set guider_config to VanillaCFG.",
                stacklevel=2,
            )
        return guide(denoised, self.scale_at(step_index))

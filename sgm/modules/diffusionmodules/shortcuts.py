"""Fewer network calls in a sampling run: approximations between a sampler and its denoiser, each off by default.

A sampler asks its denoiser for the clean estimates of the unconditional and the conditional branch at every step. A
`ShortcutRun` stands between the two and answers some of these questions from earlier answers. Neither sampler nor
guider knows of it. Its state belongs to one run (one video): make a new one for each.

b samples; a guided call has a batch of 2b, unconditional half first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sgm.modules.diffusionmodules.denoiser import append_dims
from sgm.modules.diffusionmodules.guiders import BATCHED_CONDITIONS
from sgm.modules.ops.step_cache import FirstBlockCache, SkipRule

DenoiserFn = Callable[..., Tensor]


@dataclass(frozen=True)
class GuidanceRule:
    """When the unconditional branch is asked.

    Attributes:
        start, end: part of the run, from 0 (noise) to 1, that is guided at all (Kynkaanniemi et al. 2024,
            arXiv:2404.07724); outside it the conditional answer stands alone.
        every: inside that part the branch is asked at every k-th whole conditional call; in between the last
            difference of the two answers is used again, in terms of the predicted noise, where it changes least.
        least: the difference is also used again where the guider multiplies it by less than this (|scale - 1|).
        keep_first: at so many first steps of the run, which decide what is where, the branch is asked all the same.
    """

    start: float = 0.0
    end: float = 1.0
    every: int = 1
    least: float = 0.0
    keep_first: int = 0

    def guides(self, step: int, steps: int) -> bool:
        """Whether step `step` of `steps` is guided: its middle lies in the part."""
        return self.start <= (step + 0.5) / steps <= self.end


@dataclass(frozen=True)
class Shortcuts:
    """The approximations of a run; `skip` is the step cache's rule, None for no step cache."""

    skip: SkipRule | None = None
    guidance: GuidanceRule = GuidanceRule()


@dataclass
class CallCount:
    """Passes of each sample through the network: whole ones, ones of the first layer alone, and what is usual."""

    whole: int = 0
    first_layer: int = 0
    usual: int = 0


@dataclass(frozen=True)
class DenoiserCall:
    """What a sampler asks: x (b or 2b, ...), signal rates (b or 2b,), conditions, and the denoiser's keywords."""

    x: Tensor
    signal: Tensor
    conditions: Mapping[str, Any]
    extras: Mapping[str, Any]

    def half(self, which: slice) -> DenoiserCall:
        """The part of a guided call that concerns one branch."""
        conditions = {n: v[which] if n in BATCHED_CONDITIONS else v for n, v in self.conditions.items()}
        extras = {n: v[which] if n == "idx" and v is not None else v for n, v in self.extras.items()}
        return DenoiserCall(self.x[which], self.signal[which], conditions, extras)


class ShortcutRun:
    """One sampling run under `shortcuts`. `around` starts it and forgets all that a run before has left."""

    def __init__(self, shortcuts: Shortcuts):
        self.shortcuts = shortcuts
        self._start(0, ())

    def _start(self, samples: int, scales: Sequence[float]) -> None:
        self.samples = samples
        self.scales = tuple(scales)
        self.calls = CallCount()
        skip = self.shortcuts.skip
        self._cache = FirstBlockCache(skip, len(self.scales), samples) if skip else None
        self._step = 0
        self._since_pair = 0  # whole conditional calls since both branches were asked
        self._difference: Tensor | None = None  # see `_keep_difference`

    def around(self, denoiser: DenoiserFn, samples: int, scales: Sequence[float]) -> DenoiserFn:
        """`denoiser` with the shortcuts before it; to be called once a step, in order.

        Args:
            samples: b.
            scales: the guider's factor on (conditional - unconditional) at each step of the run, see
                `VideoDDIMSampler.guidance_scales`.
        """
        self._start(samples, scales)

        def denoise(x: Tensor, signal: Tensor, conditions: Mapping[str, Any], **extras: Any) -> Tensor:
            call = DenoiserCall(x, signal, conditions, extras)
            guided = x.shape[0] == 2 * samples
            self.calls.usual += 2 if guided else 1
            out = self._call_guided(denoiser, call) if guided else self._call_conditional(denoiser, call)
            self._step += 1
            return out

        return denoise

    def _call_guided(self, denoiser: DenoiserFn, call: DenoiserCall) -> Tensor:
        """A guider's pair (2b, ...)."""
        both = self._needs_both()
        if both and (self._difference is None or not self._may_skip()):
            return self._call_both(denoiser, call)
        cond = self._call_conditional(denoiser, call.half(slice(self.samples, None))).float()
        if not self.shortcuts.guidance.guides(self._step, len(self.scales)):
            return torch.cat([cond, cond])
        if self._difference is None or (both and not self._cache_skipped()):
            uncond = self._call(denoiser, call.half(slice(self.samples))).float()
            self._keep_difference(uncond, cond, call.signal)
            return torch.cat([uncond, cond])
        return torch.cat([cond - self._difference * self._noise_over_signal(call.signal, cond.ndim), cond])

    def _call_both(self, denoiser: DenoiserFn, call: DenoiserCall) -> Tensor:
        """One call for both branches, as without shortcuts."""
        out = self._call_conditional(denoiser, call)
        uncond, cond = out.float().chunk(2)
        self._keep_difference(uncond, cond, call.signal)
        return out

    def _keep_difference(self, uncond: Tensor, cond: Tensor, signal: Tensor) -> None:
        """Keep the difference of the branches as one of predicted noise (but for its sign): with
        eps = (x - a D) / sigma that is D's times a / sigma. At a = 0 there is none."""
        self._since_pair = 0
        if float(signal[0]) > 0:
            self._difference = (cond - uncond) / self._noise_over_signal(signal, cond.ndim)

    def _noise_over_signal(self, signal: Tensor, ndim: int) -> Tensor:
        """sigma / a for b samples, to broadcast against `ndim` axes."""
        signal = signal[: self.samples]
        return append_dims((1 - signal**2).sqrt() / signal, ndim)

    def _needs_both(self) -> bool:
        rule = self.shortcuts.guidance
        if not rule.guides(self._step, len(self.scales)):
            return False
        due = self._since_pair + 1 >= rule.every and abs(self.scales[self._step] - 1) >= rule.least
        return due or self._step < rule.keep_first or self._difference is None

    def _may_skip(self) -> bool:
        if self._cache is None:
            return False
        self._cache.step = self._step
        return self._cache.may_skip()

    def _cache_skipped(self) -> bool:
        return self._cache is not None and self._cache.skipped > 0

    def _call_conditional(self, denoiser: DenoiserFn, call: DenoiserCall) -> Tensor:
        """An answer that the step cache, if there is one, sees and may shorten."""
        if self._cache is None:
            self._since_pair += 1
            return self._call(denoiser, call)
        self._cache.step = self._step
        out = denoiser(call.x, call.signal, call.conditions, layer_runner=self._cache, **call.extras)
        if self._cache_skipped():
            self.calls.first_layer += 1
        else:
            self._since_pair += 1
            self.calls.whole += call.x.shape[0] // self.samples
        return out

    def _call(self, denoiser: DenoiserFn, call: DenoiserCall) -> Tensor:
        """The denoiser's own answer."""
        self.calls.whole += call.x.shape[0] // self.samples
        return denoiser(call.x, call.signal, call.conditions, **call.extras)

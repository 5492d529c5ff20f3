"""Fewer network calls in a sampling run: approximations between a sampler and its denoiser, each off by default.

A sampler asks its denoiser for the clean estimates of the unconditional and the conditional branch at every step. A
`ShortcutRun` stands between the two and answers some of these questions from earlier answers. Neither sampler nor
guider knows of it. Its state belongs to one run (one video): make a new one for each.

Two answers are kept: the conditional estimate, and the difference of the branches as one of predicted noise, where it
changes least. The last one stands in for those that are not asked for. The estimate is the posterior's mean of the
clean latent, a martingale along the reverse process: what a step changes comes of its own fresh noise, so the last
value is the best forecast (first-order extrapolation errs by a half more, on measurement), and its error grows with the
root of the steps since. When the next answer comes, the steps between are taken to have gone straight from the last one
to it, and what the sample lacks for that is made good at once (`backlog`).

b samples; a guided call has a batch of 2b, unconditional half first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sgm.modules.diffusionmodules.guiders import BATCHED_CONDITIONS
from sgm.modules.diffusionmodules.sampling import DenoiserFn, LinearStep

# Weights of errors, as measured on the demo model: 1 in the middle of a run; before that they decide what is where,
# and the more so the less of it is seen; after it, few steps are left to correct them.
DECIDED = 0.02  # signal-to-noise ratio a^2 / sigma^2 from which on the layout stands
LATE, LATE_POWER = 8.0, 1.2  # (8 / steps left)^1.2
ACTS = 0.1  # |scale - 1| from which on guidance counts at the steps that are always asked


@dataclass(frozen=True)
class Shortcuts:
    """The approximations of a run.

    An answer is asked for when the errors of the steps since the last one, weighted and added up, would exceed `error`:
    each sample's own, from how its answers have changed.

    Attributes:
        error: root mean square in units of the latents (the estimate itself has about 0.8); 0: all is asked.
        keep_first, keep_last: so many steps at either end are always asked; three are needed to measure a change.
        start, end: part of the run, from 0 (noise) to 1, that is guided at all (Kynkaanniemi et al. 2024,
            arXiv:2404.07724); outside it the conditional answer stands alone.
    """

    error: float = 0.0
    keep_first: int = 3
    keep_last: int = 1
    start: float = 0.0
    end: float = 1.0

    def guides(self, step: int, steps: int) -> bool:
        """Whether step `step` of `steps` is guided: its middle lies in the part."""
        return self.start <= (step + 0.5) / steps <= self.end


def error_weight(signal: float, steps_left: int) -> float:
    """How much more an error of the estimate at signal rate a counts than one in the middle of the run."""
    ratio = signal**2 / (1 - signal**2)
    early = DECIDED / max(ratio, 1e-6)
    return max(1.0, early) * max(1.0, LATE / steps_left**LATE_POWER)


# --- what is kept -----------------------------------------------------------------------------------------------------


class KeptAnswer:
    """The last answer of a kind, and how such answers change."""

    def __init__(self) -> None:
        self.value: Tensor | None = None
        self.step = -1
        self.variance = math.inf  # mean square change from step to step, inf before it was measured
        self.spent = 0.0  # weighted errors, added up, of the steps since

    def expected_error(self, step: int) -> float:
        """Root mean square error of the value in the place of that of `step`."""
        return math.sqrt(self.variance * (step - self.step))

    def renew(self, value: Tensor, step: int) -> Tensor | None:
        """Keep the answer of `step`; returns its change, None for the first one."""
        change = None if self.value is None else value - self.value
        if change is not None:
            self.variance = float(change.square().mean()) / (step - self.step)
        self.value, self.step, self.spent = value, step, 0.0
        return change


def backlog(steps: Sequence[LinearStep], last: int, now: int, weights: Sequence[float]) -> tuple[float, float]:
    """What a run lacks at step `now` if an answer went straight from its value at `last` to that at `now`, but the
    steps between were given the one of `last`: parts of the answer's change that are missing in the sample x and in
    the estimate of the step before. `weights`: each step's factor from the answer to the guided estimate."""
    x = previous = 0.0
    for j in range(last + 1, now):
        share = (j - last) / (now - last) * weights[j]
        x, previous = steps[j].x * x + steps[j].estimate * share + steps[j].previous * previous, share
    return x, previous


@dataclass
class CallCount:
    """Passes of each sample through the network: those made, and those that are usual."""

    whole: int = 0
    usual: int = 0

    def __add__(self, other: CallCount) -> CallCount:
        return CallCount(self.whole + other.whole, self.usual + other.usual)


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


# --- a run ------------------------------------------------------------------------------------------------------------


class ShortcutRun:
    """One sampling run under `shortcuts`. `around` starts it and forgets all that a run before has left."""

    def __init__(self, shortcuts: Shortcuts):
        self.shortcuts = shortcuts
        self._start(0, (), ())

    def _start(self, samples: int, scales: Sequence[float], steps: Sequence[LinearStep]) -> None:
        guides = self.shortcuts.guides
        self.samples = samples
        self.steps = tuple(steps)
        self.calls = CallCount()
        # what the guider multiplies the difference of the branches with, beyond the conditional answer
        self.excess = tuple(s - 1 if guides(k, len(scales)) else 0.0 for k, s in enumerate(scales))
        self._step = 0
        self._estimate = KeptAnswer()
        self._difference = KeptAnswer()
        self._owed_x: Tensor | None = None  # what x lacks, and the estimate that the sampler had at the step before
        self._owed_previous: Tensor | None = None

    def around(
        self, denoiser: DenoiserFn, samples: int, scales: Sequence[float], steps: Sequence[LinearStep]
    ) -> DenoiserFn:
        """`denoiser` with the shortcuts before it; to be called once a step, in order.

        Args:
            samples: b. Measured errors are those of all together: give one, so that its company changes nothing.
            scales: the guider's factor on (conditional - unconditional) at each step of the run, see
                `VideoDDIMSampler.guidance_scales`.
            steps: the sampler's own arithmetic, see `VideoDDIMSampler.linear_steps`.
        """
        self._start(samples, scales, steps)

        def denoise(x: Tensor, signal: Tensor, conditions: Mapping[str, Any], **extras: Any) -> Tensor:
            call = DenoiserCall(x, signal, conditions, extras)
            guided = x.shape[0] == 2 * samples
            self.calls.usual += 2 if guided else 1
            out = self._answer(denoiser, call, guided)
            self._step += 1
            return out

        return denoise

    def _answer(self, denoiser: DenoiserFn, call: DenoiserCall, guided: bool) -> Tensor:
        """The estimates of both branches (2b, ...), or of the conditional one (b, ...)."""
        passes = self._passes(guided)
        if passes == 2:
            uncond, cond = self._call(denoiser, call).float().chunk(2)
            self._keep_estimate(cond)
            self._keep_difference(uncond, cond)
            return self._settle(torch.cat([uncond, cond]))
        if passes == 1:
            asked = call.half(slice(self.samples, None)) if guided else call
            cond = self._call(denoiser, asked).float()
            self._keep_estimate(cond)
        else:
            assert self._estimate.value is not None  # a step is asked before one is skipped
            cond = self._estimate.value
        return self._settle(torch.cat([self._unconditional(cond), cond]) if guided else cond)

    def _unconditional(self, cond: Tensor) -> Tensor:
        """The other branch's estimate by the kept difference; the same as the conditional one where none is guided."""
        if self._difference.value is None or not self.excess[self._step]:
            return cond
        return cond - self._difference.value * self._noise_over_signal(self._step)

    def _call(self, denoiser: DenoiserFn, call: DenoiserCall) -> Tensor:
        """The denoiser's own answer."""
        self.calls.whole += call.x.shape[0] // self.samples
        return denoiser(call.x, call.signal, call.conditions, **call.extras)

    # --- which questions are asked ------------------------------------------------------------------------------------

    def _passes(self, guided: bool) -> int:
        """What is asked of the network: 2 for both branches, 1 for the conditional one, 0 for nothing."""
        rule, step, steps = self.shortcuts, self._step, len(self.steps)
        if not rule.error:
            return 2 if guided and rule.guides(step, steps) else 1
        excess = abs(self.excess[step]) if guided else 0.0
        both = self._exceeds(self._difference, excess * (self._noise_over_signal(step) or 1.0))
        if step < rule.keep_first or step >= steps - rule.keep_last:
            return 2 if both or excess > ACTS else 1
        return 2 if both else int(self._exceeds(self._estimate, 1.0))

    def _exceeds(self, kept: KeptAnswer, factor: float) -> bool:
        """Whether the kept answer would err too much by now; else this step's error is added to what it has spent."""
        if not factor:
            return False
        weight = factor * error_weight(self.steps[self._step].signal, len(self.steps) - self._step)
        spent = kept.spent + weight * kept.expected_error(self._step)
        if spent <= self.shortcuts.error:
            kept.spent = spent
        return spent > self.shortcuts.error

    # --- what is kept, and what is made good --------------------------------------------------------------------------

    def _keep_estimate(self, cond: Tensor) -> None:
        self._renew(self._estimate, cond, [1.0] * len(self.steps))

    def _keep_difference(self, uncond: Tensor, cond: Tensor) -> None:
        """Keep the difference of the branches as one of predicted noise (but for its sign): with
        eps = (x - a D) / sigma that is D's times a / sigma. At a = 0 there is none."""
        if self.steps[self._step].signal > 0:
            weights = [e * self._noise_over_signal(k) for k, e in enumerate(self.excess)]
            self._renew(self._difference, (cond - uncond) / self._noise_over_signal(self._step), weights)

    def _renew(self, kept: KeptAnswer, value: Tensor, weights: Sequence[float]) -> None:
        last = kept.step
        change = kept.renew(value, self._step)
        if change is None or last + 1 == self._step:
            return
        x, previous = backlog(self.steps, last, self._step, weights)
        self._owed_x = _sum(self._owed_x, x * change)
        self._owed_previous = _sum(self._owed_previous, previous * change)

    def _settle(self, estimates: Tensor) -> Tensor:
        """The estimates (b or 2b, ...), changed so that the sampler's next x is what it would be without the backlog.

        Then the sampler has a wrong estimate of this step, which the next one makes good in turn.
        """
        step = self.steps[self._step]
        due = _sum(_times(self._owed_x, step.x), _times(self._owed_previous, step.previous))
        self._owed_x = self._owed_previous = None
        if due is None:
            return estimates
        due = due / step.estimate
        self._owed_previous = -due
        return estimates + torch.cat([due] * (estimates.shape[0] // self.samples))

    def _noise_over_signal(self, step: int) -> float:
        """sigma / a; 0 at pure noise, where the branches' difference is not used."""
        a = self.steps[step].signal
        return math.sqrt(1 - a**2) / a if a else 0.0


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _times(a: Tensor | None, factor: float) -> Tensor | None:
    return None if a is None or not factor else a * factor

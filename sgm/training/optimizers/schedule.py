"""Learning rate by optimizer step: warm-up, then linear, cosine or constant, with the original's fine-tuning start.

The original holds a fine-tuning run's first 100 optimizer steps at 5 % of the learning rate (or below, while warm-up
asks for less), whatever the warm-up setting. That is kept: `hold_steps`, 0 turns it off.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sgm.typed import ConfigError

STYLES = ("linear", "cosine", "constant", "exponential", "None")


@dataclass(frozen=True)
class ScheduleSettings:
    """What the learning rate does over a run.

    Attributes:
        total_steps: optimizer steps over which it decays (N).
        warmup: share of `total_steps` spent rising linearly from 0.
        style: "linear" to 0, "cosine" to `decay_ratio * base_lr`, or "constant"; "exponential" and "None" are
            constant too, as in the original.
        decay_ratio: final share of `base_lr` under "cosine".
        hold_steps: optimizer steps at the start held at `hold_rate * base_lr` or below.
        warmup_steps: of a run that was made longer since, in place of `warmup * total_steps`.
    """

    base_lr: float
    total_steps: int
    warmup: float = 0.01
    style: str = "linear"
    decay_ratio: float = 0.1
    hold_steps: int = 100
    hold_rate: float = 0.05
    warmup_steps: float | None = None

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise ConfigError(f"lr_decay_style {self.style!r} is not one of {', '.join(STYLES)}")
        if not 0 <= self.warmup <= 1:
            raise ConfigError(f"warmup {self.warmup} is a share of the run and must lie in [0, 1]")
        if not 0 < self.decay_ratio <= 1:
            raise ConfigError(f"lr_decay_ratio {self.decay_ratio} must lie in (0, 1]")
        if self.base_lr < 0 or not math.isfinite(self.base_lr):
            raise ConfigError(f"the learning rate {self.base_lr} must be a finite number >= 0")

    @property
    def rising_steps(self) -> float:
        """Optimizer steps of the warm-up."""
        return self.warmup * max(1, self.total_steps) if self.warmup_steps is None else self.warmup_steps


def learning_rate(settings: ScheduleSettings, step: int) -> float:
    """Rate of optimizer step `step` (from 0).

    With k = step + 1 and w = warmup * N: k <= hold_steps: min(hold_rate lr, lr k/w); k <= w: lr k/w; afterwards
    linear lr (N - (k - w))/N, not below 0, or cosine lr r ((cos(pi p) + 1)(1/r - 1)/2 + 1), p = min(1, (k - w)/N).
    """
    k, total = step + 1, max(1, settings.total_steps)
    warmup_steps = settings.rising_steps
    rising = settings.base_lr * k / warmup_steps if k <= warmup_steps else math.inf
    if k <= settings.hold_steps:
        return min(settings.hold_rate * settings.base_lr, rising)
    if k <= warmup_steps:
        return rising
    progress, lr, ratio = (k - warmup_steps) / total, settings.base_lr, settings.decay_ratio
    if settings.style == "linear":
        return lr * max(0.0, 1.0 - progress)
    if settings.style == "cosine":
        swing = (math.cos(math.pi * min(1.0, progress)) + 1.0) * (1.0 / ratio - 1.0) / 2.0
        return lr * ratio * (swing + 1.0)
    return lr


class LearningRate:
    """Writes the rate of the current optimizer step into an optimizer's parameter groups.

    `steps` counts optimizer steps that were applied; skipped ones (overflow, NaN) do not move it. A group's
    `lr_scale` multiplies the rate.
    """

    def __init__(self, settings: ScheduleSettings, param_groups: Sequence[dict[str, Any]]):
        self.settings = settings
        self.param_groups = param_groups
        self.steps = 0
        self._apply()

    @property
    def current(self) -> float:
        """The rate in force for the next optimizer step."""
        return learning_rate(self.settings, self.steps)

    def step(self) -> None:
        """An optimizer step was applied."""
        self.steps += 1
        self._apply()

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "warmup_steps": self.settings.rising_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken. The warm-up stays that run's; the decay ends where these settings say."""
        self.settings = dataclasses.replace(self.settings, warmup_steps=state.get("warmup_steps"))
        self.steps = int(state["steps"])
        self._apply()

    def _apply(self) -> None:
        for group in self.param_groups:
            group["lr"] = self.current * group.get("lr_scale", 1.0)

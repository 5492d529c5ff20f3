"""Averaged weights (EMA) inside an optimizer's state: `state[p]["shadow"]`, a float32 copy that follows p."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

EMA_LIMIT = 0.9999


def ema_decay(updates: int, limit: float = EMA_LIMIT) -> float:
    """Decay of the averaged weights after `updates` optimizer steps: min(limit, (1 + k)/(10 + k))."""
    return min(limit, (1 + updates) / (10 + updates))


@dataclass(frozen=True)
class ShadowSettings:
    """How an optimizer averages: shadow <- d shadow + (1 - d) p after each update; starts as p before its first one.

    Attributes:
        kept: False keeps no average, which saves 4 bytes a value.
        limit: largest d.
        grows: d rises with the number of updates, see `ema_decay`; False: always `limit`.
    """

    kept: bool
    limit: float
    grows: bool

    def __post_init__(self) -> None:
        if not 0 <= self.limit <= 1:
            raise ValueError(f"ema_decay {self.limit} must lie in [0, 1]")

    def begin(self, p: Tensor, state: dict[str, Any]) -> None:
        """Call before a parameter's update."""
        if self.kept and "shadow" not in state:
            state["shadow"], state["updates"] = p.detach().float().clone(), 0

    def follow(self, p: Tensor, state: dict[str, Any]) -> None:
        """Call after a parameter's update."""
        if not self.kept:
            return
        state["updates"] += 1
        decay = ema_decay(state["updates"], self.limit) if self.grows else self.limit
        state["shadow"].lerp_(p.float(), 1.0 - decay)

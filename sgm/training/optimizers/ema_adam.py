"""AdamW with an averaged copy of the weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sgm.typed import ConfigError

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


# Without its wrapper, which imports PyTorch's compiler (2 s) to be left out of it, and takes care of gradients as here.
_ADAMW_STEP = inspect.unwrap(torch.optim.AdamW.step)


class FusedEmaAdam(torch.optim.AdamW):
    """AdamW (Loshchilov & Hutter 2019) that keeps an exponential moving average of the weights, `state[p]["shadow"]`.

    Serves the name `sat.ops.FusedEmaAdam` without a compiled extension; torch's fused AdamW does the update. Per
    parameter: p <- p - lr (m'/(sqrt(v') + eps) + weight_decay p) with bias-corrected m', v'; then
    shadow <- d shadow + (1 - d) p with d from `ema_decay`. The shadow starts as the parameter before its first update.

    Args:
        ema: False keeps no average: 4 bytes a value less, and no `-ema` checkpoints.
        bias_correction, adam_w_mode, amsgrad, set_grad_none: names of the original; only its defaults are available.
        ema_decay: limit of the decay.
        use_num_upates: let the decay rise with the number of updates (the original's spelling); False: `ema_decay`.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
        ema: bool = True,
        ema_decay: float = EMA_LIMIT,
        use_num_upates: bool = True,
    ):
        if not bias_correction or not adam_w_mode or amsgrad:
            raise ConfigError(
                "FusedEmaAdam is AdamW with bias correction; bias_correction: false, adam_w_mode: false and amsgrad: "
                "true are not available. Use optimizer.type torch.optim.Adam for L2 decay or amsgrad (no EMA)."
            )
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        self.shadows = ShadowSettings(ema, ema_decay, use_num_upates)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        every = [p for group in self.param_groups for p in group["params"]] if self.shadows.kept else []
        updated = [p for p in every if p.grad is not None]
        # torch initialises a parameter's state only while it is empty, so new shadows are put there afterwards
        first: dict[Tensor, dict[str, Any]] = {p: {} for p in updated if "shadow" not in self.state.get(p, ())}
        for p, state in first.items():
            self.shadows.begin(p, state)
        result = _ADAMW_STEP(self, closure)
        for p in updated:
            self.state[p].update(first.get(p, ()))
            self.shadows.follow(p, self.state[p])
        return result

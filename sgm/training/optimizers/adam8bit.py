"""AdamW whose moments take 1 byte a value each, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sgm.training.optimizers.averaging import EMA_LIMIT, ShadowSettings
from sgm.training.optimizers.log_codes import BLOCK, MOST_BLOCKS, decode, empty_codes, encode

# Values worked on at a time. On a GPU: bounds the float32 temporaries to about 200 MB. On a CPU: fits its caches, with
# enough for 16 cores. (Not by the number of cores: rounding depends on it, and a resumed run shall repeat itself.)
SLICE_VALUES = {"cuda": MOST_BLOCKS * BLOCK, "cpu": 1 << 19}
CALLS_PER_SLICE = 4  # numbers for rounding that one slice of one step uses up


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019) with both moments in 8 bits (see `sgm.training.optimizers.log_codes`).

    Per parameter p <- p - lr (m'/(sqrt(v') + eps) + weight_decay p), with m' and v' bias-corrected and taken before
    they are rounded for keeping. The state holds `m_codes` int8, `v_codes` uint8 and a `tops` int16 for every 256
    values of each: 2.02 bytes a value instead of 8.

    Args:
        ema: also keep averaged weights, in float32 (4 bytes a value), as `FusedEmaAdam` does.
        ema_decay, use_num_upates: see there.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        ema: bool = False,
        ema_decay: float = EMA_LIMIT,
        use_num_upates: bool = True,
    ):
        if not all(0 <= beta < 1 for beta in betas) or eps <= 0:
            raise ValueError(f"betas {betas} must lie in [0, 1), and eps {eps} above 0")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.shadows = ShadowSettings(ema, ema_decay, use_num_upates)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which turns all stored tensors into the parameters' type; codes go back to theirs."""
        super().load_state_dict(state_dict)
        types = {"m_codes": torch.int8, "v_codes": torch.uint8, "m_tops": torch.int16, "v_tops": torch.int16}
        for state in self.state.values():
            state.update({name: state[name].to(kind) for name, kind in types.items() if name in state})

    def _update(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if "step" not in state:
            state["step"] = 0
            state["m_codes"], state["m_tops"] = empty_codes(p.numel(), True, p.device)
            state["v_codes"], state["v_tops"] = empty_codes(p.numel(), False, p.device)
        self.shadows.begin(p, state)
        state["step"] += 1
        values, gradient = p.view(-1), gradient.reshape(-1)
        size = SLICE_VALUES.get(p.device.type, SLICE_VALUES["cuda"])
        for k, start in enumerate(range(0, p.numel(), size)):
            part = slice(start, start + size)
            _update_slice(values[part], gradient[part], state, start, k, group)
        self.shadows.follow(p, state)


def _update_slice(
    p: Tensor, gradient: Tensor, state: dict[str, Any], start: int, number: int, group: dict[str, Any]
) -> None:
    """One step for the values `start` and following of a parameter; p is written to."""
    (beta1, beta2), step = group["betas"], state["step"]
    rows = slice(start // BLOCK, start // BLOCK + -(-p.numel() // BLOCK))
    codes = slice(rows.start * BLOCK, rows.stop * BLOCK)
    m_place = (state["m_codes"][codes], state["m_tops"][rows])
    v_place = (state["v_codes"][codes], state["v_tops"][rows])
    missing = -p.numel() % BLOCK
    g = gradient.float()
    g = (torch.nn.functional.pad(g, (0, missing)) if missing else g).view(-1, BLOCK)
    m = decode(*m_place).lerp_(g, 1 - beta1)
    v = decode(*v_place).mul_(beta2).addcmul_(g, g, value=1 - beta2)
    divisor = v.div(1 - beta2**step).sqrt_().add_(group["eps"])
    update = torch.div(m, divisor, out=divisor).view(-1)[: p.numel()]
    p.mul_(1 - group["lr"] * group["weight_decay"])
    p.add_(update.to(p.dtype), alpha=-group["lr"] / (1 - beta1**step))
    call = (step * 131_071 + number) * CALLS_PER_SLICE
    encode(m, *m_place, call)
    encode(v, *v_place, call + 2)

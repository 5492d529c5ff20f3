"""AdamW whose moments take 1 byte a value each, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sgm.training.optimizers.ema_adam import EMA_LIMIT, ShadowSettings

BLOCK = 256
MOST_BLOCKS = 1 << 14  # of one call of `encode`
BYTES_A_MOMENT = 1 + 2 / BLOCK  # a code a value, a top a block
PER_OCTAVE = 8
STEP = 2.0 ** (1 / PER_OCTAVE)
SMALLEST = 2.0**-100  # anything below counts as this (unsigned) or as 0 (signed)
SIGNED_LEVELS, UNSIGNED_LEVELS = 127, 255
# Irrational numbers: their multiples fill [0, 1) evenly, without a random generator whose state would need saving.
_BETWEEN_VALUES, _BETWEEN_CALLS = 0.6180339887498949, 0.7548776662466927


def blocks(count: int) -> int:
    """Blocks that `count` values need."""
    return -(-count // BLOCK)


def empty_codes(count: int, signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """(codes, tops) of `count` zeros: (blocks * 256,) int8 or uint8, and (blocks,) int16."""
    codes = torch.zeros(blocks(count) * BLOCK, dtype=torch.int8 if signed else torch.uint8, device=device)
    return codes, torch.zeros(blocks(count), dtype=torch.int16, device=device)


def decode(codes: Tensor, tops: Tensor) -> Tensor:
    """Values (blocks, 256) in float32 of codes (blocks * 256,) and tops (blocks,)."""
    signed = codes.dtype == torch.int8
    codes = codes.view(-1, BLOCK)
    lowest = (tops[:, None].float() - (SIGNED_LEVELS if signed else UNSIGNED_LEVELS)) / PER_OCTAVE
    values = torch.add(lowest, codes.abs() if signed else codes, alpha=1 / PER_OCTAVE).exp2_()  # eighths: exact
    return values.mul_(codes.sign()) if signed else values.masked_fill_(codes == 0, 0.0)


def encoded_again(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """(codes, tops) of values (n,) that `decode` gave, in blocks of their own.

    Exact but for values that lie below the window of their new block: 65 536 times smaller than its largest they go to
    0, where unsigned and 2^32 times smaller to its lowest place.
    """
    codes, tops = empty_codes(len(values), signed, values.device)
    rows = torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
    place = torch.log2(rows.abs().clamp(min=SMALLEST)).mul_(PER_OCTAVE).round_()
    tops.copy_(place.amax(1))
    place.sub_(tops[:, None] - (SIGNED_LEVELS if signed else UNSIGNED_LEVELS)).clamp_(min=0 if signed else 1)
    codes.copy_(place.mul_(rows.sign()).view(-1))
    return codes, tops


def encode(values: Tensor, codes: Tensor, tops: Tensor, call: int) -> None:
    """Write values (blocks, 256) float32, >= 0 where codes are uint8, into codes and tops; at most MOST_BLOCKS of them.

    Values whose grid place lies below a block's window (65 536 times smaller than its largest, a factor of 2^32 where
    unsigned) go to 0 or to its lowest place, again keeping the mean; unsigned ones that are not 0 never go to 0, since
    they are divisors.

    Args:
        call: number of this call; equal numbers round alike, so a resumed run repeats itself.
    """
    signed = codes.dtype == torch.int8
    levels = SIGNED_LEVELS if signed else UNSIGNED_LEVELS
    sizes = values.abs() if signed else values
    place = _grid_place(sizes, call)
    top = place.amax(1)
    place.sub_(top[:, None] - levels)
    if signed:
        lowest = torch.exp2((top - levels + 1) / PER_OCTAVE)[:, None]
        rise = _dither(sizes, call + 1) < sizes / lowest
        place = torch.where(place < 1, rise, place).mul_(values.sign())
    else:
        place.clamp_(min=1).masked_fill_(sizes == 0, 0.0)
    codes.copy_(place.view(-1))
    tops.copy_(top)


def _grid_place(sizes: Tensor, call: int) -> Tensor:
    """e of 2^(e/8) for each of `sizes` >= 0, one of its two neighbours on the grid."""
    sizes = sizes.clamp(min=SMALLEST)
    below = torch.log2(sizes).mul_(PER_OCTAVE).floor_()
    beyond = sizes.mul_((below * (-1 / PER_OCTAVE)).exp2_()).sub_(1.0)  # 0 to STEP - 1
    return below.add_(_dither(sizes, call).mul_(STEP - 1) < beyond)


def _dither(like: Tensor, call: int) -> Tensor:
    """Numbers in [0, 1) that are even over the values of a call, and over the calls of a value."""
    return (_ramp(str(like.device))[: like.shape[0]] + call * _BETWEEN_CALLS % 1.0).frac_()


@lru_cache(maxsize=2)
def _ramp(device: str) -> Tensor:
    """(MOST_BLOCKS, 256) multiples of an irrational number, without their whole part."""
    ramp = torch.arange(MOST_BLOCKS * BLOCK, dtype=torch.float64).mul_(_BETWEEN_VALUES).frac_()
    return ramp.view(-1, BLOCK).to(device, torch.float32)


# Values worked on at a time. On a GPU: bounds the float32 temporaries to about 200 MB. On a CPU: fits its caches, with
# enough for 16 cores. (Not by the number of cores: rounding depends on it, and a resumed run shall repeat itself.)
SLICE_VALUES = {"cuda": MOST_BLOCKS * BLOCK, "cpu": 1 << 19}
CALLS_PER_SLICE = 4  # numbers for rounding that one slice of one step uses up


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019) with both moments in 8 bits (see `sgm.training.optimizers.adam8bit`).

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

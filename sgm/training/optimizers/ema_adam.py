"""Optimizers: AdamW with an averaged copy of the weights, parameter groups, and building one from its YAML name.

Reading and writing the state of an optimizer inside a DeepSpeed engine is in `training.checkpoints.partitions` and
offered here as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sgm.errors import SgmError
from sgm.training.checkpoints.partitions import (
    ema_state,
    ema_weights,
    load_ema_state,
    load_optimizer_state,
    optimizer_state,
)
from sgm.training.optimizers.adam8bit import AdamW8bit
from sgm.training.optimizers.averaging import EMA_LIMIT, ShadowSettings, ema_decay
from sgm.training.optimizers.log_codes import BYTES_A_MOMENT
from sgm.util import TargetError, check_params, get_obj_from_str

__all__ = [
    "AdamW8bit",
    "FusedEmaAdam",
    "OptimizerError",
    "OptimizerSpec",
    "ema_decay",
    "ema_state",
    "ema_weights",
    "load_ema_state",
    "load_optimizer_state",
    "optimizer_state",
    "parameter_groups",
]


class OptimizerError(SgmError):
    """The `optimizer:` section cannot be used. The message says which entry and what is possible."""


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
            raise OptimizerError(
                "FusedEmaAdam is AdamW with bias correction; bias_correction: false, adam_w_mode: false and amsgrad: "
                "true are not available. Use optimizer.type torch.optim.Adam for L2 decay or amsgrad (no EMA)."
            )
        super().__init__(params, lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay, fused=True)
        self.shadows = ShadowSettings(ema, ema_decay, use_num_upates)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        every = [p for group in self.param_groups for p in group["params"]] if self.shadows.kept else []
        updated = [p for p in every if p.grad is not None]
        # torch initialises a parameter's state only while it is empty, so new shadows are put there afterwards
        first: dict[Tensor, dict[str, Any]] = {p: {} for p in updated if "shadow" not in self.state.get(p, ())}
        for p, state in first.items():
            self.shadows.begin(p, state)
        result = super().step(closure)
        for p in updated:
            self.state[p].update(first.get(p, ()))
            self.shadows.follow(p, self.state[p])
        return result


# --- parameter groups --------------------------------------------------------------------------------------------


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: weights, and what gets no weight decay (biases, everything in norms).

    Each group carries `lr_scale`, the factor on the scheduled learning rate, and `lr` 0 until the schedule sets it. A
    parameter may bring an `lr_scale` or `no_weight_decay` attribute of its own. Empty groups are left out.
    """
    groups: dict[tuple[bool, float], dict[str, Any]] = {}
    for decays, parameter in _sorted_parameters(model):
        scale = float(getattr(parameter, "lr_scale", 1.0))
        new = {"params": [], "lr": 0.0, "lr_scale": scale} | ({} if decays else {"weight_decay": 0.0})
        groups.setdefault((decays, scale), new)["params"].append(parameter)
    return [groups[key] for key in sorted(groups, key=lambda k: not k[0])]


def _sorted_parameters(model: nn.Module) -> Iterator[tuple[bool, nn.Parameter]]:
    """(has weight decay, parameter) of each trainable parameter, once, in module order."""
    seen: set[int] = set()
    norms = _norm_classes()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            exempt = isinstance(module, norms) or name == "bias" or getattr(parameter, "no_weight_decay", False)
            yield not exempt, parameter


def _norm_classes() -> tuple[type, ...]:
    from sgm.distributed import quiet_libraries

    with quiet_libraries():
        from sat.transformer_defaults import NO_WD_MODULES
    return (*NO_WD_MODULES, nn.LayerNorm)


# --- building from YAML ------------------------------------------------------------------------------------------

DEEPSPEED_NATIVE = frozenset(
    {"onebitadam", "zerooneadam", "onebitlamb", "lamb", "lion", "muon", "muadam", "muadamw", "musgd"}
)
_ADAMW_NAMES = frozenset({"adam", "adamw", "fusedadam", "cpuadam", "deepspeedcpuadam"})
_DEEPSPEED_ADAM_SWITCHES = ("torch_adam", "adam_w_mode", "fp32_optimizer_states")


@dataclass(frozen=True)
class OptimizerSpec:
    """A checked `optimizer:` section.

    Attributes:
        name: as written.
        target: the class; None where DeepSpeed itself must build it.
        params: constructor arguments without `lr`.
        lr: learning rate at the end of warm-up.
        notes: what was understood differently from the letter.
    """

    name: str
    target: type[torch.optim.Optimizer] | None
    params: dict[str, Any]
    lr: float
    notes: tuple[str, ...] = field(default=())

    @classmethod
    def parse(cls, section: Mapping[str, Any]) -> OptimizerSpec:
        """From `{"type": name, "params": {...}}`; numbers written as text ("1e-8") have been converted before.

        Raises:
            OptimizerError: no type, no learning rate, an unknown optimizer or a parameter that it does not take.
        """
        stray = sorted(set(section) - {"type", "params", "legacy_fusion"})
        if stray or not isinstance(section.get("type"), str):
            found = ", ".join(section) or "nothing"
            raise OptimizerError(f"deepspeed.optimizer needs `type` and `params`, got {found}")
        params = dict(section.get("params") or {})
        lr = params.pop("lr", None)
        if isinstance(lr, bool) or not isinstance(lr, int | float) or not math.isfinite(lr) or lr < 0:
            raise OptimizerError(f"deepspeed.optimizer.params.lr must be a number >= 0, got {lr!r}")
        name = section["type"]
        if name.lower() in DEEPSPEED_NATIVE:
            return cls(name, None, params, float(lr))
        target, params, notes = _resolve(name, params)
        try:
            params = check_params(name, target, params)
        except TargetError as error:
            raise OptimizerError(f"deepspeed.optimizer: {error}") from error
        return cls(name, target, params, float(lr), notes)

    @property
    def keeps_ema(self) -> bool:
        kinds = {FusedEmaAdam: True, AdamW8bit: False}  # and what each does unless told
        return any(self.target is kind and self.params.get("ema", usual) for kind, usual in kinds.items())

    @property
    def moment_bytes(self) -> float:
        """Bytes of a trained value's moments."""
        if self.target is AdamW8bit:
            return 2 * BYTES_A_MOMENT
        if self.target is torch.optim.SGD:
            return 4.0 if self.params.get("momentum") else 0.0
        return 8.0

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer over parameter groups; their `lr` stays as the groups say.

        Raises:
            OptimizerError: the constructor refuses the parameters.
        """
        if self.target is None:
            raise OptimizerError(f"{self.name} is built by DeepSpeed")
        try:
            return self.target(groups, lr=self.lr, **self.params)
        except (TypeError, ValueError) as error:
            raise OptimizerError(f"deepspeed.optimizer {self.name} refuses its params: {error}") from error


def _resolve(name: str, params: dict[str, Any]) -> tuple[type, dict[str, Any], tuple[str, ...]]:
    """(class, its params, notes) of any optimizer that torch builds."""
    if name == AdamW8bit.__name__:
        return AdamW8bit, params, ()
    if name.lower() in _ADAMW_NAMES:
        # DeepSpeed's "Adam" is AdamW unless adam_w_mode says otherwise; its compiled kernels are not needed
        kept = {k: v for k, v in params.items() if k not in _DEEPSPEED_ADAM_SWITCHES}
        decoupled = bool(params.get("adam_w_mode", True)) or name.lower() == "adamw"
        target = torch.optim.AdamW if decoupled else torch.optim.Adam
        note = f"deepspeed.optimizer {name}: torch.optim.{target.__name__} (fused) does the same without a compiler"
        return target, {"fused": True, **kept}, (note,)
    try:
        found = get_obj_from_str(name) if "." in name else getattr(torch.optim, name, None)
    except TargetError as error:
        raise OptimizerError(f"deepspeed.optimizer: {error}") from error
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise OptimizerError(
            f"deepspeed.optimizer.type {name!r} is no optimizer; choose sat.ops.FusedEmaAdam, AdamW, AdamW8bit, "
            f"another class of torch.optim, or one of DeepSpeed's: {', '.join(sorted(DEEPSPEED_NATIVE))}"
        )
    return found, params, ()


def count(groups: list[dict[str, Any]]) -> int:
    """Number of values in the groups' parameters (also where ZeRO-3 has taken them away)."""

    def size(p: Tensor) -> int:
        return getattr(p, "ds_numel", p.numel())

    return sum(size(p) for group in groups for p in group["params"])

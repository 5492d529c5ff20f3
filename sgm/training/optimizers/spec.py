"""The `optimizer:` section: from its YAML name to an optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sgm.distributed import quiet_libraries
from sgm.training.optimizers.adam8bit import BYTES_A_MOMENT, AdamW8bit
from sgm.training.optimizers.ema_adam import FusedEmaAdam
from sgm.typed import ConfigError
from sgm.util import TargetError, check_params, get_obj_from_str

DEEPSPEED_NATIVE = frozenset({"lamb", "lion", "muon", "muadam", "muadamw", "musgd"})
_ADAMW_NAMES = frozenset({"adam", "adamw", "fusedadam", "cpuadam", "deepspeedcpuadam"})
_DEEPSPEED_ADAM_SWITCHES = ("torch_adam", "adam_w_mode", "fp32_optimizer_states")


@dataclass(frozen=True)
class OptimizerSpec:
    """A checked `optimizer:` section.

    Attributes:
        target: the class; None where DeepSpeed itself must build it.
        params: constructor arguments without `lr`.
        notes: what was understood differently from the letter.
    """

    name: str
    target: Callable[..., torch.optim.Optimizer] | None
    params: dict[str, Any]
    lr: float
    notes: tuple[str, ...] = field(default=())

    @classmethod
    def parse(cls, section: Mapping[str, Any]) -> OptimizerSpec:
        """From `{"type": name, "params": {...}}`; numbers written as text ("1e-8") have been converted before.

        Raises:
            ConfigError: no type, no learning rate, an unknown optimizer or a parameter that it does not take.
        """
        stray = sorted(set(section) - {"type", "params", "legacy_fusion"})
        if stray or not isinstance(section.get("type"), str):
            found = ", ".join(map(str, section)) or "nothing"
            raise ConfigError(f"deepspeed.optimizer needs `type` and `params`, got {found}")
        params = section.get("params") or {}
        if not isinstance(params, Mapping):
            raise ConfigError(f"deepspeed.optimizer.params must be a mapping, got {params!r}")
        params = dict(params)
        lr = params.pop("lr", None)
        if isinstance(lr, bool) or not isinstance(lr, int | float) or not math.isfinite(lr) or lr < 0:
            raise ConfigError(f"deepspeed.optimizer.params.lr must be a number >= 0, got {lr!r}")
        name = section["type"]
        if name.lower() in DEEPSPEED_NATIVE:
            return cls(name, None, params, float(lr))
        target, params, notes = _resolve(name, params)
        try:
            params = check_params(name, target, params, "deepspeed.optimizer.params", ("params", "lr"))
        except TargetError as error:
            raise ConfigError(f"deepspeed.optimizer: {error}") from error
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
            ConfigError: the constructor refuses the parameters.
        """
        if self.target is None:
            raise ConfigError(f"{self.name} is built by DeepSpeed")
        try:
            return self.target(groups, lr=self.lr, **self.params)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"deepspeed.optimizer {self.name} refuses its params: {error}") from error


def _resolve(
    name: str, params: dict[str, Any]
) -> tuple[Callable[..., torch.optim.Optimizer], dict[str, Any], tuple[str, ...]]:
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
        raise ConfigError(f"deepspeed.optimizer: {error}") from error
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise ConfigError(
            f"deepspeed.optimizer.type {name!r} is no optimizer; choose sat.ops.FusedEmaAdam, AdamW, AdamW8bit, "
            f"another class of torch.optim, or one of DeepSpeed's: {', '.join(sorted(DEEPSPEED_NATIVE))}"
        )
    return found, params, ()


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
    with quiet_libraries():
        from sat.transformer_defaults import NO_WD_MODULES

    norms, seen = (*NO_WD_MODULES, nn.LayerNorm), set[int]()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            exempt = isinstance(module, norms) or name == "bias" or getattr(parameter, "no_weight_decay", False)
            yield not exempt, parameter


def count(groups: list[dict[str, Any]]) -> int:
    """Number of values in the groups' parameters (also where ZeRO-3 has taken them away)."""
    return sum(getattr(p, "ds_numel", p.numel()) for group in groups for p in group["params"])

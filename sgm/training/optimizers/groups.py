"""Which parameters an optimizer gets, in which groups."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from sgm.distributed import quiet_libraries


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

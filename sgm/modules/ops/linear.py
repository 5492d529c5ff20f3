"""Linear layers of a block: SAT's, which may be split over processes, called without detours where they are whole."""

from __future__ import annotations

from functools import cache
from typing import TypeGuard

import torch.nn.functional as F
from torch import Tensor, nn

from sgm.distributed import model_parallel_world_size


def apply_linear(linear: nn.Module, x: Tensor) -> Tensor:
    """linear(x). A layer of SAT's that is whole and that nobody watches skips what only split ones need.

    That is two identities of the graph a layer, run in Python both ways, and a division of the bias by 1.
    """
    if _is_sat_linear(linear) and model_parallel_world_size() == 1 and not is_watched(linear):
        return F.linear(x, linear.weight, linear.bias)
    return linear(x)


def is_plain_linear(linear: nn.Module) -> TypeGuard[nn.Linear]:
    """torch's or SAT's linear layer itself (no adapter, no quantisation), with a bias, that nobody watches.

    SAT's has torch's weight and bias.
    """
    if type(linear) is _sat_linears()[0]:
        return not linear.gather_output and linear.bias is not None and not is_watched(linear)
    return type(linear) is nn.Linear and linear.bias is not None and not is_watched(linear)


def is_watched(module: nn.Module) -> bool:
    """Whether hooks want to see the module's forward or its gradients."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _is_sat_linear(linear: nn.Module) -> TypeGuard[nn.Linear]:
    return type(linear) in _sat_linears()


@cache
def _sat_linears() -> tuple[type[nn.Module], type[nn.Module]]:
    from sat.mpu import ColumnParallelLinear, RowParallelLinear

    return ColumnParallelLinear, RowParallelLinear

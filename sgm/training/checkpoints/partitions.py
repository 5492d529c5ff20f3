"""State of an optimizer inside a DeepSpeed engine, for every ZeRO stage, as tensors and plain types.

DeepSpeed wraps an optimizer so that it works on "masters": float32 tensors that this rank updates, from which the
model's own weights are refreshed. Stage 0 in float32 has none of its own (the parameters are the masters); ZeRO 1 and 2
hold one flat partition a parameter group, ZeRO 3 one a sub-group. DeepSpeed's own checkpoint files are not used: they
hold pickled classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sgm.errors import SgmError

SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


class OptimizerStateError(SgmError):
    """A stored optimizer state does not belong to this run's optimizer. The message says in what they differ."""


def basic_optimizer(ds_engine: Any) -> torch.optim.Optimizer:
    """The optimizer proper, inside whatever DeepSpeed has put around it."""
    return ds_engine.basic_optimizer


def masters(ds_engine: Any) -> list[Tensor]:
    """The float32 tensors that this rank's optimizer updates, in a fixed order."""
    stage3 = getattr(ds_engine.optimizer, "fp32_partitioned_groups_flat", None)
    if stage3 is not None:
        return list(stage3)
    return [p for group in basic_optimizer(ds_engine).param_groups for p in group["params"]]


@torch.no_grad()
def refresh_weights(ds_engine: Any) -> None:
    """Write the masters into the model's weights. Collective over data-parallel ranks."""
    wrapper = ds_engine.optimizer
    if wrapper is basic_optimizer(ds_engine):
        return
    if hasattr(wrapper, "update_lp_params"):  # ZeRO 1, 2 and the bfloat16 wrapper
        wrapper.update_lp_params()
    elif hasattr(wrapper, "fp32_partitioned_groups_flat"):  # ZeRO 3
        wrapper._partition_all_parameters()
        for i in range(len(wrapper.fp16_groups)):
            wrapper._reassign_or_swap_out_partitioned_parameters(i)
        if wrapper.persistent_parameters:
            wrapper.persistent_parameters[0].all_gather(wrapper.persistent_parameters)
    else:
        _refresh_unpartitioned(wrapper)


def _refresh_unpartitioned(wrapper: Any) -> None:
    """Stage 0 in 16 bits: float32 copies, tensor by tensor or flat."""
    if hasattr(wrapper, "fp32_groups"):
        pairs = zip(wrapper.fp32_groups, wrapper.fp16_groups)
    else:
        flat = zip(wrapper.fp32_groups_flat, wrapper.fp16_groups)
        pairs = ((torch._utils._unflatten_dense_tensors(m, group), group) for m, group in flat)
    for originals, weights in pairs:
        for original, weight in zip(originals, weights):
            weight.data.copy_(original.data)


# --- optimizer ---------------------------------------------------------------------------------------------------


def optimizer_state(ds_engine: Any) -> dict[str, Any]:
    """This rank's masters and optimizer state (without the averaged weights, see `ema_state`).

    The tensors are the live ones, not copies: write them before the next step.
    """
    optimizer = basic_optimizer(ds_engine)
    own = masters(ds_engine)
    return {
        "layout": _layout(ds_engine),
        "masters": [m.detach() for m in own],
        "states": [{k: _plain(v) for k, v in optimizer.state.get(m, {}).items() if k != "shadow"} for m in own],
        "counters": {name: int(getattr(ds_engine, name)) for name in COUNTERS},
    }


@torch.no_grad()
def load_optimizer_state(ds_engine: Any, state: dict[str, Any]) -> None:
    """Put back what `optimizer_state` gave, and refresh the model's trainable weights from the masters. Collective.

    Raises:
        OptimizerStateError: another ZeRO stage, another number of ranks, another optimizer or other parameters.
    """
    _require_same_layout(_layout(ds_engine), state["layout"])
    optimizer = basic_optimizer(ds_engine)
    settings = optimizer.param_groups[0]
    for master, stored, values in zip(masters(ds_engine), state["masters"], state["states"]):
        master.data.copy_(stored)
        kept = {k: v for k, v in optimizer.state.get(master, {}).items() if k == "shadow"}
        if values or kept:
            optimizer.state[master] = {k: _placed(v, master, settings) for k, v in values.items()} | kept
    for name in COUNTERS:
        setattr(ds_engine, name, state["counters"][name])
    refresh_weights(ds_engine)


def _layout(ds_engine: Any) -> dict[str, Any]:
    return {
        "optimizer": type(basic_optimizer(ds_engine)).__name__,
        "wrapper": type(ds_engine.optimizer).__name__,
        "zero_stage": int(ds_engine.zero_optimization_stage()),
        "data_parallel_size": int(ds_engine.dp_world_size),
        "sizes": [m.numel() for m in masters(ds_engine)],
    }


def _require_same_layout(now: dict[str, Any], stored: dict[str, Any]) -> None:
    other = [name for name in now if now[name] != stored.get(name)]
    if other:
        listed = ", ".join(f"{name} (stored {stored.get(name)}, now {now[name]})" for name in other)
        raise OptimizerStateError(
            f"the stored optimizer state is of another run set-up: {listed}. Resume with the same number of processes, "
            "ZeRO stage and optimizer, or start a new run from the saved weights (args.load)."
        )


def _plain(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _placed(value: Any, master: Tensor, group: dict[str, Any]) -> Any:
    """A stored value where torch expects it: moments beside their master, step counters only for fused kernels."""
    if not isinstance(value, Tensor):
        return value
    beside = value.dim() > 0 or group.get("fused") or group.get("capturable")
    return value.to(master.device if beside else "cpu", copy=True)


# --- loss scale --------------------------------------------------------------------------------------------------


def scaler_state(ds_engine: Any) -> dict[str, float] | None:
    """Loss scale and its counters; None where the run scales no loss."""
    scaler = _scaler(ds_engine)
    if scaler is None:
        return None
    return {n: getattr(scaler, n) for n in SCALER_FIELDS if isinstance(getattr(scaler, n, None), int | float)}


def load_scaler_state(ds_engine: Any, state: dict[str, float] | None) -> None:
    """Put back what `scaler_state` gave."""
    scaler = _scaler(ds_engine)
    if scaler is None or state is None:
        return
    for name, value in state.items():
        setattr(scaler, name, value)


def _scaler(ds_engine: Any) -> Any:
    if not ds_engine.fp16_enabled():
        return None
    wrapper = ds_engine.optimizer
    return getattr(wrapper, "loss_scaler", None) or getattr(wrapper, "loss_scale_config", None)


# --- averaged weights --------------------------------------------------------------------------------------------


def _shadows(ds_engine: Any) -> list[Tensor | None]:
    state = basic_optimizer(ds_engine).state
    return [state.get(m, {}).get("shadow") for m in masters(ds_engine)]


def has_ema(ds_engine: Any) -> bool:
    """Does the optimizer hold averaged weights (after the first step)?"""
    found = _shadows(ds_engine)
    return bool(found) and all(shadow is not None for shadow in found)


def ema_state(ds_engine: Any) -> dict[str, Tensor] | None:
    """This rank's averaged masters by position, or None. Live tensors, as in `optimizer_state`."""
    if not has_ema(ds_engine):
        return None
    return {str(k): shadow for k, shadow in enumerate(_shadows(ds_engine)) if shadow is not None}


@torch.no_grad()
def load_ema_state(ds_engine: Any, state: dict[str, Tensor] | None) -> None:
    """Put back what `ema_state` gave, after `load_optimizer_state`."""
    if state is None:
        return
    own = masters(ds_engine)
    if len(state) != len(own) or any(state[str(k)].numel() != m.numel() for k, m in enumerate(own)):
        raise OptimizerStateError("the stored averaged weights are of another run set-up than the optimizer's")
    for k, master in enumerate(own):
        basic_optimizer(ds_engine).state[master]["shadow"] = state[str(k)].to(master, copy=True)


@contextmanager
def ema_weights(ds_engine: Any) -> Iterator[bool]:
    """Inside the block the model's weights are the averaged ones; afterwards exactly what they were. Collective.

    Yields False, with the weights unchanged, where there are none.
    """
    if not has_ema(ds_engine):
        yield False
        return
    _exchange(ds_engine)
    try:
        yield True
    finally:
        _exchange(ds_engine)


@torch.no_grad()
def _exchange(ds_engine: Any) -> None:
    for master, shadow in zip(masters(ds_engine), _shadows(ds_engine)):
        kept = master.detach().clone()
        master.data.copy_(shadow)
        shadow.copy_(kept)
    refresh_weights(ds_engine)

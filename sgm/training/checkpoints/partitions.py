"""State of an optimizer inside a DeepSpeed engine, for every ZeRO stage, as tensors and plain types.

DeepSpeed wraps an optimizer so that it works on "masters": float32 tensors that this rank updates, from which the
model's own weights are refreshed. Stage 0 in float32 has none of its own (the parameters are the masters); ZeRO 1 and 2
hold one flat partition a parameter group, ZeRO 3 one a sub-group. DeepSpeed's own checkpoint files are not used: they
hold pickled classes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, starmap
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgm.distributed import replica_rank
from sgm.training.checkpoints.state import CheckpointError, TrainState
from sgm.training.optimizers.adam8bit import decode, encoded_again
from sgm.training.setup.engine import TrainingEngine

SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


def masters(ds_engine: TrainingEngine) -> list[Tensor]:
    """The float32 tensors that this rank's optimizer updates, in a fixed order."""
    if ds_engine.zero_optimization_stage() == 3:
        return list(ds_engine.optimizer.fp32_partitioned_groups_flat)
    return [p for group in ds_engine.basic_optimizer.param_groups for p in group["params"]]


@torch.no_grad()
def refresh_weights(ds_engine: TrainingEngine) -> None:
    """Write the masters into the model's weights. Collective over data-parallel ranks."""
    wrapper: Any = ds_engine.optimizer
    if wrapper is ds_engine.basic_optimizer:
        return
    if hasattr(wrapper, "update_lp_params"):  # ZeRO 1 and 2, and bfloat16 without ZeRO
        wrapper.update_lp_params()
    elif ds_engine.zero_optimization_stage() == 3:
        wrapper._partition_all_parameters()
        for i in range(len(wrapper.fp16_groups)):
            wrapper._reassign_or_swap_out_partitioned_parameters(i)
        if wrapper.persistent_parameters:
            wrapper.persistent_parameters[0].all_gather(wrapper.persistent_parameters)
    elif hasattr(wrapper, "fp32_groups"):  # stage 0 in 16 bits, with a copy of each tensor, or of each group
        _copy_each(wrapper.fp32_groups, wrapper.fp16_groups)
    elif hasattr(wrapper, "fp32_groups_flat"):
        groups = zip(wrapper.fp32_groups_flat, wrapper.fp16_groups)
        _copy_each([torch._utils._unflatten_dense_tensors(*group) for group in groups], wrapper.fp16_groups)
    else:
        raise TypeError(f"weights behind DeepSpeed's {type(wrapper).__name__} cannot be refreshed")


def _copy_each(originals: Sequence[Sequence[Tensor]], weights: Sequence[Sequence[Tensor]]) -> None:
    for original, weight in zip(chain(*originals), chain(*weights), strict=True):
        weight.data.copy_(original.data)


# --- optimizer ---------------------------------------------------------------------------------------------------


def optimizer_state(ds_engine: TrainingEngine) -> dict[str, Any]:
    """This rank's masters and optimizer state (without the averaged weights, see `ema_state`).

    The tensors are the live ones, not copies: write them before the next step.
    """
    optimizer = ds_engine.basic_optimizer
    own = masters(ds_engine)
    if ds_engine.zero_optimization_stage() == 3:
        for master, weights in zip(own, ds_engine.optimizer.fp16_groups):
            _clear_padding([master, *optimizer.state.get(master, {}).values()], weights)
    return {
        "layout": layout(ds_engine),
        "masters": [m.detach() for m in own],
        "states": [_plain_state(optimizer.state.get(m, {})) for m in own],
        "counters": {name: int(getattr(ds_engine, name)) for name in COUNTERS},
    }


@torch.no_grad()
def _clear_padding(flat: Sequence[object], weights: Sequence[Any]) -> None:
    """Zero what fills up partitions in ZeRO 3's flat tensors: memory that nobody writes, NaN for all that is known."""
    start, rank, total = 0, replica_rank(), sum(weight.partition_numel() for weight in weights)
    for weight in weights:
        size, whole = weight.partition_numel(), weight.ds_numel
        filled = min(max(whole - rank * size, 0), size)
        for tensor in flat:
            if isinstance(tensor, Tensor) and tensor.numel() >= total:  # not a step, nor a block's top
                tensor.detach()[start + filled : start + size] = 0
        start += size


@torch.no_grad()
def load_optimizer_state(ds_engine: TrainingEngine, state: dict[str, Any]) -> None:
    """Put back what `optimizer_state` gave, and refresh the model's trainable weights from the masters. Collective.

    Raises:
        CheckpointError: cut up otherwise (see `checkpoints.repartition`), of another optimizer or other parameters.
    """
    other = layout_differences(ds_engine, state)
    if other:
        raise CheckpointError(f"the stored optimizer state is of another run set-up: {', '.join(other)}.")
    optimizer = ds_engine.basic_optimizer
    settings = optimizer.param_groups[0]
    for master, stored, values in zip(masters(ds_engine), state["masters"], state["states"]):
        master.data.copy_(stored)
        kept = {k: v for k, v in optimizer.state.get(master, {}).items() if k == "shadow"}
        if values or kept:
            optimizer.state[master] = {k: _placed(v, master, settings) for k, v in values.items()} | kept
    for name in COUNTERS:
        setattr(ds_engine, name, state["counters"][name])
    ds_engine.micro_steps -= ds_engine.micro_steps % ds_engine.gradient_accumulation_steps()  # of another number
    refresh_weights(ds_engine)


class Piece(NamedTuple):
    """A run of a parameter's values in one of a rank's masters.

    Attributes:
        master, start: number of the master, and place of the first value in it.
        name, begin, size: of the parameter, place of the first value in it, and how many.
    """

    master: int
    start: int
    name: str
    begin: int
    size: int


def pieces(ds_engine: TrainingEngine) -> list[Piece]:
    """What this rank's masters hold; the rest of them is padding."""
    names = {id(p): name for name, p in ds_engine.module.named_parameters()}
    own, wrapper = masters(ds_engine), ds_engine.optimizer
    kind = next((kind for kind in ("bit16", "bf16", "fp16") if hasattr(wrapper, f"{kind}_groups")), None)
    groups: Sequence[Sequence[Any]] = getattr(wrapper, f"{kind}_groups") if kind else [own]
    if len(groups) != len(own):
        groups = [[p] for group in groups for p in group]
    flats = None if kind == "fp16" else getattr(wrapper, f"{kind}_groups_flat", None)
    found = []
    for k, (group, master) in enumerate(zip(groups, own)):
        at = 0
        for p in group:
            # where in the master the parameter's first value is or would be, and which places its values may fill
            first, window = at, range(at, at + p.numel())
            if ds_engine.zero_optimization_stage() == 3:
                window = range(at, at + p.partition_numel())
                first -= len(window) * replica_rank()
            elif flats:  # ZeRO 1 and 2, and bfloat16 without ZeRO, cut each group's flat tensor into equal parts
                window = range(master.numel())
                first = p.storage_offset() - flats[k].storage_offset() - len(window) * replica_rank()
            begin, end = max(0, window.start - first), min(getattr(p, "ds_numel", p.numel()), window.stop - first)
            if begin < end:
                found.append(Piece(k, first + begin, names[id(p)], begin, end - begin))
            at = window.stop
    return found


def layout(ds_engine: TrainingEngine) -> dict[str, Any]:
    """How this rank's masters are cut out of the parameters, as plain types."""
    return {
        "optimizer": type(ds_engine.basic_optimizer).__name__,
        "wrapper": type(ds_engine.optimizer).__name__,
        "zero_stage": int(ds_engine.zero_optimization_stage()),
        "data_parallel_size": int(ds_engine.dp_world_size),
        "sizes": [m.numel() for m in masters(ds_engine)],
        "pieces": [list(piece) for piece in pieces(ds_engine)],
    }


def layout_differences(ds_engine: TrainingEngine, state: Mapping[str, Any]) -> list[str]:
    """In what this rank's masters differ from those of a state by `optimizer_state`. Pieces that are the same are
    enough; earlier versions did not write them.
    """
    now, stored = layout(ds_engine), state["layout"]
    decisive = ["pieces"] if "pieces" in stored else ["data_parallel_size", "zero_stage"]
    counted = ["optimizer", "wrapper", "sizes", *decisive]
    return [f"{n} (stored {stored[n]}, now {now[n]})" for n in counted if now[n] != stored[n]]


def _plain_state(state: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.detach() if isinstance(v, Tensor) else v for k, v in state.items() if k != "shadow"}


def _placed(value: object, master: Tensor, group: Mapping[str, Any]) -> object:
    """A stored value where torch expects it: moments beside their master, step counters only for fused kernels."""
    if not isinstance(value, Tensor):
        return value
    beside = value.dim() > 0 or group.get("fused") or group.get("capturable")
    return value.to(master.device if beside else "cpu", copy=True)


# --- loss scale --------------------------------------------------------------------------------------------------


def scaler_state(ds_engine: TrainingEngine) -> dict[str, float] | None:
    """Loss scale and its counters; None where the run scales no loss."""
    scaler = _scaler(ds_engine)
    if scaler is None:
        return None
    return {n: getattr(scaler, n) for n in SCALER_FIELDS if isinstance(getattr(scaler, n, None), int | float)}


def load_scaler_state(ds_engine: TrainingEngine, state: dict[str, float] | None) -> None:
    """Put back what `scaler_state` gave."""
    scaler = _scaler(ds_engine)
    if scaler is None or state is None:
        return
    for name, value in state.items():
        setattr(scaler, name, value)


def _scaler(ds_engine: TrainingEngine) -> object | None:
    if not ds_engine.fp16_enabled():
        return None
    wrapper = ds_engine.optimizer
    return getattr(wrapper, "loss_scaler", None) or getattr(wrapper, "loss_scale_config", None)


# --- averaged weights --------------------------------------------------------------------------------------------


def _shadows(ds_engine: TrainingEngine) -> list[Tensor]:
    """The averaged masters; empty unless the optimizer holds all of them (after the first step)."""
    state = ds_engine.basic_optimizer.state
    own = masters(ds_engine)
    found = [state[m]["shadow"] for m in own if "shadow" in state.get(m, ())]
    return found if len(found) == len(own) else []


def ema_state(ds_engine: TrainingEngine) -> dict[str, Tensor] | None:
    """This rank's averaged masters by position, or None. Live tensors, as in `optimizer_state`."""
    return {str(k): shadow for k, shadow in enumerate(_shadows(ds_engine))} or None


@torch.no_grad()
def load_ema_state(ds_engine: TrainingEngine, state: dict[str, Tensor] | None) -> None:
    """Put back what `ema_state` gave, after `load_optimizer_state`."""
    if state is None:
        return
    own = masters(ds_engine)
    if len(state) != len(own) or any(state[str(k)].numel() != m.numel() for k, m in enumerate(own)):
        raise CheckpointError("the stored averaged weights are of another run set-up than the optimizer's")
    for k, master in enumerate(own):
        ds_engine.basic_optimizer.state[master]["shadow"] = state[str(k)].to(master, copy=True)


@contextmanager
def ema_weights(ds_engine: TrainingEngine) -> Iterator[bool]:
    """Inside the block the model's weights are the averaged ones; afterwards exactly what they were. Collective.

    Yields False, with the weights unchanged, where there are none.
    """
    shadows = _shadows(ds_engine)
    if not shadows:
        yield False
        return
    _exchange(ds_engine, shadows)
    try:
        yield True
    finally:
        _exchange(ds_engine, shadows)


@torch.no_grad()
def _exchange(ds_engine: TrainingEngine, shadows: Sequence[Tensor]) -> None:
    for master, shadow in zip(masters(ds_engine), shadows):
        kept = master.detach().clone()
        master.data.copy_(shadow)
        shadow.copy_(kept)
    refresh_weights(ds_engine)


Columns = dict[str, Tensor]  # name -> (n,), one value of each for every value of a master
_MASTER, _SHADOW, _CODES, _TOPS = "master", "shadow", "_codes", "_tops"


def repartitioned(
    ds_engine: TrainingEngine, stored: Iterator[TrainState]
) -> tuple[dict[str, Any], dict[str, Tensor] | None]:
    """This rank's (masters and moments, averaged weights) as `partitions` load them, from all earlier ranks' states.

    Args:
        stored: in order; no more are asked for once every value is there.
    Raises:
        CheckpointError: another optimizer, values that none of the states has, or a kind of state that cannot be
            cut up.
    """
    now = layout(ds_engine)
    missing = sum(piece.size for piece in pieces(ds_engine))
    columns: list[Columns] = [{} for _ in now["sizes"]]
    whole: list[dict[str, Any]] = [{} for _ in now["sizes"]]  # values that count for a master as a whole: steps
    while missing and (state := next(stored, None)):
        missing -= _take(state, now, columns, whole)
    if missing:
        raise CheckpointError(f"the stored optimizer state lacks {missing:,} values that this run trains.")
    kept = [_as_kept(held, master) for held, master in zip(columns, masters(ds_engine))]
    shadows = {str(k): values.pop(_SHADOW) for k, values in enumerate(kept) if _SHADOW in values}
    own = [values.pop(_MASTER) for values in kept]
    states = [values | single for values, single in zip(kept, whole)]
    return {"layout": now, "masters": own, "states": states}, shadows or None


def _take(state: TrainState, now: dict[str, Any], columns: list[Columns], whole: list[dict[str, Any]]) -> int:
    """Copy what `state` has of the pieces that `now` has; how many values of each column that is."""
    there = state.optimizer["layout"]
    if there["optimizer"] != now["optimizer"] or "pieces" not in there:
        which = "" if "pieces" in there else ", by a version whose states cannot be cut up anew"
        raise CheckpointError(
            f"the stored optimizer state is of {there['optimizer']} on {there['data_parallel_size']} data-parallel "
            f"processes with ZeRO {there['zero_stage']}{which}: resume with the same."
        )
    taken, held = 0, [_columns(state, k) for k in range(len(there["sizes"]))]
    places = defaultdict(list)
    for piece in starmap(Piece, there["pieces"]):
        places[piece.name].append(piece)
    for to in starmap(Piece, now["pieces"]):
        for source in places[to.name]:
            begin, end = max(to.begin, source.begin), min(to.begin + to.size, source.begin + source.size)
            if begin >= end:
                continue
            taken += end - begin
            values, single = held[source.master]
            for name, column in values.items():
                into = columns[to.master].setdefault(name, column.new_zeros(now["sizes"][to.master]))
                at, origin = to.start + begin - to.begin, source.start + begin - source.begin
                into[at : at + end - begin] = column[origin : origin + end - begin]
            if any(whole[to.master].setdefault(name, value) != value for name, value in single.items()):
                raise CheckpointError(f"{to.name} took another number of steps than its neighbours: {single}.")
    return taken


def _columns(state: TrainState, k: int) -> tuple[Columns, dict[str, Any]]:
    """Of a stored master: what there is for each of its values, and what is one for all of them."""
    master = state.optimizer["masters"][k].view(-1)
    found, single, size = {_MASTER: master}, {}, len(master)
    if state.ema:
        found[_SHADOW] = state.ema[str(k)].view(-1)
    values = state.optimizer["states"][k]
    for name, value in values.items():
        moment = name.removesuffix(_CODES)
        if moment != name:
            found[name] = decode(value, values[moment + _TOPS]).view(-1)[:size]
        elif not isinstance(value, Tensor) or value.dim() == 0:
            single[name] = value
        elif value.numel() == size:
            found[name] = value.reshape(-1)
        elif not name.endswith(_TOPS):
            raise CheckpointError(f"{state.optimizer['layout']['optimizer']}'s {name} cannot be cut up anew.")
    return found, single


def _as_kept(columns: Columns, master: Tensor) -> dict[str, Tensor]:
    """A master, its average and its moments as the optimizer keeps them."""
    kept: dict[str, Tensor] = {}
    for name, values in columns.items():
        moment = name.removesuffix(_CODES)
        if moment == name:
            kept[name] = values.view_as(master)
        else:
            kept[name], kept[moment + _TOPS] = encoded_again(values, signed=moment == "m")
    return kept

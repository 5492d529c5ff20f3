"""An optimizer's state cut up anew: for another number of processes or another ZeRO stage.

Every value of masters, moments and averaged weights goes to the place that the new partition has for it, unchanged.
Moments in 8 bits are decoded and put into the blocks of the new partition; see `log_codes.encoded_again`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import starmap
from typing import Any

from torch import Tensor

from sgm.training.checkpoints.partitions import OptimizerStateError, Piece, layout, masters, pieces
from sgm.training.checkpoints.state import TrainState
from sgm.training.optimizers.log_codes import decode, encoded_again
from sgm.training.setup.engine import TrainingEngine

Columns = dict[str, Tensor]  # name -> (n,), one value of each for every value of a master
_MASTER, _SHADOW, _CODES, _TOPS = "master", "shadow", "_codes", "_tops"


def repartitioned(
    ds_engine: TrainingEngine, stored: Iterator[TrainState]
) -> tuple[dict[str, Any], dict[str, Tensor] | None]:
    """This rank's (masters and moments, averaged weights) as `partitions` load them, from all earlier ranks' states.

    Args:
        stored: in order; no more are asked for once every value is there.
    Raises:
        OptimizerStateError: another optimizer, values that none of the states has, or a kind of state that cannot be
            cut up.
    """
    now = layout(ds_engine)
    missing = sum(piece.size for piece in pieces(ds_engine))
    columns: list[Columns] = [{} for _ in now["sizes"]]
    whole: list[dict[str, Any]] = [{} for _ in now["sizes"]]  # values that count for a master as a whole: steps
    while missing and (state := next(stored, None)):
        missing -= _take(state, now, columns, whole)
    if missing:
        raise OptimizerStateError(f"the stored optimizer state lacks {missing:,} values that this run trains.")
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
        raise OptimizerStateError(
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
                raise OptimizerStateError(f"{to.name} took another number of steps than its neighbours: {single}.")
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
            raise OptimizerStateError(f"{state.optimizer['layout']['optimizer']}'s {name} cannot be cut up anew.")
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

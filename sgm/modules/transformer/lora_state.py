"""LoRA adapters as tensors: their names, what they say of the adapter, and their sum with the base weights.

Nothing here needs a network. The layout is SAT's, see `sgm.modules.transformer.lora`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from sgm.errors import SgmError

Value = TypeVar("Value")

# Kind of target -> linears of layer {i} as (name, pairs of matrices).
TARGETS: dict[str, tuple[tuple[str, int], ...]] = {
    "attention": (
        ("transformer.layers.{i}.attention.query_key_value", 3),
        ("transformer.layers.{i}.attention.dense", 1),
    ),
    "mlp": (
        ("transformer.layers.{i}.mlp.dense_h_to_4h", 1),
        ("transformer.layers.{i}.mlp.dense_4h_to_h", 1),
    ),
    "adaln": (("mixins.adaln_layer.adaLN_modulations.{i}.1", 1),),
}
# Linears outside the layers: what adapts them, too, can only be folded into the weights.
BESIDE_LAYERS = (
    "mixins.patch_embed.proj", "mixins.patch_embed.text_proj", "time_embed.0", "time_embed.2", "ofs_embed.0",
    "ofs_embed.2", "mixins.final_layer.adaLN_modulation.1", "mixins.final_layer.linear",
)  # fmt: skip
MATRIX = re.compile(r"^(?P<linear>.+)\.matrix_(?P<kind>[AB])\.(?P<part>\d+)$")
MAGNITUDE = re.compile(r"^(?P<linear>.+)\.magnitude\.(?P<part>\d+)$")
_ORIGINAL = ".original."
_OF_EVERY_MODEL = "transformer.final_layernorm.weight"
OWN_MIXINS = ("pos_embed", "patch_embed", "adaln_layer", "final_layer", "lora")  # what a release's network has
_MIXIN = re.compile(r"(?:^|\.)mixins\.(?P<name>[^.]+)\.")


class LoraError(SgmError):
    """An adapter is misconfigured, incomplete, or does not fit the network. The message says where."""


def lora_scaling(rank: int, alpha: float, rank_stabilised: bool = False) -> float:
    """alpha / r, or alpha / sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732)."""
    return alpha / (math.sqrt(rank) if rank_stabilised else rank)


def lora_delta(a: Sequence[Tensor], b: Sequence[Tensor], scaling: float) -> Tensor:
    """What the adapter adds to the weight, scaling * concat_i(B_i A_i), as (out, in) in float32."""
    return scaling * torch.cat([up.float() @ down.float() for down, up in zip(a, b, strict=True)])


def adapted_weight(weight: Tensor, delta: Callable[[], Tensor], magnitudes: Mapping[int, Tensor]) -> Tensor:
    """A weight (out, in) or (out, in, height, width) with an adapter folded in, in float32.

    W + delta; of DoRA (Liu et al. 2024, arXiv:2402.09353, equation 5) each row of that at the norm that was trained.

    Args:
        delta: gives what is added, (out, in) with a window's places flattened.
        magnitudes: norms of rows by the number of their equal part of all rows; rows of other parts have none.
    """
    whole = (weight.float().flatten(1) + delta().to(weight.device)).contiguous()
    for part, norms in magnitudes.items():
        rows = whole[part * len(norms) : (part + 1) * len(norms)]
        rows *= (norms.float().to(weight.device) / rows.norm(dim=1))[:, None]
    return whole.reshape(weight.shape)


def magnitudes_of(state: Mapping[str, Tensor], linear: str) -> dict[int, Tensor]:
    """Norms of a linear's rows, by part; empty where the adapter is no DoRA."""
    found = {match: value for name, value in state.items() if (match := MAGNITUDE.match(name))}
    return {int(match["part"]): value for match, value in found.items() if match["linear"] == linear}


@dataclass(frozen=True)
class LoraSpec:
    """What an adapter's tensors say of it, and alpha, which they do not.

    Attributes:
        alpha: numerator of the scaling; 1, SAT's default, unless known otherwise.
        targets: kinds of linears, of "attention", "mlp", "adaln".
        rank_stabilised: scaling by alpha / sqrt(r).
        only_folded: why it can only be folded into the weights, in a few words; "" where it can be beside them.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    layers: tuple[int, ...]
    rank_stabilised: bool = False
    only_folded: str = ""

    @property
    def scaling(self) -> float:
        return lora_scaling(self.rank, self.alpha, self.rank_stabilised)


def split_lora(state: Mapping[str, Value]) -> tuple[dict[str, Value], dict[str, Value]]:
    """(base, adapter): the base under plain names (without `.original.`), and the matrices under theirs."""
    lora = {name: value for name, value in state.items() if MATRIX.match(name) or MAGNITUDE.match(name)}
    base = {name.replace(_ORIGINAL, "."): value for name, value in state.items() if name not in lora}
    return base, lora


def replaced_parts(base: Mapping[str, Value], lora: Mapping[str, Any]) -> dict[str, Value]:
    """Of an adapter's file, what takes the place of entries of the model that it is laid over: parts trained whole.

    Args:
        base, lora: what `split_lora` gives.
    Returns:
        Nothing where the file holds a whole model: then it has the weights that its matrices belong to.
    """
    linears = {match["linear"] for name in lora if (match := MATRIX.match(name))}
    of_whole = [f"{linear}.weight" for linear in linears] or [_OF_EVERY_MODEL]
    return {} if all(name in base for name in of_whole) else dict(base)


def further_mixin(name: str) -> str | None:
    """The mixin beyond a release's own that an entry (with or without a prefix) belongs to; None: it is no such one."""
    match = _MIXIN.search(name)
    return match["name"] if match and match["name"] not in OWN_MIXINS else None


def split_further(state: Mapping[str, Value]) -> tuple[dict[str, Value], dict[str, dict[str, Value]]]:
    """(entries of a release's own parts, those of each further mixin under its own names), of a network's state."""
    own, further = dict[str, Value](), dict[str, dict[str, Value]]()
    for name, value in state.items():
        mixin = further_mixin(name)
        if mixin is None:
            own[name] = value
        else:
            further.setdefault(mixin, {})[name.split(f"mixins.{mixin}.", 1)[1]] = value
    return own, further


def lora_spec_of(state: Mapping[str, Tensor], facts: Mapping[str, Any] | None = None) -> LoraSpec | None:
    """Rank, targets and layers of the adapter in `state` (with or without a prefix); None where there is none.

    Args:
        facts: what the file says of alpha ("alpha") and of the kind of scaling ("rank_stabilised").
    Raises:
        LoraError: matrices on linears that cannot be adapted here, incomplete pairs, or several ranks.
    """
    pairs = collect_pairs(state)
    if not pairs:
        return None
    ranks, targets, layers = set(), set(), set()
    beside = [linear for linear in pairs if linear.endswith(BESIDE_LAYERS)]
    for linear, (a, b) in pairs.items():
        if linear not in beside:
            target, layer = _target_of(linear)
            targets.add(target)
            layers.add(layer)
        ranks |= {m.shape[0] for m in a} | {m.shape[1] for m in b}
    if len(ranks) > 1:
        raise LoraError(f"the adapter mixes ranks {sorted(ranks)}; one rank for all linears is supported.")
    facts = facts or {}
    return LoraSpec(
        rank=ranks.pop(),
        alpha=float(facts.get("alpha", 1.0)),
        targets=tuple(name for name in TARGETS if name in targets),
        layers=tuple(sorted(layers)),
        rank_stabilised=str(facts.get("rank_stabilised", False)).lower() == "true",
        only_folded=f"it adapts {beside[0]}, too" if beside else "DoRA" if any(map(MAGNITUDE.match, state)) else "",
    )


def collect_pairs(state: Mapping[str, Tensor]) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    """Linear name -> (its A matrices, its B matrices), in order and complete."""
    found: dict[str, dict[str, dict[int, Tensor]]] = {}
    for name, value in state.items():
        match = MATRIX.match(name)
        if match:
            kinds = found.setdefault(match["linear"], {"A": {}, "B": {}})
            kinds[match["kind"]][int(match["part"])] = value
    for linear, kinds in found.items():
        parts = range(max(len(kinds["A"]), len(kinds["B"])))
        if any(sorted(kinds[kind]) != list(parts) for kind in "AB"):
            raise LoraError(
                f"{linear} has matrix_A {sorted(kinds['A'])} and matrix_B {sorted(kinds['B'])}; each A needs its B. "
                "The file is incomplete."
            )
    return {
        linear: ([k["A"][i] for i in sorted(k["A"])], [k["B"][i] for i in sorted(k["B"])])
        for linear, k in found.items()
    }


def _target_of(linear: str) -> tuple[str, int]:
    for target, linears in TARGETS.items():
        for name, _ in linears:
            pattern = re.escape(name).replace(r"\{i\}", r"(\d+)")
            match = re.search(rf"(?:^|\.){pattern}$", linear)
            if match:
                return target, int(match[1])
    raise LoraError(f"an adapter on {linear!r} is not supported; the linears of {', '.join(TARGETS)} are.")

"""LoRA matrices under SAT's names and under PEFT's, as diffusers' `load_lora_weights` reads them, both ways.

They follow the linears of `dit_keys.RULES`. Where PEFT adapts the parts of one SAT linear one by one (q, k, v), SAT has
a pair for each; where SAT has one pair for all parts (modulations), PEFT's share A and take their rows of B.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sgm.convert.dit_keys import HF_MODULES, SAT_MODULES, Rule, TransformerKeyError, matched, network_entries

_SAT_LORA = r"\.matrix_(?P<kind>[AB])\.(?P<part>\d+)$"
_PEFT_PREFIX = r"^(?:base_model\.model\.)?(?:transformer\.)?"
_HF_LORA = r"\.lora_(?P<kind>[AB])(?:\.default)?\.weight$"


def lora_sat_to_hf(
    state: Mapping[str, Tensor], scaling: float = 1.0, prefix: str = "transformer."
) -> dict[str, Tensor]:
    """SAT's LoRA matrices under PEFT's names, as `load_lora_weights` of diffusers' pipelines takes them.

    Args:
        state: matrices, with or without `model.diffusion_model.`; other entries are left out.
        scaling: factor put into B. Files do not carry SAT's alpha / r; given here, the adapter is right at PEFT's
            scale 1. With 1.0 the matrices stay as they are, and the user has to set the scale alpha / r.
        prefix: in front of every name; "" for `CogVideoXTransformer3DModel` itself.
    Raises:
        TransformerKeyError: matrices on modules that diffusers does not have.
    """
    out: dict[str, Tensor] = {}
    matrices = {n: t for n, t in network_entries(state).items() if re.search(_SAT_LORA, n)}
    pairs = Counter(name.rpartition(".")[0] for name in matrices)
    for match, value in matched(matrices, _SAT_LORA, SAT_MODULES, "SAT"):
        kind, linear = match.end["kind"], match.at(match.rule.sat)
        value = value * scaling if kind == "B" and scaling != 1.0 else value
        pieces = _share_out(match.rule, value, kind, int(match.end["part"]), pairs[f"{linear}.matrix_{kind}"])
        out |= {f"{prefix}{match.at(module)}.lora_{kind}.weight": piece for module, piece in pieces}
    return out


def _share_out(rule: Rule, value: Tensor, kind: str, part: int, pairs: int) -> list[tuple[str, Tensor]]:
    """A SAT matrix for each diffusers module: a pair for each, or one pair with the rows of B shared out."""
    if pairs == len(rule.hf):
        return [(rule.hf[part], value)]
    if kind == "A":
        return [(module, value) for module in rule.hf]
    chunks = value.chunk(rule.parts)
    return [(m, _stack([chunks[p] for p in parts])) for m, parts in zip(rule.hf, rule.takes, strict=True)]


def lora_hf_to_sat(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PEFT's names to SAT's (without `model.diffusion_model.`), matrices as they are.

    Raises:
        TransformerKeyError: names that are not LoRA of this network, or modulations of one layer with different A.
    """
    found: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}}
    rule_of = {}
    named = {re.sub(_PEFT_PREFIX, "", name): value for name, value in state.items()}
    for match, value in matched(named, _HF_LORA, HF_MODULES, "PEFT"):
        sat = match.at(match.rule.sat)
        rule_of[sat] = match.rule
        found[match.end["kind"]][f"{sat} {match.place}"] = value
    out: dict[str, Tensor] = {}
    for sat, rule in rule_of.items():
        places = [f"{sat} {k}" for k in range(len(rule.hf))]
        if not all(place in found[kind] for kind in "AB" for place in places):
            raise TransformerKeyError(f"{sat}: SAT adapts all of {', '.join(rule.hf)} or none; some are missing.")
        downs, ups = ([found[kind][place] for place in places] for kind in "AB")
        out |= _gather(sat, rule, downs, ups)
    return out


def _gather(sat: str, rule: Rule, downs: Sequence[Tensor], ups: Sequence[Tensor]) -> dict[str, Tensor]:
    if all(len(parts) == 1 for parts in rule.takes):
        return {f"{sat}.matrix_A.{k}": t for k, t in enumerate(downs)} | {
            f"{sat}.matrix_B.{k}": t for k, t in enumerate(ups)
        }
    if not all(torch.equal(down, downs[0]) for down in downs[1:]):
        raise TransformerKeyError(f"{sat}: {', '.join(rule.hf)} have different lora_A, SAT has one for them all.")
    rows: dict[int, Tensor] = {}
    for parts, up in zip(rule.takes, ups, strict=True):
        rows.update(zip(parts, up.chunk(len(parts)), strict=True))
    return {f"{sat}.matrix_A.0": downs[0], f"{sat}.matrix_B.0": _stack([rows[p] for p in range(rule.parts)])}


def _stack(parts: Sequence[Tensor]) -> Tensor:
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(list(parts))

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

from sgm.convert.dit_keys import HF_MODULES, SAT_MODULES, Rule, matched, network_entries
from sgm.convert.lora_names import Factors

_SAT_LORA = r"\.matrix_(?P<kind>[AB])\.(?P<part>\d+)$"


def lora_sat_to_hf(state: Mapping[str, Tensor], prefix: str = "transformer.") -> dict[str, Tensor]:
    """SAT's LoRA matrices, as they are, under PEFT's names, as `load_lora_weights` of diffusers' pipelines takes them.

    Args:
        state: matrices, with or without `model.diffusion_model.`; other entries are left out.
        prefix: in front of every name; "" for `CogVideoXTransformer3DModel` itself.
    Raises:
        TransformerKeyError: matrices on modules that diffusers does not have.
    """
    out: dict[str, Tensor] = {}
    matrices = {n: t for n, t in network_entries(state).items() if re.search(_SAT_LORA, n)}
    pairs = Counter(name.rpartition(".")[0] for name in matrices)
    for match, value in matched(matrices, _SAT_LORA, SAT_MODULES, "SAT"):
        kind, linear = match.end["kind"], match.at(match.rule.sat)
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


def lora_hf_to_sat(modules: Mapping[str, Factors]) -> dict[str, Tensor]:
    """Adapted modules of diffusers as SAT's matrices (without `model.diffusion_model.`).

    A linear of SAT has pairs of one rank: what is missing of it (q of q, k, v; the modulations of one branch) becomes
    zeros, smaller ranks are filled with zeros, and modulations with different A are put side by side. All of that adds
    nothing, and the matrices stay bit for bit as they are where none of it is needed. Norms of rows (DoRA) go along as
    `magnitude.i` of the i-th of the rule's parts.
    """
    by_linear: dict[str, dict[int, Factors]] = {}
    rule_of: dict[str, Rule] = {}
    for name, factors in modules.items():
        (match, _), *_ = matched({name: factors}, "$", HF_MODULES, "diffusers")
        sat = match.at(match.rule.sat)
        rule_of[sat] = match.rule
        by_linear.setdefault(sat, {})[match.place] = factors
    out: dict[str, Tensor] = {}
    for sat, found in by_linear.items():
        rule = rule_of[sat]
        pairs = _pairs(rule, found) if all(len(parts) == 1 for parts in rule.takes) else [_one_pair(rule, found)]
        rank = max(down.shape[0] for down, _ in pairs)
        for k, (down, up) in enumerate(pairs):
            out[f"{sat}.matrix_A.{k}"] = _filled(down, rank, 0)
            out[f"{sat}.matrix_B.{k}"] = _filled(up, rank, 1)
        out |= _magnitudes(sat, rule, found)
    rank = max((t.shape[0] for n, t in out.items() if ".matrix_A." in n), default=0)
    return {name: _filled(t, rank, int(".matrix_B." in name)) if ".matrix_" in name else t for name, t in out.items()}


def _pairs(rule: Rule, found: Mapping[int, Factors]) -> list[tuple[Tensor, Tensor]]:
    """A pair for each module of the rule."""
    some = next(iter(found.values()))
    none = some.down.new_zeros(1, some.down.shape[1]), some.up.new_zeros(some.up.shape[0], 1)
    return [(found[k].down, found[k].up) if k in found else none for k in range(len(rule.hf))]


def _one_pair(rule: Rule, found: Mapping[int, Factors]) -> tuple[Tensor, Tensor]:
    """One pair for all modules of the rule: their A once if they are the same, else one below the other."""
    first, *others = found.values()
    same = all(torch.equal(factors.down, first.down) for factors in others)
    widths = [first.rank] if same else [factors.rank for factors in found.values()]
    size = first.up.shape[0] // len(rule.takes[next(iter(found))])
    ups = {part: first.up.new_zeros(size, sum(widths)) for part in range(rule.parts)}
    begin = 0
    for place, factors in found.items():
        for part, rows in zip(rule.takes[place], factors.up.chunk(len(rule.takes[place])), strict=True):
            ups[part][:, begin : begin + factors.rank] = rows
        begin += 0 if same else factors.rank
    down = first.down if same else torch.cat([factors.down for factors in found.values()])
    return down, torch.cat([ups[part] for part in range(rule.parts)])


def _filled(matrix: Tensor, rank: int, dim: int) -> Tensor:
    """A matrix of this rank, by zeros behind its own."""
    lacking = rank - matrix.shape[dim]
    if not lacking:
        return matrix
    shape = [lacking if d == dim else n for d, n in enumerate(matrix.shape)]
    return torch.cat([matrix, matrix.new_zeros(shape)], dim)


def _magnitudes(sat: str, rule: Rule, found: Mapping[int, Factors]) -> dict[str, Tensor]:
    return {
        f"{sat}.magnitude.{part}": rows
        for place, factors in found.items()
        if factors.magnitude is not None
        for part, rows in zip(rule.takes[place], factors.magnitude.chunk(len(rule.takes[place])), strict=True)
    }


def _stack(parts: Sequence[Tensor]) -> Tensor:
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(list(parts))

"""LoRA matrices under SAT's names and under PEFT's, as diffusers' `load_lora_weights` reads them, both ways; and the
files of other trainers, name by name.

They follow the linears of `dit_keys.RULES`. Where PEFT adapts the parts of one SAT linear one by one (q, k, v), SAT has
a pair for each; where SAT has one pair for all parts (modulations), PEFT's share A and take their rows of B.

Trainers have two ways to write a module: with dots, behind one of several prefixes (PEFT, diffusers, finetrainers,
CogKit), and with underscores behind `lora_unet_` and its like (kohya, VideoX-Fun). ComfyUI's own network has shorter
names for the same.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sgm.convert.dit_keys import HF_MODULES, SAT_MODULES, Rule, matched, network_entries
from sgm.convert.lazy import ConvertError
from sgm.weights.assign import some_of

_DOTTED = re.compile(r"^(?:base_model\.model\.)?(?:(?:model\.)?diffusion_model\.|transformer\.)?")
_FLAT = re.compile(r"^(?:lora_unet|lora_transformer|lycoris)_+")
_ENDS = {  # of what is the matrix, by the end of its name
    "down": re.compile(r"\.lora(?:_A(?:\.\w+)?|_down|\.down|_linear_layer\.down)\.weight$"),
    "up": re.compile(r"\.lora(?:_B(?:\.\w+)?|_up|\.up|_linear_layer\.up)\.weight$"),
    "alpha": re.compile(r"\.alpha$"),
    "magnitude": re.compile(r"\.(?:lora_magnitude_vector(?:\.\w+)?(?:\.weight)?|dora_scale)$"),
}
_COMFY = {  # ComfyUI's names of a block's linears, and of those beside the blocks
    "q": "attn1.to_q", "k": "attn1.to_k", "v": "attn1.to_v", "attn_out": "attn1.to_out.0", "ff_proj": "ff.net.0.proj",
    "ff_out": "ff.net.2", "norm1.linear": "norm1.linear", "norm2.linear": "norm2.linear",
}  # fmt: skip
_COMFY_ENDS = {f"{kind}_embedding_linear_{k}": f"{kind}_embedding.linear_{k}" for kind in ("time", "ofs") for k in "12"}
# What is in a file beside or instead of such matrices: a pattern of names, and what it is.
_KINDRED = re.compile(r"\.(lokr|hada|oft|boft|ia3|vera|lora_E)(_|$)|\.[ab][12]\.weight$")
_OTHERS = {
    _KINDRED.pattern: "another kind of adapter (LoKr, LoHa, OFT or the like)",
    r"^(lora_te|text_encoder)": "an adapter of the text encoder",
    r"lora_mid\.weight$": "a LoRA with a matrix in between (LoCon)",
    r"lora_[AB]\.(\w+\.)?bias$": "biases of the matrices (lora_bias)",
    r"\.diff(_b)?$|\.(w|b)_norm$|\.set_weight$": "whole differences of weights or biases",
    r"(?<!_[AB]|up|wn)\.(weight|bias)$|pos_embedding$": "whole weights or biases (modules_to_save, bias)",
}


@dataclass
class Factors:
    """What a file adds to a linear of diffusers, W + factor * up @ down, and with `magnitude` the rows' norms (DoRA).

    Attributes:
        down: (r, in), of a convolution with its window flattened into `in`.
        up: (out, r).
        alpha: of an entry of its own.
        magnitude: (out,).
    """

    down: Tensor
    up: Tensor
    alpha: float | None = None
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]


def is_foreign(names: Iterable[str]) -> bool:
    """Whether these are names of an adapter that is not in SAT's layout; also of one of a kind that is not read."""
    kinds = _ENDS["down"], _ENDS["up"], _KINDRED
    return any(kind.search(name) for name in names for kind in kinds)


def factors_of(state: Mapping[str, Tensor], source: str) -> dict[str, Factors]:
    """Every adapted linear by diffusers' name without prefix, such as `transformer_blocks.3.attn1.to_q`.

    Raises:
        ConvertError: entries that are no LoRA of this transformer, said by kind; a matrix without its other; or
            matrices that do not belong together.
    """
    found: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for name, value in state.items():
        kind, module = _read(name)
        if module is None or kind in found.setdefault(module, {}):
            unknown.append(name)
        else:
            found[module][kind] = value
    if unknown:
        raise ConvertError(f"{source}: {_said(unknown, len(state))}")
    return {module: _factors(module, entries, source) for module, entries in found.items()}


def _read(name: str) -> tuple[str, str | None]:
    """(what the entry is, its module); None where it is no LoRA of this transformer."""
    for kind, pattern in _ENDS.items():
        if end := pattern.search(name):
            return kind, _module(name[: end.start()])
    return "", None


def _module(name: str) -> str | None:
    if flat := _FLAT.match(name):
        return _from_flat(name[flat.end() :])
    name = _DOTTED.sub("", name)
    name = _COMFY_ENDS.get(name, name)
    if block := re.fullmatch(r"blocks\.(\d+)\.(.+)", name):
        name = f"transformer_blocks.{block[1]}.{_COMFY.get(block[2], '')}"
    return name if re.sub(r"(?<=^transformer_blocks\.)\d+", "{i}", name) in HF_MODULES else None


def _from_flat(flat: str) -> str | None:
    """`transformer_blocks_3_attn1_to_q` or ComfyUI's `blocks_3_q` with dots."""
    number = re.match(r"(?:transformer_)?blocks_(\d+)_", flat)
    if number is None:
        return _FLAT_MODULES.get(flat)
    module = _FLAT_MODULES.get(f"{{i}}_{flat[number.end() :]}")
    return module and module.replace("{i}", number[1])


_FLAT_MODULES = {
    **{name.removeprefix("transformer_blocks.").replace(".", "_"): name for name in HF_MODULES},
    **{f"{{i}}_{short.replace('.', '_')}": f"transformer_blocks.{{i}}.{name}" for short, name in _COMFY.items()},
}


def _said(unknown: list[str], total: int) -> str:
    for pattern, kind in _OTHERS.items():
        if named := [name for name in unknown if re.search(pattern, name)]:
            return (
                f"{len(named)} of {total} entries are {kind}: {some_of(named, 3)}. Only LoRA of the transformer's "
                "linears, with DoRA, is read; without those entries the adapter would be another one."
            )
    return f"{len(unknown)} of {total} names are not those of a LoRA of CogVideoX's transformer: {some_of(unknown, 3)}."


def _factors(module: str, entries: Mapping[str, Tensor], source: str) -> Factors:
    if missing := [f"lora_{kind}" for kind in ("down", "up") if kind not in entries]:
        raise ConvertError(
            f"{source}: {module} lacks {' and '.join(missing)} (A is down, B is up); each A needs its B. The file is "
            "incomplete."
        )
    down, up, magnitude = entries["down"], entries["up"], entries.get("magnitude")
    if down.ndim not in (2, 4) or up.ndim != down.ndim or down.shape[0] != up.shape[1]:
        raise ConvertError(
            f"{source}: {module} has matrices {list(down.shape)} and {list(up.shape)}; they do not belong together: "
            f"their ranks are [{down.shape[0] if down.ndim else 0}, {up.shape[1] if up.ndim > 1 else 0}]."
        )
    rows = up.shape[0]
    if magnitude is not None and tuple(magnitude.shape) not in ((rows,), (rows, 1), (1, rows, 1, 1)):
        raise ConvertError(
            f"{source}: {module} has norms {list(magnitude.shape)} (DoRA) where its {rows} rows have one each; norms "
            "of columns are not read."
        )
    alpha = entries.get("alpha")
    return Factors(
        down.flatten(1),
        up.flatten(1),
        None if alpha is None else float(alpha),
        None if magnitude is None else magnitude.flatten(),
    )


_SAT_LORA = r"\.matrix_(?P<kind>[AB])\.(?P<part>\d+)$"


def lora_sat_to_hf(state: Mapping[str, Tensor], prefix: str = "transformer.") -> dict[str, Tensor]:
    """SAT's LoRA matrices, as they are, under PEFT's names, as `load_lora_weights` of diffusers' pipelines takes them.

    Args:
        state: matrices, with or without `model.diffusion_model.`; other entries are left out.
        prefix: in front of every name; "" for `CogVideoXTransformer3DModel` itself.
    Raises:
        ConvertError: matrices on modules that diffusers does not have.
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
    return [(m, torch.cat([chunks[p] for p in parts])) for m, parts in zip(rule.hf, rule.takes, strict=True)]


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

"""Names of the transformer's tensors in SAT's layout and in diffusers' `CogVideoXTransformer3DModel`, both ways.

`RULES` is the whole map: each line names a module of SAT and the module or modules of diffusers that hold its rows.
Where SAT stacks several things in one weight (q, k, v; twelve modulations), the rows are cut into equal parts, and each
diffusers module takes some of them, in the order given. LoRA matrices follow their linear (`lora_keys`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from torch import Tensor

from sgm.convert.lazy import ConvertError, all_deferred, made, row_parts, stacked
from sgm.weights.assign import some_of
from sgm.weights.release import FROZEN_PREFIXES, NETWORK_PREFIX
from sgm.weights.save import Deferred

Value = TypeVar("Value")

POSITIONS = ("mixins.pos_embed.pos_embedding", "patch_embed.pos_embedding")
# Computed by diffusers, or never read: not part of its files.
NOT_IN_HF = ("mixins.pos_embed.freqs_sin", "mixins.pos_embed.freqs_cos", "transformer.position_embeddings.weight")


@dataclass(frozen=True)
class Rule:
    """One module of SAT and its counterparts; {i} is the layer.

    Attributes:
        takes: for each of `hf`, the parts of SAT's rows that it holds; `parts` of equal size in all.
    """

    sat: str
    hf: tuple[str, ...]
    takes: tuple[tuple[int, ...], ...] = ((0,),)

    @property
    def parts(self) -> int:
        return sum(len(parts) for parts in self.takes)


_L, _A, _B = "transformer.layers.{i}", "mixins.adaln_layer", "transformer_blocks.{i}"
RULES: tuple[Rule, ...] = (
    Rule("mixins.patch_embed.proj", ("patch_embed.proj",)),
    Rule("mixins.patch_embed.text_proj", ("patch_embed.text_proj",)),
    Rule("time_embed.0", ("time_embedding.linear_1",)),
    Rule("time_embed.2", ("time_embedding.linear_2",)),
    Rule("ofs_embed.0", ("ofs_embedding.linear_1",)),
    Rule("ofs_embed.2", ("ofs_embedding.linear_2",)),
    Rule(
        f"{_A}.adaLN_modulations.{{i}}.1",  # shift, scale, gate: video attention, video MLP, text attention, text MLP
        (f"{_B}.norm1.linear", f"{_B}.norm2.linear"),
        ((0, 1, 2, 6, 7, 8), (3, 4, 5, 9, 10, 11)),
    ),
    Rule(f"{_A}.query_layernorm_list.{{i}}", (f"{_B}.attn1.norm_q",)),
    Rule(f"{_A}.key_layernorm_list.{{i}}", (f"{_B}.attn1.norm_k",)),
    Rule(f"{_L}.input_layernorm", (f"{_B}.norm1.norm",)),
    Rule(
        f"{_L}.attention.query_key_value",
        (f"{_B}.attn1.to_q", f"{_B}.attn1.to_k", f"{_B}.attn1.to_v"),
        ((0,), (1,), (2,)),
    ),
    Rule(f"{_L}.attention.dense", (f"{_B}.attn1.to_out.0",)),
    Rule(f"{_L}.post_attention_layernorm", (f"{_B}.norm2.norm",)),
    Rule(f"{_L}.mlp.dense_h_to_4h", (f"{_B}.ff.net.0.proj",)),
    Rule(f"{_L}.mlp.dense_4h_to_h", (f"{_B}.ff.net.2",)),
    Rule("transformer.final_layernorm", ("norm_final",)),
    Rule("mixins.final_layer.norm_final", ("norm_out.norm",)),
    Rule("mixins.final_layer.adaLN_modulation.1", ("norm_out.linear",)),
    Rule("mixins.final_layer.linear", ("proj_out",)),
)
_LEAF = r"\.(?P<leaf>weight|bias)$"


def sat_to_hf(state: Mapping[str, Tensor], learned_positions: bool | None = None) -> dict[str, Tensor]:
    """SAT's transformer as diffusers' state dict, as `hf_plan` describes it, all tensors at once."""
    return made(hf_plan(all_deferred(state), learned_positions))


def hf_to_sat(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Diffusers' transformer as SAT's state dict, as `sat_plan` describes it, all tensors at once."""
    return made(sat_plan(all_deferred(state)))


def hf_plan(state: Mapping[str, Deferred], learned_positions: bool | None = None) -> dict[str, Deferred]:
    """SAT's transformer under diffusers' names, each tensor to be made when it is written.

    Entries of text encoder and VAE, position tables that diffusers computes, and what nothing reads are left out.
    The result is right with diffusers' `norm_out.norm.eps` of 1e-5 up to 2e-5; with 1e-6 it is SAT's network exactly.

    Args:
        state: names with or without `model.diffusion_model.`; adapters must have been merged.
        learned_positions: whether the position table is trained (5B image-to-video) and goes along; None looks at it.
    Raises:
        ConvertError: names of another layout, or LoRA matrices.
    """
    state = network_entries(state)
    if any(".matrix_" in name for name in state):
        raise ConvertError("the state holds LoRA matrices; merge them first (merge_lora), or export them alone.")
    kept = {name: source for name, source in state.items() if name not in (POSITIONS[0], *NOT_IN_HF)}
    plan: dict[str, Deferred] = {}
    for match, source in matched(kept, _LEAF, SAT_MODULES, "SAT"):
        rule = match.rule
        for module, parts in zip(rule.hf, rule.takes, strict=True):
            plan[f"{match.at(module)}.{match.end['leaf']}"] = row_parts(source, rule.parts, parts)
    table = state.get(POSITIONS[0])
    if table is not None and (not is_sine_table(table.make()) if learned_positions is None else learned_positions):
        plan[POSITIONS[1]] = table
    return plan


def sat_plan(state: Mapping[str, Deferred]) -> dict[str, Deferred]:
    """Diffusers' transformer under SAT's names (without `model.diffusion_model.`); the inverse of `hf_plan`.

    Tables that the configuration determines are not part of the result.

    Raises:
        ConvertError: names of another layout, or a module whose counterparts are not all there.
    """
    pieces: dict[str, dict[int, Deferred]] = {}
    rule_of: dict[str, Rule] = {}
    for match, source in matched({n: t for n, t in state.items() if n != POSITIONS[1]}, _LEAF, HF_MODULES, "diffusers"):
        takes = match.rule.takes[match.place]
        sat = f"{match.at(match.rule.sat)}.{match.end['leaf']}"
        rule_of[sat] = match.rule
        blocks = [row_parts(source, len(takes), (k,)) for k in range(len(takes))]
        pieces.setdefault(sat, {}).update(zip(takes, blocks, strict=True))
    plan = {POSITIONS[0]: state[POSITIONS[1]]} if POSITIONS[1] in state else {}
    for sat, parts in pieces.items():
        missing = [p for p in range(rule_of[sat].parts) if p not in parts]
        if missing:
            raise ConvertError(
                f"{sat} cannot be put together, of {', '.join(rule_of[sat].hf)} some are missing (incomplete file)."
            )
        plan[sat] = stacked([parts[p] for p in range(len(parts))])
    return plan


def is_sine_table(table: Tensor) -> bool:
    """Whether a position table (1, l + n, d) is the computed one: text rows zero, position (0, 0, 0) all sines of 0 (0)
    and cosines of 0 (1). A trained table, or one that starts at zero, is not."""
    rows = table[0]
    first = rows.any(dim=-1).nonzero()
    if not len(first):
        return False
    row = rows[first[0, 0]]
    return bool(((row == 0) | (row == 1)).all())


# --- helpers, also of lora_keys -------------------------------------------------------------------------------------


def network_entries(state: Mapping[str, Value]) -> dict[str, Value]:
    """Of an engine's state the network's entries, without prefix; a bare network's as they are."""
    if any(name.startswith(NETWORK_PREFIX) for name in state):
        stray = [n for n in state if not n.startswith((NETWORK_PREFIX, *FROZEN_PREFIXES))]
        refuse_unknown(stray, len(state), "SAT")
        return {n.removeprefix(NETWORK_PREFIX): t for n, t in state.items() if n.startswith(NETWORK_PREFIX)}
    return dict(state)


class Match(NamedTuple):
    """What a tensor's name is made of: its rule, its module's place among `rule.hf`, its layer, and the end."""

    rule: Rule
    place: int
    layer: str
    end: re.Match[str]

    def at(self, template: str) -> str:
        """The module's name in this layer."""
        return template.replace("{i}", self.layer)


SAT_MODULES = {rule.sat: (rule, 0) for rule in RULES}
HF_MODULES = {module: (rule, place) for rule in RULES for place, module in enumerate(rule.hf)}


def matched(
    state: Mapping[str, Value], ending: str, modules: Mapping[str, tuple[Rule, int]], layout: str
) -> list[tuple[Match, Value]]:
    """Every entry with what its name is made of: one of `modules`, and an end that the pattern `ending` describes.

    Raises:
        ConvertError: names that are not so; lists them.
    """
    found = {name: _match(name, ending, modules) for name in state}
    refuse_unknown([name for name, match in found.items() if match is None], len(state), layout)
    return [(match, state[name]) for name, match in found.items() if match is not None]


def _match(name: str, ending: str, modules: Mapping[str, tuple[Rule, int]]) -> Match | None:
    end = re.search(ending, name)
    if end is None:
        return None
    module = name[: end.start()]
    layer = re.search(r"(?<=\.)\d+(?=\.|$)", module)
    for number in [layer[0], ""] if layer else [""]:
        template = re.sub(rf"(?<=\.){number}(?=\.|$)", "{i}", module, count=1) if number else module
        if template in modules:
            return Match(*modules[template], number, end)
    return None


def refuse_unknown(names: Sequence[str], total: int, layout: str) -> None:
    """Raise ConvertError if there are names that no rule knows."""
    if names:
        raise ConvertError(
            f"{len(names)} of {total} names are not those of a {layout} CogVideoX transformer: {some_of(names)}. "
            "Check the direction of the conversion."
        )

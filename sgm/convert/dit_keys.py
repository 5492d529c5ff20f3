"""Names of the transformer's tensors in SAT's layout and in diffusers' `CogVideoXTransformer3DModel`, both ways.

`RULES` is the whole map: each line names a module of SAT and the module or modules of diffusers that hold its rows.
Where SAT stacks several things in one weight (q, k, v; twelve modulations), the rows are cut into equal parts, and each
diffusers module takes some of them, in the order given. LoRA matrices follow their linear.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NETWORK_PREFIX = "model.diffusion_model."
OTHER_PARTS = ("conditioner.", "first_stage_model.")
POSITIONS = ("mixins.pos_embed.pos_embedding", "patch_embed.pos_embedding")
# Computed by diffusers, or never read: not part of its files.
NOT_IN_HF = ("mixins.pos_embed.freqs_sin", "mixins.pos_embed.freqs_cos", "transformer.position_embeddings.weight")


class TransformerKeyError(ValueError):
    """Names or tensors that do not form a CogVideoX transformer of the expected layout. The message lists them."""


@dataclass(frozen=True)
class Rule:
    """One module of SAT and its counterparts; {i} is the layer.

    Attributes:
        sat: module name.
        hf: module names.
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
_SAT_LORA = r"\.matrix_(?P<kind>[AB])\.(?P<part>\d+)$"
_PEFT_PREFIX = r"^(?:base_model\.model\.)?(?:transformer\.)?"
_HF_LORA = r"\.lora_(?P<kind>[AB])(?:\.default)?\.weight$"


def sat_to_hf(state: Mapping[str, Tensor], learned_positions: bool | None = None) -> dict[str, Tensor]:
    """SAT's transformer as diffusers' state dict.

    Entries of text encoder and VAE, position tables that diffusers computes, and what nothing reads are left out.
    The result is right with diffusers' `norm_out.norm.eps` of 1e-5 up to 2e-5; with 1e-6 it is SAT's network exactly.

    Args:
        state: names with or without `model.diffusion_model.`; adapters must have been merged.
        learned_positions: whether the position table is trained (5B image-to-video) and goes along; None looks at it.
    Raises:
        TransformerKeyError: names of another layout, or LoRA matrices.
    """
    state = _network_entries(state)
    if any(".matrix_" in name for name in state):
        raise TransformerKeyError("the state holds LoRA matrices; merge them first (merge_lora), or export them alone.")
    out: dict[str, Tensor] = {}
    unknown = []
    for name, value in state.items():
        match = _match(name, _LEAF, [rule.sat for rule in RULES])
        if match is not None:
            rule, layer, groups = match
            chunks = value.chunk(rule.parts)
            for module, parts in zip(rule.hf, rule.takes, strict=True):
                out[f"{_at(module, layer)}.{groups['leaf']}"] = _stack([chunks[p] for p in parts])
        elif name == POSITIONS[0]:
            if learned_positions if learned_positions is not None else not is_sine_table(value):
                out[POSITIONS[1]] = value
        elif name not in NOT_IN_HF:
            unknown.append(name)
    _refuse_unknown(unknown, len(state), "SAT")
    return out


def hf_to_sat(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Diffusers' transformer as SAT's state dict (without `model.diffusion_model.`); the inverse of `sat_to_hf`.

    Tables that the configuration determines are not part of the result.

    Raises:
        TransformerKeyError: names of another layout, or a module whose counterparts are not all there.
    """
    pieces: dict[str, dict[int, Tensor]] = {}
    rule_of: dict[str, Rule] = {}
    out, unknown = {}, []
    for name, value in state.items():
        match = _match(name, _LEAF, [module for rule in RULES for module in rule.hf])
        if match is not None:
            rule, layer, groups = match
            takes = rule.takes[rule.hf.index(groups["template"])]
            sat = f"{_at(rule.sat, layer)}.{groups['leaf']}"
            rule_of[sat] = rule
            pieces.setdefault(sat, {}).update(zip(takes, value.chunk(len(takes)), strict=True))
        elif name == POSITIONS[1]:
            out[POSITIONS[0]] = value
        else:
            unknown.append(name)
    _refuse_unknown(unknown, len(state), "diffusers")
    for sat, parts in pieces.items():
        missing = [p for p in range(rule_of[sat].parts) if p not in parts]
        if missing:
            raise TransformerKeyError(
                f"{sat} cannot be put together, of {', '.join(rule_of[sat].hf)} some are missing (incomplete file)."
            )
        out[sat] = _stack([parts[p] for p in range(len(parts))])
    return out


def hf_names(name: str) -> list[str]:
    """Names in diffusers of one tensor in SAT (without prefix); empty where diffusers has none.

    Raises:
        TransformerKeyError: no tensor of this network.
    """
    match = _match(name, _LEAF, [rule.sat for rule in RULES])
    if match is not None:
        rule, layer, groups = match
        return [f"{_at(module, layer)}.{groups['leaf']}" for module in rule.hf]
    if name == POSITIONS[0]:
        return [POSITIONS[1]]
    _refuse_unknown([] if name in NOT_IN_HF else [name], 1, "SAT")
    return []


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
    out, unknown = {}, []
    matrices = {n: t for n, t in _network_entries(state).items() if re.search(_SAT_LORA, n)}
    for name, value in matrices.items():
        match = _match(name, _SAT_LORA, [rule.sat for rule in RULES])
        if match is None:
            unknown.append(name)
            continue
        rule, layer, groups = match
        pairs = sum(n.startswith(name.rpartition(".")[0] + ".") for n in matrices)
        value = value * scaling if groups["kind"] == "B" and scaling != 1.0 else value
        for module, piece in _share_out(rule, value, groups["kind"], int(groups["part"]), pairs):
            out[f"{prefix}{_at(module, layer)}.lora_{groups['kind']}.weight"] = piece
    _refuse_unknown(unknown, len(matrices), "SAT")
    return out


def _share_out(rule: Rule, value: Tensor, kind: str, part: int, pairs: int) -> list[tuple[str, Tensor]]:
    """A SAT matrix for each diffusers module: a pair for each, or one pair with the rows of B shared out."""
    if pairs == len(rule.hf):
        return [(rule.hf[part], value)]
    if kind == "A":
        return [(module, value) for module in rule.hf]
    chunks = value.chunk(rule.parts)
    return [(m, _stack([chunks[p] for p in parts])) for m, parts in zip(rule.hf, rule.takes, strict=True)]


def lora_hf_to_sat(state: Mapping[str, Tensor], scaling: float = 1.0) -> dict[str, Tensor]:
    """PEFT's names to SAT's (without `model.diffusion_model.`); B is divided by `scaling`, SAT's alpha / r.

    Raises:
        TransformerKeyError: names that are not LoRA of this network, or modulations of one layer with different A.
    """
    found: dict[str, dict[str, Tensor]] = {"A": {}, "B": {}}
    unknown, rule_of = [], {}
    for name, value in state.items():
        match = _match(re.sub(_PEFT_PREFIX, "", name), _HF_LORA, [module for rule in RULES for module in rule.hf])
        if match is None:
            unknown.append(name)
            continue
        rule, layer, groups = match
        sat = _at(rule.sat, layer)
        rule_of[sat] = rule
        found[groups["kind"]][f"{sat} {rule.hf.index(groups['template'])}"] = (
            value / scaling if groups["kind"] == "B" and scaling != 1.0 else value
        )
    _refuse_unknown(unknown, len(state), "PEFT")
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


def is_sine_table(table: Tensor) -> bool:
    """Whether a position table (1, l + n, d) is the computed one: text rows zero, position (0, 0, 0) all sines of 0 (0)
    and cosines of 0 (1). A trained table, or one that starts at zero, is not."""
    rows = table[0]
    first = rows.any(dim=-1).nonzero()
    if not len(first):
        return False
    row = rows[first[0, 0]]
    return bool(((row == 0) | (row == 1)).all())


def linear_patch(weight: Tensor) -> Tensor:
    """Patch weight of a convolution (d, c, p, q) as that of a linear layer over (c, 1, p, q): (d, c*p*q)."""
    return weight.flatten(1)


def conv_patch(weight: Tensor, patch: tuple[int, int]) -> Tensor:
    """Patch weight of a linear layer (d, c*p*q) as that of a convolution: (d, c, p, q). For one-frame patches."""
    return weight.unflatten(1, (-1, *patch))


# --- helpers ----------------------------------------------------------------------------------------------------------


def _network_entries(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if any(name.startswith(NETWORK_PREFIX) for name in state):
        stray = [n for n in state if not n.startswith((NETWORK_PREFIX, *OTHER_PARTS))]
        _refuse_unknown(stray, len(state), "SAT")
        return {n.removeprefix(NETWORK_PREFIX): t for n, t in state.items() if n.startswith(NETWORK_PREFIX)}
    return dict(state)


def _match(name: str, ending: str, templates: Iterable[str]) -> tuple[Rule, str, dict[str, str]] | None:
    """(rule, layer number, named groups of `ending` and the template) for the module that `name` belongs to."""
    end = re.search(ending, name)
    if end is None:
        return None
    module = name[: end.start()]
    layer = re.search(r"(?<=\.)\d+(?=\.|$)", module)
    for number in ([layer[0], ""] if layer else [""]):
        template = re.sub(rf"(?<=\.){number}(?=\.|$)", "{i}", module, count=1) if number else module
        if template in templates and template in _RULE_OF:
            return _RULE_OF[template], number, {**end.groupdict(), "template": template}
    return None


_RULE_OF = {module: rule for rule in RULES for module in (rule.sat, *rule.hf)}


def _at(template: str, layer: str) -> str:
    return template.replace("{i}", layer)


def _stack(parts: Sequence[Tensor]) -> Tensor:
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(list(parts))


def _refuse_unknown(names: Sequence[str], total: int, layout: str) -> None:
    if names:
        shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        raise TransformerKeyError(
            f"{len(names)} of {total} names are not those of a {layout} CogVideoX transformer: {shown}. "
            "Check the direction of the conversion."
        )


# --- configurations ---------------------------------------------------------------------------------------------------


def hf_config(params: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` fields of `CogVideoXTransformer3DModel` for the `network_config.params` of a YAML file."""
    modules = {name: dict(node.get("params") or {}) for name, node in params["modules"].items()}
    positions = modules["pos_embed_config"]
    rotary = params["modules"]["pos_embed_config"]["target"].endswith("Rotary3DPositionEmbeddingMixin")
    patch = params["patch_size"]
    pt, ph, _ = (1, patch, patch) if isinstance(patch, int) else patch
    config = {
        "num_attention_heads": params["num_attention_heads"],
        "attention_head_dim": params["hidden_size"] // params["num_attention_heads"],
        "in_channels": params["in_channels"],
        "out_channels": params["out_channels"],
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "time_embed_dim": params["time_embed_dim"],
        "text_embed_dim": modules["patch_embed_config"]["text_hidden_size"],
        "num_layers": params["num_layers"],
        "dropout": 0.0,
        "attention_bias": True,
        "sample_width": params["latent_width"],
        "sample_height": params["latent_height"],
        "sample_frames": params["num_frames"],
        "patch_size": ph,
        "patch_size_t": None if pt == 1 else pt,
        "temporal_compression_ratio": params["time_compressed_rate"],
        "max_text_seq_length": positions["text_length"],
        "activation_fn": "gelu-approximate",
        "timestep_activation_fn": "silu",
        "norm_elementwise_affine": params.get("elementwise_affine", True),
        "norm_eps": 1e-5,
        "spatial_interpolation_scale": positions.get("height_interpolation", 1.875 if rotary else 1.0),
        "temporal_interpolation_scale": positions.get("time_interpolation", 1.0),
        "use_rotary_positional_embeddings": rotary,
        "use_learned_positional_embeddings": bool(positions.get("learnable_pos_embed", False)),
    }
    if params.get("ofs_embed_dim") is not None:
        config["ofs_embed_dim"] = params["ofs_embed_dim"]
    return config

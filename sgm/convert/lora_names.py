"""The files of other trainers, name by name: what each entry is, and of which linear of diffusers' transformer.

Two ways to write a module: with dots, behind one of several prefixes (PEFT, diffusers, finetrainers, CogKit), and with
underscores behind `lora_unet_` and its like (kohya, VideoX-Fun). ComfyUI's own network has shorter names for the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from sgm.convert.dit_keys import HF_MODULES, TransformerKeyError
from sgm.convert.lazy import some_of

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

    Args:
        source: the file, for messages.
    Raises:
        TransformerKeyError: entries that are no LoRA of this transformer, said by kind; a matrix without its other; or
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
        raise TransformerKeyError(f"{source}: {_said(unknown, len(state))}")
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
        raise TransformerKeyError(
            f"{source}: {module} lacks {' and '.join(missing)} (A is down, B is up); each A needs its B. The file is "
            "incomplete."
        )
    down, up, magnitude = entries["down"], entries["up"], entries.get("magnitude")
    if down.ndim not in (2, 4) or up.ndim != down.ndim or down.shape[0] != up.shape[1]:
        raise TransformerKeyError(
            f"{source}: {module} has matrices {list(down.shape)} and {list(up.shape)}; they do not belong together: "
            f"their ranks are [{down.shape[0] if down.ndim else 0}, {up.shape[1] if up.ndim > 1 else 0}]."
        )
    rows = up.shape[0]
    if magnitude is not None and tuple(magnitude.shape) not in ((rows,), (rows, 1), (1, rows, 1, 1)):
        raise TransformerKeyError(
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

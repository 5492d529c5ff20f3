"""Names of the 3D VAE's tensors in SAT's layout and in diffusers' `AutoencoderKLCogVideoX`, both ways.

The tensors themselves are equal in both, value by value; only the names and the numbering of the decoder's levels
differ (SAT counts them from the finest, diffusers in the order in which they run).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from sgm.convert.lazy import some_of
from sgm.errors import SgmError
from sgm.modules.autoencoding.strides import STRIDES

Value = TypeVar("Value")


class KeyMapError(SgmError):
    """Names that belong to no 3D VAE of the expected layout. The message lists them."""


# Prefixes in SAT's layout and in diffusers'. Placeholders are numbers: {n} and {m} are the same in both; {level} is a
# level of the decoder, counted from the other end in diffusers; {middle} counts from 1 in SAT (`block_1`), else from 0.
RULES: tuple[tuple[str, str], ...] = (
    ("encoder.conv_in.", "encoder.conv_in."),
    ("encoder.down.{n}.block.{m}.", "encoder.down_blocks.{n}.resnets.{m}."),
    ("encoder.down.{n}.downsample.", "encoder.down_blocks.{n}.downsamplers.0."),
    ("encoder.mid.block_{middle}.", "encoder.mid_block.resnets.{middle}."),
    ("encoder.norm_out.", "encoder.norm_out."),
    ("encoder.conv_out.", "encoder.conv_out."),
    ("decoder.conv_in.", "decoder.conv_in."),
    ("decoder.mid.block_{middle}.", "decoder.mid_block.resnets.{middle}."),
    ("decoder.up.{level}.block.{m}.", "decoder.up_blocks.{level}.resnets.{m}."),
    ("decoder.up.{level}.upsample.", "decoder.up_blocks.{level}.upsamplers.0."),
    ("decoder.norm_out.", "decoder.norm_out."),
    ("decoder.conv_out.", "decoder.conv_out."),
)

# A part behind the prefix that goes by two names; the others keep theirs.
SHORTCUT = ("nin_shortcut.", "conv_shortcut.")


def sat_to_hf(state: Mapping[str, Value]) -> dict[str, Value]:
    """SAT names -> diffusers names, values as they are (tensors, shapes, or None for names alone).

    Raises:
        KeyMapError: names of another layout; lists them.
    """
    return _rename(state, to_hf=True)


def hf_to_sat(state: Mapping[str, Value]) -> dict[str, Value]:
    """Diffusers names -> SAT names; the inverse of `sat_to_hf`."""
    return _rename(state, to_hf=False)


def hf_config(params: Mapping[str, Any], scale_factor: float) -> dict[str, Any]:
    """The `config.json` fields of `AutoencoderKLCogVideoX` for the `params` of SAT's encoder in a YAML file."""
    widths = [params["ch"] * factor for factor in params["ch_mult"]]
    return {
        "in_channels": params["in_channels"],
        "out_channels": params["out_ch"],
        "down_block_types": ["CogVideoXDownBlock3D"] * len(widths),
        "up_block_types": ["CogVideoXUpBlock3D"] * len(widths),
        "block_out_channels": widths,
        "latent_channels": params["z_channels"],
        "layers_per_block": params["num_res_blocks"],
        "act_fn": "silu",
        "norm_eps": 1e-6,
        "norm_num_groups": 32,
        "temporal_compression_ratio": params.get("temporal_compress_times", STRIDES.time),
        "scaling_factor": scale_factor,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }


def refuse_foreign(config: Mapping[str, Any]) -> None:
    """Refuse the `config.json` of a VAE that SAT's layout cannot express.

    Raises:
        KeyMapError: naming what is foreign.
    """
    widths = list(config["block_out_channels"])
    foreign = [name for name in ("use_quant_conv", "use_post_quant_conv") if config.get(name)]
    if foreign or any(width % widths[0] for width in widths):
        raise KeyMapError(
            f"this diffusers VAE has no counterpart in SAT's layout: {foreign or f'block_out_channels {widths}'}. "
            "Only autoencoders of the CogVideoX releases can be converted."
        )


def _rename(state: Mapping[str, Value], to_hf: bool) -> dict[str, Value]:
    levels = _decoder_levels(state)
    renamed = {name: _new_name(name, levels, to_hf) for name in state}
    unknown = sorted(name for name, new in renamed.items() if new is None)
    if unknown:
        layout = "SAT" if to_hf else "diffusers"
        raise KeyMapError(
            f"{len(unknown)} of {len(state)} names are not those of a {layout} CogVideoX VAE: {some_of(unknown)}. "
            "Check the direction of the conversion, and leave out what is not of the autoencoder (`loss.*`)."
        )
    return {new: state[name] for name, new in renamed.items() if new is not None}


def _new_name(name: str, levels: int, to_hf: bool) -> str | None:
    old_part, new_part = SHORTCUT if to_hf else SHORTCUT[::-1]
    for sat, hf in RULES:
        source, target = (sat, hf) if to_hf else (hf, sat)
        found = re.match(re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\d+)", re.escape(source)), name)
        if found:
            numbers = {key: _renumber(key, int(n), levels, to_hf) for key, n in found.groupdict().items()}
            return target.format(**numbers) + name[found.end() :].replace(old_part, new_part)
    return None


def _renumber(key: str, number: int, levels: int, to_hf: bool) -> int:
    if key == "level":
        return levels - 1 - number
    if key == "middle":
        return number - 1 if to_hf else number + 1
    return number


def _decoder_levels(names: Iterable[str]) -> int:
    """One more than the highest level number among the decoder's names; 0 without any."""
    numbers = [re.match(r"decoder\.up(?:_blocks)?\.(\d+)\.", name) for name in names]
    return max((int(found.group(1)) + 1 for found in numbers if found), default=0)

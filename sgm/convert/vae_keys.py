"""The 3D VAE's tensors in SAT's layout and in diffusers' `AutoencoderKLCogVideoX`: names, both ways, and sizes.

The tensors themselves are equal in both, value by value; only the names and the numbering of the decoder's levels
differ (SAT counts them from the finest, diffusers in the order in which they run).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from sgm.convert.lazy import ConvertError, Deferred, demand_shapes
from sgm.modules.autoencoding.coders import ContextParallelDecoder3D, ContextParallelEncoder3D
from sgm.modules.autoencoding.strides import STRIDES
from sgm.weights.assign import some_of

Value = TypeVar("Value")


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
        ConvertError: names of another layout; lists them.
    """
    return _rename(state, to_hf=True)


def hf_to_sat(state: Mapping[str, Value]) -> dict[str, Value]:
    """Diffusers names -> SAT names; the inverse of `sat_to_hf`."""
    return _rename(state, to_hf=False)


def hf_config(params: Mapping[str, Any], scale_factor: float) -> dict[str, Any]:
    """The `config.json` fields of `AutoencoderKLCogVideoX` for the `params` of SAT's encoder in a YAML file."""
    widths = encoder_widths(params)
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
        ConvertError: naming what is foreign.
    """
    widths = list(config["block_out_channels"])
    foreign = [name for name in ("use_quant_conv", "use_post_quant_conv") if config.get(name)]
    if foreign or any(width % widths[0] for width in widths):
        raise ConvertError(
            f"this diffusers VAE has no counterpart in SAT's layout: {foreign or f'block_out_channels {widths}'}. "
            "Only autoencoders of the CogVideoX releases can be converted."
        )


def _rename(state: Mapping[str, Value], to_hf: bool) -> dict[str, Value]:
    numbers = [int(found[1]) for name in state if (found := re.match(r"decoder\.up(?:_blocks)?\.(\d+)\.", name))]
    levels = max(numbers, default=-1) + 1
    renamed = {name: _new_name(name, levels, to_hf) for name in state}
    unknown = sorted(name for name, new in renamed.items() if new is None)
    if unknown:
        layout = "SAT" if to_hf else "diffusers"
        raise ConvertError(
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


Shapes = dict[str, tuple[int, ...]]
_ENDS = ("encoder.conv_in.conv.weight", "decoder.conv_in.conv.weight", "decoder.conv_out.conv.weight")
_BLOCK = re.compile(r"encoder\.down\.(\d+)\.block\.(\d+)\.conv1\.conv\.weight$")
_LEVEL_CONV = re.compile(r"\.(\d+)\.block\.\d+\.conv[12]\.conv\.weight$")


class UnequalWidthsError(ConvertError):
    """A VAE whose encoder and decoder differ in width, which diffusers' class cannot hold."""


def params_of(state: Mapping[str, Tensor | Deferred], source: str) -> dict[str, Any]:
    """The `params` of SAT's encoder and decoder (as in a YAML file) for these tensors.

    Raises:
        ConvertError: no CogVideoX VAE.
    """
    blocks = {(int(m[1]), int(m[2])): name for name in state if (m := _BLOCK.match(name))}
    missing = [name for name in _ENDS if name not in state]
    if missing or not blocks:
        raise ConvertError(f"{source} holds no CogVideoX autoencoder: {', '.join(missing) or 'its blocks'} missing.")
    pixels_in, latents_in, pixels_out = (state[name].shape for name in _ENDS)
    levels = max(level for level, _ in blocks) + 1
    try:
        widths = [state[blocks[level, 0]].shape[0] for level in range(levels)]
    except KeyError as error:
        raise ConvertError(f"{source}: the encoder's level {error} has no block 0; it is incomplete.") from None
    return {
        "double_z": True,
        "z_channels": latents_in[1],
        "resolution": 256,
        "in_channels": pixels_in[1],
        "out_ch": pixels_out[0],
        "ch": pixels_in[0],
        "ch_mult": [width // pixels_in[0] for width in widths],
        "attn_resolutions": [],
        "num_res_blocks": max(block for _, block in blocks) + 1,
        "dropout": 0.0,
    }


def decoder_widths(state: Mapping[str, Tensor | Deferred], params: Mapping[str, Any]) -> list[int]:
    """Channels of the decoder's levels, the finest first; those of `params` (the encoder's) unless both sides are sure.

    All convolutions of a level must say the same: one misshapen tensor is a fault of the file, not another width.
    """
    widths = encoder_widths(params)
    encoder, decoder = (_agreed(state, side, len(widths)) for side in ("encoder.down", "decoder.up"))
    return decoder if decoder and encoder == widths else widths


def _agreed(state: Mapping[str, Tensor | Deferred], side: str, levels: int) -> list[int] | None:
    found: dict[int, set[int]] = defaultdict(set)
    for name, value in state.items():
        if name.startswith(side) and (match := _LEVEL_CONV.search(name)):
            found[int(match[1])].add(value.shape[0])
    whole = found.keys() == set(range(levels)) and all(len(rows) == 1 for rows in found.values())
    return [min(found[level]) for level in range(levels)] if whole else None


def encoder_widths(params: Mapping[str, Any]) -> list[int]:
    """Channels of the encoder's levels, the finest first."""
    return [params["ch"] * factor for factor in params["ch_mult"]]


def sat_shapes(params: Mapping[str, Any], decoder: Sequence[int] | None = None) -> Shapes:
    """Every tensor of a VAE with these `params` and its shape; `decoder`: widths of its levels, if not the same.

    Raises:
        ConvertError: there is no such VAE.
    """
    widths = decoder or encoder_widths(params)
    try:
        with torch.device("meta"):
            coders = {
                "encoder": ContextParallelEncoder3D(**params),
                "decoder": ContextParallelDecoder3D(**{**params, "ch": 1, "ch_mult": widths}),
            }
    except ValueError as error:
        raise ConvertError(f"these are not the tensors of a CogVideoX autoencoder: {error}") from error
    return {
        f"{side}.{name}": tuple(t.shape) for side, coder in coders.items() for name, t in coder.state_dict().items()
    }


def check(state: Mapping[str, Tensor | Deferred], params: Mapping[str, Any], source: str) -> None:
    """Demand every tensor in its shape, and no other.

    Raises:
        UnequalWidthsError: encoder and decoder differ.
        ConvertError: lists what is missing, unknown, or misshapen.
    """
    encoder, decoder = encoder_widths(params), decoder_widths(state, params)
    if encoder != decoder:
        raise UnequalWidthsError(
            f"{source}: the levels of its encoder are {encoder} channels wide, those of its decoder {decoder}; "
            "diffusers' AutoencoderKLCogVideoX has one list (block_out_channels) for both and cannot hold it."
        )
    demand_shapes(state, sat_shapes(params), source, "a whole CogVideoX autoencoder")

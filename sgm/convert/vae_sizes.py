"""Sizes of the 3D VAE read from its tensors (SAT's names), and the tensors that such a VAE must have."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sgm.convert.lazy import ConvertError, Deferred, demand_shapes
from sgm.modules.autoencoding.coders import ContextParallelDecoder3D, ContextParallelEncoder3D

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

"""Sizes of the 3D VAE read from its tensors (SAT's names), and the tensors that such a VAE must have."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sgm.convert.lazy import ConvertError, Deferred, demand_shapes

Shapes = dict[str, tuple[int, ...]]
_CONV_IN, _LATENT_IN, _CONV_OUT = "encoder.conv_in.conv.weight", "decoder.conv_in.conv.weight", "decoder.conv_out.conv"
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
    missing = [name for name in (_CONV_IN, _LATENT_IN, f"{_CONV_OUT}.weight") if name not in state]
    if missing or not blocks:
        raise ConvertError(f"{source} holds no CogVideoX autoencoder: {', '.join(missing) or 'its blocks'} missing.")
    ch = state[_CONV_IN].shape[0]
    levels = max(level for level, _ in blocks) + 1
    try:
        widths = [state[blocks[level, 0]].shape[0] for level in range(levels)]
    except KeyError as error:
        raise ConvertError(f"{source}: the encoder's level {error} has no block 0; it is incomplete.") from None
    return {
        "double_z": True,
        "z_channels": state[_LATENT_IN].shape[1],
        "resolution": 256,
        "in_channels": state[_CONV_IN].shape[1],
        "out_ch": state[f"{_CONV_OUT}.weight"].shape[0],
        "ch": ch,
        "ch_mult": [width // ch for width in widths],
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
    """Every tensor of a VAE with these `params` and its shape; `decoder`: widths of its levels, if not the same."""
    z = params["z_channels"]
    widths = encoder_widths(params)
    last, blocks = widths[-1], params["num_res_blocks"]
    shapes = _conv("encoder.conv_in.conv", widths[0], params["in_channels"])
    before = widths[0]
    for level, width in enumerate(widths):
        for k in range(blocks):
            shapes |= _residual(f"encoder.down.{level}.block.{k}", before, width)
            before = width
        if level < len(widths) - 1:
            shapes |= _tensor(f"encoder.down.{level}.downsample.conv", (width, width, 3, 3))
    shapes |= _tensor("encoder.norm_out", (last,)) | _conv("encoder.conv_out.conv", 2 * z, last)
    for k in (1, 2):
        shapes |= _residual(f"encoder.mid.block_{k}", last, last)
    widths = list(decoder or widths)
    before = widths[-1]
    shapes |= _conv("decoder.conv_in.conv", before, z)
    for k in (1, 2):
        shapes |= _residual(f"decoder.mid.block_{k}", before, before, z)
    for level in reversed(range(len(widths))):
        for k in range(blocks + 1):
            shapes |= _residual(f"decoder.up.{level}.block.{k}", before, widths[level], z)
            before = widths[level]
        if level > 0:
            shapes |= _tensor(f"decoder.up.{level}.upsample.conv", (before, before, 3, 3))
    return shapes | _spatial_norm("decoder.norm_out", before, z) | _conv(_CONV_OUT, params["out_ch"], before)


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


def _tensor(name: str, weight: tuple[int, ...]) -> Shapes:
    return {f"{name}.weight": weight, f"{name}.bias": weight[:1]}


def _conv(name: str, rows: int, columns: int, kernel: int = 3) -> Shapes:
    return _tensor(name, (rows, columns, kernel, kernel, kernel))


def _residual(name: str, before: int, after: int, latent: int | None = None) -> Shapes:
    """A residual block; `latent`: its norms are modulated by so many latent channels."""
    shapes = _conv(f"{name}.conv1.conv", after, before) | _conv(f"{name}.conv2.conv", after, after)
    for norm, width in (("norm1", before), ("norm2", after)):
        plain = latent is None
        shapes |= _tensor(f"{name}.{norm}", (width,)) if plain else _spatial_norm(f"{name}.{norm}", width, latent or 0)
    return shapes | (_conv(f"{name}.nin_shortcut", after, before, 1) if before != after else {})


def _spatial_norm(name: str, width: int, latent: int) -> Shapes:
    convs = _conv(f"{name}.conv_y.conv", width, latent, 1) | _conv(f"{name}.conv_b.conv", width, latent, 1)
    return _tensor(f"{name}.norm_layer", (width,)) | convs

"""Sizes of a CogVideoX transformer: read from its tensors, from a diffusers `config.json`, or from a YAML section.

They say which member of the family a file holds (sine positions: 2B; rotations: 5B; two-frame patches: 1.5; more
channels in than out: image-to-video), which tensors it must have, and what the other side's configuration is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from sgm.convert.dit_keys import NOT_IN_HF, POSITIONS, RULES, at_layer, is_sine_table
from sgm.convert.lazy import ConvertError, Deferred, some_of
from sgm.convert.sine_table import read_sine_table
from sgm.modules.autoencoding.strides import STRIDES
from sgm.weights.assign import compare_keys

_PATCH = "mixins.patch_embed.proj.weight"
_LAYER = re.compile(r"^transformer\.layers\.(\d+)\.")
_SAT_MODULE = "dit_video_concat"
_5B_WIDTH = 3072
PUBLISHED = {(1920, 30, False, 1): "CogVideoX-2B", (3072, 42, True, 1): "CogVideoX-5B",
             (3072, 42, True, 2): "CogVideoX1.5-5B"}  # fmt: skip  # by width, layers, rotation, frames of a patch
PUBLISHED_TEXT_WIDTH = 4096
# Sizes -> their names in diffusers' config.json, and what an absent field means there.
_HF_FIELDS: dict[str, tuple[str, Any]] = {
    "heads": ("num_attention_heads", 30),
    "layers": ("num_layers", 30),
    "time_width": ("time_embed_dim", 512),
    "text_width": ("text_embed_dim", 4096),
    "in_channels": ("in_channels", 16),
    "out_channels": ("out_channels", 16),
    "rotary": ("use_rotary_positional_embeddings", False),
    "learned_positions": ("use_learned_positional_embeddings", False),
    "frames": ("sample_frames", 49),
    "height": ("sample_height", 60),
    "width_latent": ("sample_width", 90),
    "text_length": ("max_text_seq_length", 226),
    "spacing": ("spatial_interpolation_scale", 1.875),
    "time_spacing": ("temporal_interpolation_scale", 1.0),
}
# Fields that have one value in SAT.
_HF_FIXED = {
    "attention_bias": True, "norm_elementwise_affine": True, "flip_sin_to_cos": True, "freq_shift": 0,
    "temporal_compression_ratio": STRIDES.time,
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """What both sides' configurations say of the network.

    Attributes:
        width, heads, layers, time_width, text_width: of the trunk, its attention, time embedding and text.
        in_channels, out_channels: latent channels; more in than out means image-to-video.
        patch: (frames, rows, columns) of a token.
        linear_patches: SAT embeds patches by a linear layer (its later code), not a convolution.
        rotary: q and k are rotated; otherwise a sine table is added.
        learned_positions: a trained table is added, too.
        ofs_width: width of the ofs embedding (1.5 image-to-video), None without.
        frames, height, width_latent: pixel frames of the longest clip, latent rows and columns of training.
        text_length: text tokens.
        spacing, time_spacing: divisors of positions in the picture and along time.
        assumed: what the source does not say and was taken from the published model, in words.
    """

    width: int
    heads: int
    layers: int
    time_width: int
    text_width: int
    in_channels: int
    out_channels: int
    patch: tuple[int, int, int]
    linear_patches: bool
    rotary: bool
    learned_positions: bool
    ofs_width: int | None
    frames: int
    height: int
    width_latent: int
    text_length: int
    spacing: float
    time_spacing: float = 1.0
    assumed: str = ""

    @property
    def takes_image(self) -> bool:
        return self.in_channels > self.out_channels

    @property
    def is_published(self) -> bool:
        """Whether a published model has this structure: what its tensors do not say is then known."""
        return self._structure in PUBLISHED and self.text_width == PUBLISHED_TEXT_WIDTH

    @property
    def _structure(self) -> tuple[int, int, bool, int]:
        return self.width, self.layers, self.rotary, self.patch[0]

    @property
    def name(self) -> str:
        """The published model with this structure, or a description."""
        found = PUBLISHED.get(self._structure)
        kind = "rotary" if self.rotary else "sine positions"
        found = found or f"CogVideoX transformer of width {self.width} with {self.layers} layers ({kind})"
        return found + ("-I2V" if self.takes_image else "")

    @property
    def scale_factor(self) -> float:
        """Factor on the first stage's latents that the published models were trained with."""
        return 0.7 if self.rotary else 1.15258426

    @property
    def shift_scale(self) -> float:
        """Shift of the noise schedule of the published models."""
        return 1.0 if self.rotary else 3.0

    # --- configurations -------------------------------------------------------------------------------------------

    def hf_config(self) -> dict[str, Any]:
        """Fields of `config.json` of `CogVideoXTransformer3DModel`."""
        config = {name: getattr(self, size) for size, (name, _) in _HF_FIELDS.items()} | _HF_FIXED
        config |= {"attention_head_dim": self.width // self.heads, "patch_size": self.patch[1]}
        config |= {"patch_size_t": None if self.patch[0] == 1 else self.patch[0], "dropout": 0.0, "norm_eps": 1e-5}
        config |= {"activation_fn": "gelu-approximate", "timestep_activation_fn": "silu"}
        return config if self.ofs_width is None else {**config, "ofs_embed_dim": self.ofs_width}

    def sat_params(self) -> dict[str, Any]:
        """`network_config.params` of a YAML file."""
        positions: dict[str, Any] = {"text_length": self.text_length}
        if self.rotary:
            positions |= {"hidden_size_head": self.width // self.heads, "learnable_pos_embed": self.learned_positions}
            positions |= {"hidden_size": self.width} if self.learned_positions else {}
        else:
            positions |= {"height_interpolation": self.spacing, "width_interpolation": self.spacing}
        if self.time_spacing != 1.0:
            positions["time_interpolation"] = self.time_spacing
        kind = "Rotary3DPositionEmbeddingMixin" if self.rotary else "Basic3DPositionEmbeddingMixin"
        params: dict[str, Any] = {
            "time_embed_dim": self.time_width,
            "elementwise_affine": True,
            "num_frames": self.frames,
            "time_compressed_rate": STRIDES.time,
            "latent_width": self.width_latent,
            "latent_height": self.height,
            "num_layers": self.layers,
            "patch_size": list(self.patch) if self.linear_patches else self.patch[1],
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "hidden_size": self.width,
            "num_attention_heads": self.heads,
            "transformer_args": {"vocab_size": 1, "max_sequence_length": 64, "layernorm_order": "pre",
                                 "skip_init": False, "model_parallel_size": 1, "is_decoder": False},
            "modules": {
                "pos_embed_config": {"target": f"{_SAT_MODULE}.{kind}", "params": positions},
                "patch_embed_config": {"target": f"{_SAT_MODULE}.ImagePatchEmbeddingMixin",
                                       "params": {"text_hidden_size": self.text_width}},
                "adaln_layer_config": {"target": f"{_SAT_MODULE}.AdaLNMixin", "params": {"qk_ln": True}},
                "final_layer_config": {"target": f"{_SAT_MODULE}.FinalLayerMixin"},
            },
        }  # fmt: skip
        return params if self.ofs_width is None else {**params, "ofs_embed_dim": self.ofs_width}

    # --- tensors --------------------------------------------------------------------------------------------------

    def sat_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that a SAT file must hold (without prefix) and its shape; what is computed is not listed."""
        shapes: dict[str, tuple[int, ...]] = {}
        for rule in RULES:
            if rule.sat.startswith("ofs_embed") and self.ofs_width is None:
                continue
            for layer in range(self.layers) if "{i}" in rule.sat else [0]:
                name, weight = at_layer(rule.sat, str(layer)), self._weight(rule.sat)
                shapes |= {f"{name}.weight": weight, f"{name}.bias": weight[:1]}
        if self.learned_positions:
            tokens = STRIDES.latent_frames(self.frames)
            tokens = tokens // self.patch[0] * (self.height // self.patch[1]) * (self.width_latent // self.patch[2])
            shapes[POSITIONS[0]] = (1, self.text_length + tokens, self.width)
        return shapes

    def _weight(self, module: str) -> tuple[int, ...]:
        d, e, volume = self.width, self.time_width, self.patch[0] * self.patch[1] * self.patch[2]
        conv = (d, self.in_channels, *self.patch[1:])
        ends: dict[str, tuple[int, ...]] = {
            "patch_embed.proj": (d, self.in_channels * volume) if self.linear_patches else conv,
            "patch_embed.text_proj": (d, self.text_width),
            "time_embed.0": (e, d), "time_embed.2": (e, e),
            "ofs_embed.0": (self.ofs_width or 0,) * 2, "ofs_embed.2": (self.ofs_width or 0,) * 2,
            "adaLN_modulations.{i}.1": (12 * d, e), "adaLN_modulation.1": (2 * d, e),
            "query_layernorm_list.{i}": (d // self.heads,), "key_layernorm_list.{i}": (d // self.heads,),
            "attention.query_key_value": (3 * d, d), "attention.dense": (d, d),
            "dense_h_to_4h": (4 * d, d), "dense_4h_to_h": (d, 4 * d),
            "final_layer.linear": (self.out_channels * volume, d),
        }  # fmt: skip
        return next((shape for end, shape in ends.items() if module.endswith(end)), (d,))

    def check(self, state: Mapping[str, Tensor | Deferred], source: str) -> None:
        """Demand that `state` (SAT's names) has every tensor in its shape.

        Raises:
            ConvertError: lists missing and misshapen ones.
        """
        report = compare_keys(self.sat_shapes(), state)
        found = {"missing": report.missing, "wrong shape": report.shapes}
        parts = [f"{what} ({len(names)}): {some_of(names, 5)}" for what, names in found.items() if names]
        if parts:
            raise ConvertError(
                f"{source} is not a whole {self.name}: {'; '.join(parts)}. It is incomplete, one part of several "
                "(name the folder, not one mp_rank file), or of another network than its configuration says."
            )


# --- reading ---------------------------------------------------------------------------------------------------------


def sizes_of_sat(state: Mapping[str, Deferred], latent_channels: int = 16) -> Sizes:
    """Sizes of a SAT transformer (names without prefix, adapters apart) from its tensors alone.

    The clip size, the text length and the spacing of positions are read from a position table where there is one;
    otherwise those of the published model are taken and `assumed` says so.

    Args:
        latent_channels: channels of the first stage; tells patches of two frames from those of one.
    Raises:
        ConvertError: no such transformer, or a position table that its kind does not have.
    """
    layers = {int(m.group(1)) for name in state if (m := _LAYER.match(name))}
    needed = (_PATCH, "mixins.patch_embed.text_proj.weight", "time_embed.0.weight", "mixins.final_layer.linear.weight",
              "mixins.adaln_layer.query_layernorm_list.0.weight")  # fmt: skip
    missing = [name for name in needed if name not in state]
    if missing or not layers:
        raise ConvertError(f"not a whole CogVideoX transformer: {', '.join(missing) or 'its layers'} missing.")
    patch, text, time, final, head = (state[name].shape for name in needed)
    in_channels, out_channels, size = _channels(patch, final[0], latent_channels)
    sizes = Sizes(
        width=patch[0], heads=patch[0] // head[0], layers=max(layers) + 1, time_width=time[0], text_width=text[1],
        in_channels=in_channels, out_channels=out_channels, patch=size, linear_patches=len(patch) == 2,
        rotary=True, learned_positions=False, ofs_width=state["ofs_embed.0.weight"].shape[1]
        if "ofs_embed.0.weight" in state else None, frames=49, height=60, width_latent=90, text_length=226,
        spacing=1.875,
    )  # fmt: skip
    return _with_positions(sizes, state)


def _channels(patch: tuple[int, ...], out_values: int, latent: int) -> tuple[int, int, tuple[int, int, int]]:
    """(in, out, patch) from the shapes of the patch embedding and of the last layer."""
    if len(patch) == 4:
        rows, columns = patch[2:]
        return patch[1], out_values // (rows * columns), (1, rows, columns)
    frames = out_values // (4 * latent)
    if frames not in (1, 2) or out_values != 4 * latent * frames or patch[1] % (4 * frames):
        raise ConvertError(
            f"patches of {patch[1]} values in and {out_values} out do not fit {latent} latent channels; "
            "give tools/convert_weight_sat2hf.py the network's YAML file (--config)."
        )
    return patch[1] // (4 * frames), latent, (frames, 2, 2)


def _with_positions(sizes: Sizes, state: Mapping[str, Deferred]) -> Sizes:
    """Fill in what the position table says, or the published model's values."""
    table = state[POSITIONS[0]].make() if POSITIONS[0] in state else None
    if table is not None and is_sine_table(table):
        found = read_sine_table(table[0])
        return replace(
            sizes, rotary=False, text_length=found.text_length, frames=STRIDES.pixel_frames(found.frames),
            height=found.rows * sizes.patch[1], width_latent=found.columns * sizes.patch[2],
            spacing=found.spacing, time_spacing=found.time_spacing,
        )  # fmt: skip
    marks = any(name in state for name in NOT_IN_HF) or sizes.linear_patches or sizes.takes_image
    rotary = marks or sizes.width == _5B_WIDTH
    if table is not None and not rotary:
        raise ConvertError(
            f"{POSITIONS[0]} is not the sine table of a 2B model, and nothing says that this is a 5B model. Diffusers "
            "computes the table and cannot hold another one."
        )
    if sizes.patch[0] > 1:
        sizes = replace(sizes, height=300, width_latent=300, frames=81, text_length=224)
    height, width = STRIDES.pixel_size(sizes.height, sizes.width_latent)
    clip = f"{sizes.frames} frames of {height}x{width} (height x width)"
    kind = "rotary positions" if rotary else "sine positions"
    assumed = f"{kind}, {sizes.text_length} text tokens, {clip}, as the published model (not in the file)"
    return replace(sizes, rotary=rotary, learned_positions=table is not None, assumed=assumed)


def sizes_of_hf(config: Mapping[str, Any]) -> Sizes:
    """Sizes from a `config.json` of `CogVideoXTransformer3DModel`; absent fields have diffusers' defaults.

    Raises:
        ConvertError: a network that SAT does not have.
    """
    values = {size: config.get(name, default) for size, (name, default) in _HF_FIELDS.items()}
    values["out_channels"] = values["out_channels"] or values["in_channels"]
    values |= {name: float(values[name]) for name in ("spacing", "time_spacing")}
    head, patch = config.get("attention_head_dim", 64), config.get("patch_size", 2)
    counts = {name: values[size] for size, (name, default) in _HF_FIELDS.items() if type(default) is int}
    counts |= {"attention_head_dim": head, "patch_size": patch}
    odd = [f"{name} {value!r}" for name, value in counts.items() if not _is_count(value)]
    if odd:
        raise ConvertError(f"the transformer's config.json is damaged: {', '.join(odd)}.")
    wrong = [f"{name} {config[name]!r}" for name, only in _HF_FIXED.items() if config.get(name, only) != only]
    if wrong:
        raise ConvertError(f"this diffusers transformer has no counterpart in SAT: {', '.join(wrong)}.")
    frames = config.get("patch_size_t")
    return Sizes(
        **values, width=values["heads"] * head, patch=(frames or 1, patch, patch), linear_patches=frames is not None,
        ofs_width=config.get("ofs_embed_dim"),
    )  # fmt: skip


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 20


def sizes_of_params(params: Mapping[str, Any]) -> Sizes:
    """Sizes from the `network_config.params` of a YAML file.

    Raises:
        ConvertError: different spacings along height and width, which diffusers does not have.
    """
    modules = {name: dict(node.get("params") or {}) for name, node in params["modules"].items()}
    positions = modules["pos_embed_config"]
    rotary = params["modules"]["pos_embed_config"]["target"].endswith("Rotary3DPositionEmbeddingMixin")
    spacing = [positions.get(n, params.get(n, 1.0)) for n in ("height_interpolation", "width_interpolation")]
    if not rotary and spacing[0] != spacing[1]:
        raise ConvertError(f"height_ and width_interpolation differ ({spacing}); diffusers has one value for both.")
    patch = params["patch_size"]
    return Sizes(
        width=params["hidden_size"], heads=params["num_attention_heads"], layers=params["num_layers"],
        time_width=params.get("time_embed_dim") or params["hidden_size"],
        text_width=modules["patch_embed_config"]["text_hidden_size"], in_channels=params["in_channels"],
        out_channels=params["out_channels"], patch=(1, patch, patch) if isinstance(patch, int) else tuple(patch),
        linear_patches=not isinstance(patch, int), rotary=rotary,
        learned_positions=bool(positions.get("learnable_pos_embed", False)), ofs_width=params.get("ofs_embed_dim"),
        frames=params["num_frames"], height=params["latent_height"], width_latent=params["latent_width"],
        text_length=positions["text_length"], spacing=1.875 if rotary else float(spacing[0]),
        time_spacing=float(positions.get("time_interpolation", params.get("time_interpolation", 1.0))),
    )  # fmt: skip


def hf_config(params: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` fields of `CogVideoXTransformer3DModel` for the `network_config.params` of a YAML file."""
    return sizes_of_params(params).hf_config()

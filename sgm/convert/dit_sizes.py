"""Sizes of a CogVideoX transformer: read from its tensors, from a diffusers `config.json`, or from a YAML section.

They say which member of the family a file holds (sine positions: 2B; rotations: 5B; two-frame patches: 1.5; more
channels in than out: image-to-video), which tensors it must have, and what the other side's configuration is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sgm.convert.dit_keys import NOT_IN_HF, POSITIONS, RULES, is_sine_table
from sgm.convert.lazy import ConvertError, Deferred
from sgm.modules.autoencoding.strides import STRIDES
from sgm.modules.transformer.positions import sincos_axis
from sgm.weights.assign import compare_keys, some_of
from sgm.weights.identify import LATENT_CHANNELS, PUBLISHED, Published, patch_layout

_USUAL = (1.0, 1.875)  # of the published models; half precision blurs what the table says


class SineTable(NamedTuple):
    """Text rows in front; latent frames (in patches), token rows and columns; divisors of positions."""

    text_length: int
    frames: int
    rows: int
    columns: int
    spacing: float
    time_spacing: float


def read_sine_table(table: Tensor) -> SineTable:
    """Read a table (l + t*h*w, d) in any floating-point type.

    Raises:
        ConvertError: not such a table, or one with different spacings along height and width.
    """
    width = table.shape[1]
    filled = table.any(dim=-1).nonzero()
    if not len(filled):
        raise ConvertError("the position table is all zeros, which no sine table is; the file is damaged.")
    text = int(filled[0, 0])
    grid = table[text:]
    time, column, row = grid.split((width // 4, width // 8 * 3, width // 8 * 3), dim=1)
    columns = _period(column)
    rows = _period(row[::columns])
    frames = len(grid) // (rows * columns)
    if frames * rows * columns != len(grid):
        raise ConvertError(f"the position table's {len(grid)} rows form no grid of {rows} x {columns} tokens.")
    across, down = _spacing(column[:columns]), _spacing(row[: rows * columns : columns])
    if across and down and across != down:
        raise ConvertError(f"positions are {down} apart in height, {across} in width; diffusers has one for both.")
    found = SineTable(text, frames, rows, columns, across or down or 1.0, _spacing(time[:: rows * columns]) or 1.0)
    _check(grid, found)
    return found


def _check(grid: Tensor, found: SineTable) -> None:
    """Demand the values of the formula, frame by frame, up to the rounding of the table's type."""
    width = grid.shape[1]
    column = sincos_axis(found.columns, width // 8 * 3, found.spacing).expand(found.rows, -1, -1).flatten(0, 1)
    row = sincos_axis(found.rows, width // 8 * 3, found.spacing).repeat_interleave(found.columns, dim=0)
    time = sincos_axis(found.frames, width // 4, found.time_spacing)
    allowed = 4 * torch.finfo(grid.dtype).eps + 1e-6
    for k, frame in enumerate(grid.split(found.rows * found.columns)):
        expected = torch.cat((time[k].expand(len(frame), -1), column, row), dim=1)
        if (frame.double() - expected).abs().max() > allowed:
            raise ConvertError(
                "the position table is not the sine table of its grid (it was trained or changed). Diffusers computes "
                "the table and cannot hold another one."
            )


def _period(part: Tensor) -> int:
    """Rows until the first one comes again; their number if it does not."""
    again = (part[1:] == part[0]).all(dim=-1).nonzero()
    return int(again[0, 0]) + 1 if len(again) else len(part)


def _spacing(axis: Tensor) -> float | None:
    """The divisor of positions, from the angle of frequency 1 at the last position; None for a single position."""
    if len(axis) < 2:
        return None
    sines, cosines = axis[:, 0].double(), axis[:, axis.shape[1] // 2].double()
    steps = torch.atan2(sines, cosines).diff()
    total = torch.remainder(steps, 2 * torch.pi).sum().item()  # each step is between 0 and a full turn
    found = (len(axis) - 1) / total
    return next((usual for usual in _USUAL if abs(found / usual - 1) < 0.005), round(found, 3))


_PATCH = "mixins.patch_embed.proj.weight"
_LAYER = re.compile(r"^transformer\.layers\.(\d+)\.")
_SAT_MODULE = "dit_video_concat"
_5B_WIDTH = 3072
_T5_WIDTH = 4096  # of the published models' text encoder
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
_INTERPOLATIONS = ("time_interpolation", "height_interpolation", "width_interpolation")
_HF_TEXT_LENGTH = _HF_FIELDS["text_length"][1]
# Sizes -> their names in a YAML file's `network_config.params`.
_SAT_FIELDS = {
    "time_width": "time_embed_dim", "frames": "num_frames", "width_latent": "latent_width", "height": "latent_height",
    "layers": "num_layers", "in_channels": "in_channels", "out_channels": "out_channels", "width": "hidden_size",
    "heads": "num_attention_heads",
}  # fmt: skip
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
        ofs_width: width of the ofs embedding (1.5 image-to-video), None without.
        frames, height, width_latent: pixel frames of the longest clip, latent rows and columns of training.
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
    def _structure(self) -> tuple[int, bool, bool, int, int]:
        return self.patch[0], self.rotary, self.takes_image, self.width, self.layers

    @property
    def nearest(self) -> Published:
        """The published model that shares most of this structure."""
        return max(PUBLISHED.values(), key=lambda m: [a == b for a, b in zip(m.structure, self._structure)])

    @property
    def is_published(self) -> bool:
        """Whether a published model has this structure: what its tensors do not say is then known."""
        return self.nearest.structure == self._structure and self.text_width == _T5_WIDTH

    @property
    def name(self) -> str:
        """The published model with this structure, or a description."""
        if self.nearest.structure == self._structure:
            return self.nearest.name
        kind = ("rotary" if self.rotary else "sine positions") + (", from an image" if self.takes_image else "")
        return f"CogVideoX transformer of width {self.width} with {self.layers} layers ({kind})"

    # --- configurations -------------------------------------------------------------------------------------------

    def hf_config(self) -> dict[str, Any]:
        """Fields of `config.json` of `CogVideoXTransformer3DModel`."""
        config = {name: getattr(self, size) for size, (name, _) in _HF_FIELDS.items()} | _HF_FIXED
        config |= {"attention_head_dim": self.width // self.heads, "patch_size": self.patch[1]}
        config |= {"patch_size_t": None if self.patch[0] == 1 else self.patch[0], "dropout": 0.0, "norm_eps": 1e-5}
        config |= {"activation_fn": "gelu-approximate", "timestep_activation_fn": "silu"}
        config |= {"patch_bias": False} if self.patch[0] > 1 else {}  # as published; the layer has one all the same
        return config if self.ofs_width is None else {**config, "ofs_embed_dim": self.ofs_width}

    def sat_params(self) -> dict[str, Any]:
        """What of `network_config.params` in a YAML file depends on the sizes."""
        positions: dict[str, Any] = {"text_length": self.text_length}
        if self.rotary:
            positions["hidden_size_head"] = self.width // self.heads
            positions |= {"learnable_pos_embed": True} if self.learned_positions else {}
        else:
            positions |= {"height_interpolation": self.spacing, "width_interpolation": self.spacing}
            positions |= {"time_interpolation": self.time_spacing} if self.time_spacing != 1.0 else {}
        kind = "Rotary3DPositionEmbeddingMixin" if self.rotary else "Basic3DPositionEmbeddingMixin"
        text = {"text_hidden_size": self.text_width}
        params: dict[str, Any] = {
            **{name: getattr(self, size) for size, name in _SAT_FIELDS.items()},
            "patch_size": list(self.patch) if self.linear_patches else self.patch[1],
            "modules": {
                "pos_embed_config": {"target": f"{_SAT_MODULE}.{kind}", "params": positions},
                "patch_embed_config": {"target": f"{_SAT_MODULE}.ImagePatchEmbeddingMixin", "params": text},
            },
        }
        return params if self.ofs_width is None else {**params, "ofs_embed_dim": self.ofs_width}

    # --- tensors --------------------------------------------------------------------------------------------------

    def sat_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that a SAT file must hold (without prefix) and its shape; what is computed is not listed."""
        shapes: dict[str, tuple[int, ...]] = {}
        for rule in RULES:
            if rule.sat.startswith("ofs_embed") and self.ofs_width is None:
                continue
            for layer in range(self.layers) if "{i}" in rule.sat else [0]:
                name, weight = rule.sat.replace("{i}", str(layer)), self._weight(rule.sat)
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

    def in_form_of(self, state: Mapping[str, Tensor | Deferred]) -> Sizes:
        """The same network, its patches embedded as in `state`: of 1.0 there are files of either form."""
        return replace(self, linear_patches=len(state[_PATCH].shape) == 2) if _PATCH in state else self

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


def sizes_of_sat(state: Mapping[str, Deferred]) -> Sizes:
    """Sizes of a SAT transformer (names without prefix, adapters apart) from its tensors alone.

    The clip size, the text length and the spacing of positions are read from a position table where there is one;
    otherwise those of the published model are taken and `assumed` says so.

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
    layout = patch_layout(patch, final[0])
    if layout is None:
        raise ConvertError(
            f"patches of {patch[1]} values in and {final[0]} out do not fit {LATENT_CHANNELS} latent channels; "
            "give tools/convert_weight_sat2hf.py the network's YAML file (--config)."
        )
    ofs = state["ofs_embed.0.weight"].shape[1] if "ofs_embed.0.weight" in state else None
    sizes = Sizes(
        width=patch[0], heads=patch[0] // head[0], layers=max(layers) + 1, time_width=time[0], text_width=text[1],
        in_channels=layout.in_channels, out_channels=layout.out_channels, patch=layout.size,
        linear_patches=len(patch) == 2, rotary=True, learned_positions=False, ofs_width=ofs, frames=0, height=0,
        width_latent=0, text_length=0, spacing=1.875,
    )  # fmt: skip
    return _with_positions(sizes, state)


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
    sizes = replace(sizes, rotary=marks or sizes.width == _5B_WIDTH)
    if table is not None and not sizes.rotary:
        raise ConvertError(
            f"{POSITIONS[0]} is not the sine table of a 2B model, and nothing says that this is a 5B model. Diffusers "
            "computes the table and cannot hold another one."
        )
    model = sizes.nearest
    height, width = STRIDES.pixel_size(*model.grid)
    clip = f"{model.frames} frames of {height}x{width} (height x width)"
    kind = "rotary positions" if sizes.rotary else "sine positions"
    return replace(
        sizes, frames=model.frames, height=model.grid[0], width_latent=model.grid[1], text_length=model.text_length,
        learned_positions=table is not None or (sizes.is_published and model.has_table),
        assumed=f"{kind}, {model.text_length} text tokens, {clip}, as the published model (not in the file)",
    )  # fmt: skip


def sizes_of_hf(config: Mapping[str, Any]) -> Sizes:
    """Sizes from a `config.json` of `CogVideoXTransformer3DModel`; absent fields have diffusers' defaults.

    Raises:
        ConvertError: a network that SAT does not have.
    """
    values = {size: config.get(name, default) for size, (name, default) in _HF_FIELDS.items()}
    values["out_channels"] = values["out_channels"] or values["in_channels"]
    values |= {name: float(values[name]) for name in ("spacing", "time_spacing")}
    head, patch = config.get("attention_head_dim", 64), config.get("patch_size", 2)
    frames, ofs = config.get("patch_size_t"), config.get("ofs_embed_dim")
    counts = {name: values[size] for size, (name, default) in _HF_FIELDS.items() if type(default) is int}
    counts |= {"attention_head_dim": head, "patch_size": patch}
    counts |= {name: v for name, v in (("patch_size_t", frames), ("ofs_embed_dim", ofs)) if v is not None}
    odd = [f"{name} {value!r}" for name, value in counts.items() if not (type(value) is int and 0 < value < 1 << 20)]
    if odd:
        raise ConvertError(f"the transformer's config.json is damaged: {', '.join(odd)}.")
    wrong = [f"{name} {config[name]!r}" for name, only in _HF_FIXED.items() if config.get(name, only) != only]
    if wrong:
        raise ConvertError(f"this diffusers transformer has no counterpart in SAT: {', '.join(wrong)}.")
    sizes = Sizes(
        **values, width=values["heads"] * head, patch=(frames or 1, patch, patch), linear_patches=frames is not None,
        ofs_width=ofs,
    )  # fmt: skip
    return _as_released(sizes) if sizes.patch[0] > 1 else sizes


def _as_released(sizes: Sizes) -> Sizes:
    """1.5 as SAT has it: config.json may keep diffusers' text length, or give a clip's size for the tables'."""
    model = sizes.nearest
    height, width = model.grid if sizes.is_published else (sizes.height, sizes.width_latent)
    text_length = model.text_length if sizes.text_length == _HF_TEXT_LENGTH else sizes.text_length
    released = replace(sizes, text_length=text_length, height=height, width_latent=width)
    pairs = {n: (getattr(released, n), getattr(sizes, n)) for n in ("text_length", "height", "width_latent")}
    said = [
        f"{_HF_FIELDS[n][0]} {value} (config.json: {given})" for n, (value, given) in pairs.items() if value != given
    ]
    return replace(released, assumed=f"{', '.join(said)}, as in SAT's release" if said else "")


def sizes_of_params(params: Mapping[str, Any]) -> Sizes:
    """Sizes from the `network_config.params` of a YAML file.

    Raises:
        ConvertError: different spacings along height and width, which diffusers does not have.
    """
    modules = {name: dict(node.get("params") or {}) for name, node in params["modules"].items()}
    positions = modules["pos_embed_config"]
    rotary = params["modules"]["pos_embed_config"]["target"].endswith("Rotary3DPositionEmbeddingMixin")
    time, *spacing = (float(positions.get(n, params.get(n, 1.0))) for n in _INTERPOLATIONS)
    if not rotary and spacing[0] != spacing[1]:
        raise ConvertError(f"height_ and width_interpolation differ ({spacing}); diffusers has one value for both.")
    patch = params["patch_size"]
    fields = {size: params[name] for size, name in _SAT_FIELDS.items() if name != "time_embed_dim"}
    return Sizes(
        **fields, time_width=params.get("time_embed_dim") or params["hidden_size"],
        text_width=modules["patch_embed_config"]["text_hidden_size"], ofs_width=params.get("ofs_embed_dim"),
        patch=(1, patch, patch) if isinstance(patch, int) else tuple(patch), linear_patches=not isinstance(patch, int),
        rotary=rotary, learned_positions=bool(positions.get("learnable_pos_embed", False)),
        text_length=positions["text_length"], spacing=1.875 if rotary else spacing[0],
        time_spacing=1.0 if rotary else time,
    )  # fmt: skip

"""What transformer is in a state dict? Read from names and shapes, for messages, tools and conversion."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from sgm.places import shown

LATENT_CHANNELS = 16  # of every first stage of the family
_LAYER = re.compile(r"(?:^|\.)transformer\.layers\.(\d+)\.")
_ENDS = ("mixins.patch_embed.proj.weight", "mixins.final_layer.linear.weight", "mixins.patch_embed.text_proj.weight")
# Of what is no transformer in SAT's layout: a pattern of its names, and what to say of it.
_OTHER_KINDS = {
    r"\.lora_(A|down|B|up)\.": "a LoRA of another trainer; to sample with it, name it in args.lora",
    r"^transformer_blocks\.": "a diffusers transformer; convert it with tools/convert_weight_hf2sat.py",
    r"^(encoder\.down|decoder\.up)\.": "a 3D VAE, not a transformer",
    r"^(encoder\.block\.|shared\.weight)": "a T5 text encoder, not a transformer",
    "matrix_A": "a LoRA adapter without base weights",
}


@dataclass(frozen=True)
class Published:
    """A published model: what its tensors show, and what none of them says.

    Attributes:
        patch_frames: latent frames of a token.
        takes_image: image to video, with twice as many latent channels in as out.
        rotary: q and k are rotated; otherwise a sine table is added.
        frames, size: pixel frames and (height, width) that it was trained on.
        grid: latent rows and columns that positions are made for.
    """

    name: str
    width: int
    layers: int
    patch_frames: int
    takes_image: bool
    rotary: bool
    text_length: int
    frames: int
    size: tuple[int, int]
    grid: tuple[int, int]
    scale_factor: float
    shift_scale: float

    @property
    def structure(self) -> tuple[int, bool, bool, int, int]:
        """What distinguishes it, the most telling first."""
        return self.patch_frames, self.rotary, self.takes_image, self.width, self.layers

    @property
    def config(self) -> str:
        """What its shipped configurations are called, before `_infer.yaml` and `_sft.yaml`."""
        return self.name.lower().replace("-", "_")

    @property
    def repository(self) -> str:
        """Its name on the hub, in diffusers' layout."""
        return f"zai-org/{self.name.replace('X-2B', 'X-2b').replace('X-5B', 'X-5b')}"

    @property
    def has_table(self) -> bool:
        """Whether a trained position table is added beside the rotations."""
        return self.takes_image and self.patch_frames == 1


_2B = Published("CogVideoX-2B", 1920, 30, 1, False, False, 226, 49, (480, 720), (60, 90), 1.15258426, 3.0)
_5B = Published("CogVideoX-5B", 3072, 42, 1, False, True, 226, 49, (480, 720), (60, 90), 0.7, 1.0)
_1_5 = Published("CogVideoX1.5-5B", 3072, 42, 2, False, True, 224, 81, (768, 1360), (300, 300), 0.7, 1.0)
_FROM_IMAGE = (replace(model, name=f"{model.name}-I2V", takes_image=True) for model in (_5B, _1_5))
PUBLISHED = {(m.width, m.layers, m.patch_frames, m.takes_image): m for m in (_2B, _5B, _1_5, *_FROM_IMAGE)}


class PatchLayout(NamedTuple):
    """Latent channels in and out, and (frames, rows, columns) of a token."""

    in_channels: int
    out_channels: int
    size: tuple[int, int, int]


def patch_layout(patch: Sequence[int], out_values: int | None) -> PatchLayout | None:
    """Read from the shape of the patch embedding's weight and the rows of the final layer (None: not in the file).

    A linear embedding of 128 values is 5B image-to-video's or 1.5's: the final layer tells how many frames a token has.
    None where the two do not fit each other.
    """
    if len(patch) == 4:
        rows, columns = patch[2:]
        out = LATENT_CHANNELS if out_values is None else out_values // (rows * columns)
        return PatchLayout(patch[1], out, (1, rows, columns))
    frames = (out_values or 0) // (4 * LATENT_CHANNELS)
    if frames not in (1, 2) or out_values != 4 * LATENT_CHANNELS * frames or patch[1] % (4 * frames):
        return None
    return PatchLayout(patch[1] // (4 * frames), LATENT_CHANNELS, (frames, 2, 2))


@dataclass(frozen=True)
class TransformerShape:
    """Sizes of a CogVideoX transformer.

    Attributes:
        patch: channels and size of its tokens; None where the file does not say.
    """

    hidden_size: int
    num_layers: int
    patch: PatchLayout | None

    @property
    def published(self) -> Published | None:
        """The published model with these sizes."""
        if self.patch is None:
            return None
        takes_image = self.patch.in_channels > self.patch.out_channels
        return PUBLISHED.get((self.hidden_size, self.num_layers, self.patch.size[0], takes_image))

    @property
    def family(self) -> str:
        """Name of the published model with these sizes, or the sizes."""
        found = self.published
        return found.name if found else f"a transformer of width {self.hidden_size} with {self.num_layers} layers"


def transformer_shape(state: Mapping[str, Any]) -> TransformerShape | None:
    """Sizes read from a network state dict (keys without `model.diffusion_model.`); None if it is no such thing."""
    patch, final, text = (state[name].shape if name in state else None for name in _ENDS)
    layers = {int(m.group(1)) for name in state if (m := _LAYER.search(name))}
    if patch is None or text is None or not layers:
        return None
    layout = patch_layout(patch, None if final is None else final[0])
    return TransformerShape(patch[0], max(layers) + 1, layout)


def what_is(state: Mapping[str, Any]) -> str:
    """A few words on a state dict for error messages."""
    shape = transformer_shape(state)
    if shape is not None:
        return f"{shape.family} (width {shape.hidden_size}, {shape.num_layers} layers)"
    for pattern, kind in _OTHER_KINDS.items():
        if any(re.search(pattern, name) for name in state):
            return kind
    return f"unknown weights ({len(state)} tensors" + (f", first {next(iter(state))!r})" if state else ")")


def fitting_configs(state: Mapping[str, Any], folder: Path) -> list[str]:
    """YAML files in `folder` whose network is that of `state`; in which form it embeds patches does not count."""
    from sgm.config import ConfigError, merge_yaml

    shape, fitting = transformer_shape(state), []
    for path in sorted(folder.glob("*.yaml")):
        with suppress(ConfigError):
            if shape and shape_of_model(merge_yaml([path]).get("model")) == shape:
                fitting.append(shown(path))
    return fitting


def shape_of_model(model: Any) -> TransformerShape | None:
    """Sizes that a `model:` section asks for; None where it describes no such network."""
    try:
        network: dict[str, Any] = model["network_config"]["params"]
        patch = network["patch_size"]
        size = (1, patch, patch) if isinstance(patch, int) else (patch[0], patch[1], patch[2])
        layout = PatchLayout(network["in_channels"], network["out_channels"], size)
        return TransformerShape(network["hidden_size"], network["num_layers"], layout)
    except (KeyError, TypeError, IndexError):
        return None

"""What transformer is in a state dict? Read from names and shapes, for messages and tools."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

_LAYER = re.compile(r"(?:^|\.)transformer\.layers\.(\d+)\.")


@dataclass(frozen=True)
class TransformerShape:
    """Sizes of a CogVideoX transformer: width, layers, latent channels at the input, and which patch embedding."""

    hidden_size: int
    num_layers: int
    in_values: int  # values of one patch (linear embedding) or latent channels (convolution)
    linear_patches: bool

    @property
    def family(self) -> str:
        """Name of the published model with these sizes, or the sizes."""
        kind = (self.hidden_size, self.num_layers, self.linear_patches, self.in_values)
        return _FAMILIES.get(kind, f"a transformer of width {self.hidden_size} with {self.num_layers} layers")


_FAMILIES = {
    (1920, 30, False, 16): "CogVideoX-2B",
    (3072, 42, False, 16): "CogVideoX-5B",
    (3072, 42, True, 64): "CogVideoX-5B",
    (3072, 42, False, 32): "CogVideoX-5B-I2V",
    (3072, 42, True, 128): "CogVideoX1.5-5B",
    (3072, 42, True, 256): "CogVideoX1.5-5B-I2V",
}


def transformer_shape(state: Mapping[str, Tensor]) -> TransformerShape | None:
    """Sizes read from a network state dict (keys without `model.diffusion_model.`); None if it is no such thing."""
    patch = state.get("mixins.patch_embed.proj.weight")
    text = state.get("mixins.patch_embed.text_proj.weight")
    layers = {int(m.group(1)) for name in state if (m := _LAYER.search(name))}
    if patch is None or text is None or not layers:
        return None
    return TransformerShape(patch.shape[0], max(layers) + 1, patch.shape[1], patch.ndim == 2)


def what_is(state: Mapping[str, Tensor]) -> str:
    """A few words on a state dict for error messages."""
    shape = transformer_shape(state)
    if shape is not None:
        return f"{shape.family} (width {shape.hidden_size}, {shape.num_layers} layers)"
    if any(".lora_A." in name for name in state):
        return "a LoRA in diffusers' layout; convert it with tools/convert_weight_hf2sat.py --lora_only"
    if any(name.startswith("transformer_blocks.") for name in state):
        return "a diffusers transformer; convert it with tools/convert_weight_hf2sat.py"
    if any(name.startswith(("encoder.down.", "decoder.up.")) for name in state):
        return "a 3D VAE, not a transformer"
    if any(name.startswith(("encoder.block.", "shared.weight")) for name in state):
        return "a T5 text encoder, not a transformer"
    if any("matrix_A" in name for name in state):
        return "a LoRA adapter without base weights"
    return f"unknown weights ({len(state)} tensors" + (f", first {next(iter(state))!r})" if state else ")")


def fitting_configs(state: Mapping[str, Tensor], folder: Path) -> list[str]:
    """YAML files in `folder` whose network has the width, depth and patch embedding of `state`."""
    shape = transformer_shape(state)
    if shape is None:
        return []
    sizes = (shape.hidden_size, shape.num_layers, shape.linear_patches)
    return [str(path) for path in sorted(folder.glob("*.yaml")) if _network_sizes(path) == sizes]


def _network_sizes(path: Path) -> tuple[int, int, bool] | None:
    from sgm.config import ConfigError, merge_yaml

    try:
        network: dict[str, Any] = merge_yaml([path])["model"]["network_config"]["params"]
        return network["hidden_size"], network["num_layers"], not isinstance(network["patch_size"], int)
    except (ConfigError, KeyError, TypeError):  # not a model configuration: it cannot fit
        return None

"""A diffusers pipeline folder: its components with their weights read lazily, and the small JSON files around them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sgm.convert.lazy import ConvertError, Deferred, deferred
from sgm.modules.encoders.t5_files import TOKENIZER_EXTRAS, VOCABULARIES
from sgm.weights.checksums import read_header
from sgm.weights.files import WeightsError, WeightsNotFoundError, read_checkpoint, shards_of, tensors_of

DIFFUSION_STEM, ENCODER_STEM = "diffusion_pytorch_model", "model"
TOKENIZER_FILES = (*VOCABULARIES, *TOKENIZER_EXTRAS)
_VERSION = "0.30.3"  # first stable form of these classes' configurations
SCHEDULERS = {"dpm": "CogVideoXDPMScheduler", "ddim": "CogVideoXDDIMScheduler"}


def read_component(folder: Path, stem: str) -> dict[str, Deferred]:
    """Every tensor of a component, lazily, from one file or the shards that an index names.

    Raises:
        WeightsNotFoundError: no weights, or shards that are not there (all listed).
        WeightsError: damaged, or an index that does not fit the shards.
    """
    names = [f"{stem}{end}" for end in (".safetensors.index.json", ".safetensors", ".bin.index.json", ".bin")]
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise WeightsNotFoundError(f"no weights in {folder}: none of {', '.join(names)} is there.")
    if found.suffix != ".json":
        return {name: deferred(value) for name, value in tensors_of(read_checkpoint(found)).items()}
    placed, shards = shards_of(found)
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise WeightsNotFoundError(f"{folder} lacks {len(missing)} of {len(shards)} shards: {', '.join(missing)}.")
    state: dict[str, Tensor] = {}
    for shard in shards:
        state |= tensors_of(read_checkpoint(shard))
    odd = sorted(state.keys() ^ placed.keys())
    if odd:
        raise WeightsError(f"{found} and its shards disagree on {len(odd)} tensors: {', '.join(odd[:5])}.")
    return {name: deferred(value) for name, value in state.items()}


def stated(folder: Path, stem: str) -> dict[str, str]:
    """The header's entries of a component's weights; empty where they are in another format."""
    files = sorted(folder.glob(f"{stem}*.safetensors"))
    return read_header(files[0]).metadata if files else {}


# --- what a pipeline folder says ------------------------------------------------------------------------------------


def model_index(takes_image: bool, scheduler: str) -> dict[str, Any]:
    """`model_index.json`."""
    return {
        "_class_name": "CogVideoXImageToVideoPipeline" if takes_image else "CogVideoXPipeline",
        "_diffusers_version": _VERSION,
        "scheduler": ["diffusers", SCHEDULERS[scheduler]],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLCogVideoX"],
    }


def scheduler_config(shift_scale: float, scheduler: str) -> dict[str, Any]:
    """`scheduler_config.json` of the noise schedule that CogVideoX was trained with.

    With trailing spacing diffusers' timesteps are SAT's.
    """
    return {
        "_class_name": SCHEDULERS[scheduler],
        "_diffusers_version": _VERSION,
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "trained_betas": None,
        "clip_sample": False,
        "clip_sample_range": 1.0,
        "sample_max_value": 1.0,
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": True,
        "snr_shift_scale": shift_scale,
    }


def with_class(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """A component's `config.json`."""
    return {"_class_name": name, "_diffusers_version": _VERSION, **config}


def expect_class(folder: Path, config: Mapping[str, Any], name: str) -> None:
    """Refuse a component of another class. Raises ConvertError: naming both."""
    found = config.get("_class_name")
    if found is not None and found != name:
        raise ConvertError(f"{folder / 'config.json'} is of a {found}, not of a {name}; it is another kind of model.")

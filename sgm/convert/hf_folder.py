"""A diffusers pipeline folder: its components, each on its way from one layout into the other with its weights read
lazily, and the small JSON files around them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgm.convert.lazy import ConvertError, Deferred, deferred, demand_shapes, summed_bytes, types_of
from sgm.convert.output import write_shards
from sgm.files import readable, write_json
from sgm.modules.diffusionmodules.few_steps import FewSteps
from sgm.modules.encoders.t5 import DECODER, SHARED, TIED, T5Config, T5Encoder, read_config
from sgm.modules.encoders.t5_files import TOKENIZER_EXTRAS, VOCABULARIES, T5Files
from sgm.weights.checksums import read_bytes, read_header, read_json
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


FEW_STEPS = "few_steps"  # entry of a header, and of what a checkpoint says of its adapter


@dataclass
class Component:
    """A model: its tensors, each to be made when it is written, its configuration, and lines for the report.

    Attributes:
        tokenizer: the files that go along with a text encoder, by name.
        few_steps: of a transformer that was distilled: how it is sampled, as JSON.
    """

    name: str
    plan: dict[str, Deferred]
    config: dict[str, Any]
    lines: list[str] = field(default_factory=list)
    tokenizer: Mapping[str, Path] = field(default_factory=dict)
    few_steps: str = ""

    def described(self) -> list[str]:
        kinds, size = ", ".join(types_of(self.plan.values())), readable(summed_bytes(self.plan))
        return [f"{self.name}: {len(self.plan)} tensors, {kinds}, {size}", *(f"  {line}" for line in self.lines)]

    def write(self, folder: Path, limit: int) -> None:
        """Write weights, in shards of at most `limit` bytes, and `config.json` into a new folder."""
        folder.mkdir()
        stem = ENCODER_STEM if self.name == "text_encoder" else DIFFUSION_STEM
        write_shards(folder, stem, self.plan, limit, {FEW_STEPS: self.few_steps} if self.few_steps else {})
        write_json(folder / "config.json", self.config, indent=2)

    def write_tokenizer(self, folder: Path) -> None:
        """Copy the tokenizer's files; the settings file is made where there is none."""
        folder.mkdir(exist_ok=True)
        for name, path in self.tokenizer.items():
            (folder / name).write_bytes(read_bytes(path))
        if "tokenizer_config.json" not in self.tokenizer:
            special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "extra_ids": 100}
            write_json(folder / "tokenizer_config.json", {"tokenizer_class": "T5Tokenizer", **special}, indent=2)


def one_few_steps(stated: Iterable[Any], source: str) -> str:
    """How weights and what is folded into them are sampled, as JSON; "" where none of them was distilled.

    Args:
        stated: what each says, as JSON or as its content.
    Raises:
        ConvertError: two were distilled in different ways.
        FewStepsError: one cannot be read.
    """
    found = list({FewSteps.parse(said) for said in stated if said})
    if len(found) > 1:
        raise ConvertError(
            f"{source} and what is to be folded into it were distilled in different ways (for "
            f"{' and '.join(str(few.steps) for few in found)} steps); fold in one of them."
        )
    return json.dumps(found[0].as_dict()) if found else ""


def text_encoder(files: T5Files, state: Mapping[str, Deferred], source: str, width: int | None) -> Component:
    """The T5 whose configuration and tokenizer lie in `files`, of the tensors `state`.

    Args:
        width: of the text embeddings that the transformer takes, if there is one.
    Raises:
        ConvertError: tensors that are not its encoder's, or another width.
        WeightsError: an unusable configuration.
    """
    config = read_config(files.config)
    plan, left_out = _encoder_plan(state, config, source)
    if width is not None and config.d_model != width:
        raise ConvertError(
            f"{source} gives text embeddings of width {config.d_model}, the transformer takes {width}: they are of "
            "different models (the published ones use T5 v1.1 XXL, 4096)."
        )
    lines = [f"from {source}"] + ([f"left out: {left_out} decoder tensors"] if left_out else [])
    tokenizer = {n: files.tokenizer / n for n in TOKENIZER_FILES if (files.tokenizer / n).is_file()}
    return Component("text_encoder", plan, read_json(files.config), lines, tokenizer)


def _encoder_plan(state: Mapping[str, Deferred], config: T5Config, source: str) -> tuple[dict[str, Deferred], int]:
    """(the encoder's tensors, the embedding under one of its two names; number of decoder tensors left out)."""
    kept = {name: value for name, value in state.items() if not name.startswith(DECODER)}
    left_out = len(state) - len(kept)
    tied = kept.pop(TIED, None)
    if tied is not None and not torch.equal(kept.setdefault(SHARED, tied).make(), tied.make()):
        raise ConvertError(f"{source}: {SHARED} and {TIED} differ, but T5 has one embedding; the file is damaged.")
    with torch.device("meta"):
        wanted = {name: tuple(p.shape) for name, p in T5Encoder(config).named_parameters()}
    demand_shapes(kept, wanted, source, "the T5 encoder of its config.json")
    return {name: kept[name] for name in wanted}, left_out

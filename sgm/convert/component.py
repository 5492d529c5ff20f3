"""One model of a pipeline on its way from one layout into the other, and the text encoder, which is alike in both."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sgm.convert.hf_folder import DIFFUSION_STEM, ENCODER_STEM, TOKENIZER_FILES
from sgm.convert.lazy import ConvertError, Deferred, demand_shapes, summed_bytes, types_of
from sgm.convert.output import write_shards
from sgm.files import readable, write_json
from sgm.modules.diffusionmodules.few_steps import FewSteps
from sgm.modules.encoders.t5 import DECODER, SHARED, TIED, T5Encoder
from sgm.modules.encoders.t5_config import T5Config, read_config
from sgm.modules.encoders.t5_files import T5Files
from sgm.weights.checksums import read_bytes, read_json

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
        source: the base's file, for messages.
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
        source: where these come from, for messages.
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

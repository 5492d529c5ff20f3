"""What is asked of a run: the request of each sample, the record kept of it, and which samples are still to be made."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor

import sgm
from sgm.config import RunConfig
from sgm.inference.fit import Scaled
from sgm.inference.options import SampleArgs
from sgm.inference.pipeline import Pipeline
from sgm.inference.progress import StageTimes
from sgm.inference.prompts import Prompt
from sgm.inference.writer import SampleFiles, latents_digest, read_record
from sgm.modules.diffusionmodules.shortcuts import CallCount
from sgm.secrets import hidden_in

# Versions that can change numbers.
PACKAGES = ("torch", "transformers", "SwissArmyTransformer", "safetensors")
# What samples were made with whose records do not say it: there was nothing else then.
BEFORE: Mapping[str, Any] = {
    "decoder": "full", "small_decoder_weights": None, "image_sha256": None, "video_sha256": None, "strength": None,
    "extend": None, "windows": None,
}  # fmt: skip


@dataclass(frozen=True)
class Guidance:
    """The guider's class, and its scale where it has one."""

    guider: str
    scale: float | None


@dataclass(frozen=True)
class Request:
    """What a user asks of a sample; two samples of one request are the same but for their number.

    The fields are the first entries of the sample's JSON. Of `num_steps` a run from a clip takes the share `strength`.
    `size` is (height, width) in pixels, `approximate` the switches of `accelerate:` that change results,
    `windows` the latent frames from which and up to which each is sampled, None where all are sampled at once;
    `small_decoder_weights` the small decoder's fingerprint (None: the full one decodes), `image_sha256` that of the
    picture's file, `video_sha256` that of the clip's that was noised, or is followed by `extend` new frames.
    `scale_image_latents` and `noised_image_all_concat` say how the network reads a picture, None of models for text
    alone.
    """

    prompt: str
    refine: bool
    negative_prompt: str
    seed: int
    seed_mode: str
    sampler: str
    num_steps: int
    guidance: Guidance
    latent_frames: int
    size: tuple[int, int]
    fps: int
    dtype: str
    approximate: dict[str, Any]
    decoder: str
    small_decoder_weights: str | None
    load: str | None
    lora: list[str]
    image_sha256: str | None
    video_sha256: str | None
    strength: float | None
    extend: int | None
    windows: list[list[int]] | None
    scale_image_latents: bool | None
    noised_image_all_concat: bool | None

    def differences(self, record: Mapping[str, Any]) -> list[str]:
        """In what the request that a sample's JSON holds differs from this one.

        What the record lacks does not count, except where versions that did not write it had one value: `BEFORE`.
        """
        record = {**BEFORE, **record}
        wanted = hidden_in(asdict(self))  # as it comes back from the file
        pairs = {name: (record[name], value) for name, value in wanted.items() if record.get(name, value) != value}
        texts = {name: [shorten(str(value), 60, placeholder=" ...") for value in pair] for name, pair in pairs.items()}
        return [f"{n} {old}, now {new}" if old != new else f"another {n}" for n, (old, new) in texts.items()]


@dataclass(frozen=True)
class UsedWeights:
    """Fingerprints of what a sample was made with, and the transformer's and adapters' files."""

    transformer: str | None
    transformer_file: str | None
    adapters: list[str]
    text_encoder: str | None


@dataclass(frozen=True)
class Result:
    """What a request led to: the second part of the sample's JSON.

    `steps_taken` are fewer than the request's where a run starts from a clip. `products` is the type of the network's
    matrix products; `first_new_frame` the number of the first one behind an extended clip; `network_passes` are counted
    where steps took shortcuts.
    """

    refined_prompt: str | None
    image: str | None
    video: str | None
    first_new_frame: int | None
    prompt_index: int
    sample_index: int
    steps_taken: int
    products: str
    network_passes: CallCount | None
    latents_sha256: str
    weights: UsedWeights
    config_files: list[str]
    config_hash: str


@dataclass(frozen=True)
class Measurements:
    """What decoding and measuring add: the last part of the sample's JSON."""

    first_stage_weights: str | None
    seconds: dict[str, float]
    peak_memory_bytes: dict[str, int]
    device: str
    placement: str
    versions: dict[str, str]

    @classmethod
    def of(cls, pipeline: Pipeline, *stages: StageTimes) -> Measurements:
        """Of a run whose stages took so long; a later one of the same name counts."""
        device = pipeline.device
        return cls(
            first_stage_weights=pipeline.facts.first_stage,
            seconds={name: round(value, 3) for times in stages for name, value in times.seconds.items()},
            peak_memory_bytes={name: value for times in stages for name, value in times.peak_bytes.items()},
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
            placement=pipeline.placement.kind,
            versions=versions(),
        )


@dataclass(frozen=True)
class Wanted:
    """A prompt, numbers of its samples that have to be made, and what earlier runs say of the others.

    Attributes:
        changed: of each sample that is there and made anew, in what its request was another.
        caption: a language model's, which a sample of this prompt was made with, so that the others get the same.
    """

    prompt: Prompt
    missing: list[int]
    changed: list[list[str]]
    caption: str


class Requests:
    """The samples that a run is asked for: `args.batch_size` of each prompt, below `args.output_dir`."""

    def __init__(self, config: RunConfig[SampleArgs], pipeline: Pipeline):
        self.config = config
        self.args = config.args
        self.pipeline = pipeline

    def of(self, prompt: Prompt) -> Request:
        """What is asked of each sample of a prompt."""
        picture, request = prompt.picture, replace(self._of_every_prompt, prompt=prompt.text)
        if picture is None:
            return request
        return replace(request, size=self.pipeline.visual.size(picture), image_sha256=picture.sha256)

    @cached_property
    def _of_every_prompt(self) -> Request:
        args, engine, source = self.args, self.pipeline.engine, self.pipeline.visual.source
        sampler, of_pictures, length = engine.sampler, self.pipeline.visual.reads_picture, self.pipeline.visual.length
        guider = sampler.guider
        return Request(
            prompt="",
            refine=args.refine,
            negative_prompt=args.negative_prompt,
            seed=args.seed,
            seed_mode=args.seed_mode,
            sampler=type(sampler).__name__,
            num_steps=args.num_steps or sampler.num_steps or self.pipeline.num_steps,
            guidance=Guidance(type(guider).__name__, guider.scale if isinstance(guider, Scaled) else None),
            latent_frames=length.total,
            size=self.pipeline.visual.size(),
            fps=args.sampling_fps,
            dtype=args.dtype,
            approximate=self.config.accelerate.approximate(),
            decoder=args.decoder,
            small_decoder_weights=self.pipeline.small_decoder_weights,
            load=_absolute(args.load) if args.load else args.load,
            lora=[_absolute(text) for text in args.lora],
            image_sha256=None,
            video_sha256=source.sha256 if source else None,
            strength=args.share_taken,
            extend=args.extend,
            windows=[[w.start, w.stop] for w in length.windows] if len(length.windows) > 1 else None,
            scale_image_latents=engine.scales_image_latents if of_pictures else None,
            noised_image_all_concat=engine.noised_image_all_concat if of_pictures else None,
        )

    def record(self, prompt: Prompt, sample: int, latents: Tensor) -> dict[str, Any]:
        """The facts of a sample that was just made, to which decoding adds its `Measurements`."""
        facts = self.pipeline.facts
        network, source = facts.network, self.pipeline.visual.source
        result = Result(
            refined_prompt=prompt.refined or None,
            image=prompt.picture.place if prompt.picture else None,
            video=source.place if source else None,
            first_new_frame=source.frames if source and self.args.extend is not None else None,
            prompt_index=prompt.index,
            sample_index=sample,
            steps_taken=self.pipeline.num_steps,
            products="bf16" if self.pipeline.engine.kernels.cpu_bf16 else self.args.dtype,
            network_passes=self.pipeline.calls,
            latents_sha256=latents_digest(latents),
            weights=UsedWeights(
                transformer=network.fingerprint if network else None,
                transformer_file=network.source if network else None,
                adapters=network.adapters if network else [],
                text_encoder=facts.text_encoder,
            ),
            config_files=[str(file) for file in self.config.files],
            config_hash=self.config.hash(("model", "args")),
        )
        return hidden_in(asdict(self.of(prompt)) | asdict(result))

    def files(self, prompt: Prompt, sample: int) -> SampleFiles:
        return SampleFiles(Path(self.args.output_dir) / prompt.folder / str(sample))

    def wanted(self, prompt: Prompt) -> Wanted:
        """What has to be made of a prompt: under skip_done what is not there, and whole, from the same request."""
        samples = range(self.args.batch_size)
        if not self.args.skip_done:
            return Wanted(prompt, list(samples), [], "")
        missing, changed, caption = [], [], ""
        for k in samples:
            files = self.files(prompt, k)
            record = read_record(files.record)
            if not files.done(record, self.args.only_save_latents):
                missing.append(k)
            elif differences := self.of(prompt).differences(record):
                missing.append(k)
                changed.append(differences)
            if record.get("prompt") == prompt.text:
                caption = caption or str(record.get("refined_prompt") or "")
        return Wanted(prompt, missing, changed, caption)


def versions() -> dict[str, str]:
    """Versions of this package, of Python, and of `PACKAGES`."""
    known = {name: version(name) for name in PACKAGES}
    return {"cogvideox-sat": sgm.__version__, "python": platform.python_version(), **known}


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))

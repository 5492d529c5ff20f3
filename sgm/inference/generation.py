"""From prompts to latents and frames on a pipeline, stage by stage: for the commands and the Python interface."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sgm.config import RunConfig
from sgm.distributed import own_rank
from sgm.inference.noise import SampleId
from sgm.inference.options import SampleArgs
from sgm.inference.pipeline import Part, Pipeline
from sgm.inference.progress import Progress, StageTimes
from sgm.inference.prompts import Prompt
from sgm.inference.refine import Endpoint, refine_prompt
from sgm.inference.requests import Measurements, Requests, Wanted
from sgm.inference.stages import EncodedPrompt
from sgm.inference.vocabulary import words_note

SHOWN_CHARACTERS = 200  # of the end of a prompt that is not read


@dataclass(frozen=True)
class Sampled:
    """One sample of a prompt: its number, its latents (t, c, h, w), scaled, and how long its batch took."""

    prompt: Prompt
    number: int
    latents: Tensor
    times: StageTimes


class Generation:
    """What a configuration asks of its pipeline, which loads each part when it is needed; `progress` hears of it.

    Attributes:
        requests: what is asked of each sample, and what is recorded of it.
    """

    def __init__(self, config: RunConfig[SampleArgs], pipeline: Pipeline, progress: Progress):
        self.config, self.args = config, config.args
        self.pipeline = pipeline
        self.progress = progress
        self.requests = Requests(config, pipeline)
        self.load_times = StageTimes()
        self._warned: set[str] = set()

    def fitting(self, prompts: Sequence[Prompt]) -> Sequence[Prompt]:
        """The prompts, whose pictures fit the model; sizes that it was not trained at, and words that it does not know,
        are told of, each once.

        Raises:
            SamplingError: a picture asks for a size that the model has no positions for.
        """
        lines = [f"warning: {line}" for line in self.pipeline.visual.remarks(prompts)]
        note = words_note(self.args, self.config.files, prompts) or ""
        for line in lines:
            if line not in self._warned:
                self.progress.line(line)
        if note and note not in self._warned:
            self.progress.note(note)
        self._warned |= {*lines, note}
        return prompts

    # --- loading --------------------------------------------------------------------------------------------------

    def load_what_samples_need(self) -> None:
        """A bad file shows before an hour of sampling."""
        visual = self.pipeline.visual
        self.load("network")
        if visual.pictures.wanted or visual.source is not None:
            self.load("first_stage")
        if not self.args.only_save_latents:
            self.load(self.pipeline.decoder_part)
        if visual.source is not None:
            with self.progress.stage("encode video", self.load_times, visual.source.path.name):
                visual.encode_source()
        if self.args.negative_prompt:
            self._warn_of_cut("the negative prompt", self.pipeline.cut_off(self.args.negative_prompt))

    def load(self, part: Part) -> None:
        """Unless it is there."""
        if not self.pipeline.is_loaded(part):
            with self.progress.stage(f"load {part.split('_')[0]}", self.load_times):
                self.pipeline.load(part)
            while self.pipeline.facts.notes:
                self.progress.line(f"note: {self.pipeline.facts.notes.pop(0)}")

    # --- prompts --------------------------------------------------------------------------------------------------

    def refined(self, todo: Sequence[Wanted]) -> list[Wanted]:
        """The prompts with their captions, if they are to be refined; a caption of an earlier run is kept.

        Raises:
            RefineError: naming the first prompt that cannot be refined.
        """
        if not self.args.refine:
            return list(todo)
        endpoint = Endpoint.from_environment(self.args.refine_model)
        refined = []
        for wanted in todo:
            prompt, caption = wanted.prompt, wanted.caption
            if not caption:
                with self.progress.stage("refine", self.load_times, f"prompt {prompt.index}"):
                    caption = refine_prompt(prompt, endpoint)
            self.progress.line(f"prompt {prompt.index}: {caption}")
            refined.append(replace(wanted, prompt=replace(prompt, refined=caption)))
        return refined

    def encode(self, prompts: Sequence[Prompt]) -> list[EncodedPrompt]:
        """Their conditioning; what the text encoder does not read is warned of."""
        self.load("conditioner")
        with self.progress.stage("encode", self.load_times, f"{len(prompts)} prompts"):
            encoded = self.pipeline.encode([p.wording for p in prompts], self.args.negative_prompt)
        for prompt, conditioning in zip(prompts, encoded):
            self._warn_of_cut(f"prompt {prompt.index}", conditioning.cut)
        return encoded

    def _warn_of_cut(self, what: str, cut: str) -> None:
        if cut and self.pipeline.team.is_first:
            long = len(cut) > SHOWN_CHARACTERS
            shown = f"{cut[:SHOWN_CHARACTERS]}... ({len(cut)} characters)" if long else cut
            self.progress.warn(f"{what} is longer than the text encoder reads; left out: {shown!r}")

    # --- samples --------------------------------------------------------------------------------------------------

    def samples(self, wanted: Wanted, conditioning: EncodedPrompt) -> Iterator[Sampled]:
        """Make what is missing of a prompt, in the batches that the whole has: alone a sample has other last bits."""
        samples = list(range(self.args.batch_size))
        size = self.pipeline.max_batch
        if wanted.prompt.picture is not None:
            self.load("first_stage")
            with self.progress.stage("encode image", self.load_times, wanted.prompt.picture.path.name):
                moments = self.pipeline.visual.encode_picture(wanted.prompt.picture)
            conditioning = replace(conditioning, image=moments, drawn=self.pipeline.visual.draw_picture(moments))
        while samples:
            batch, times = samples[:size], StageTimes()
            missing = [k for k in batch if k in wanted.missing]
            if missing or self.args.seed_mode == "upstream":
                latents = self._sample_if_it_fits(wanted.prompt, conditioning, batch, times)
                if latents is None:
                    size = len(batch) // 2
                    self.progress.line(f"not enough memory for {len(batch)} samples at once; trying {size}")
                    continue
                for number in missing:
                    yield Sampled(wanted.prompt, number, latents[batch.index(number)], times)
            samples = samples[len(batch) :]

    def _sample_if_it_fits(
        self, prompt: Prompt, conditioning: EncodedPrompt, batch: Sequence[int], times: StageTimes
    ) -> Tensor | None:
        """Latents of a batch, or None where memory is short and a smaller batch may fit."""
        ids = [SampleId(self.args.seed, prompt.index, k) for k in batch]
        try:
            with self.progress.stage("sample", times, f"{self._steps}, batch {len(batch)}"):
                return self.pipeline.sample(conditioning, ids, self.progress.steps)
        except torch.OutOfMemoryError:
            if len(batch) == 1 or self.pipeline.team.size > 1:  # the others wait in this very batch
                raise
        return None

    @property
    def _steps(self) -> str:
        windows = len(self.pipeline.visual.length.windows)
        return f"{self.pipeline.num_steps} steps" + (f" in each of {windows} windows" if windows > 1 else "")

    def decode(self, latents: Tensor, times: StageTimes) -> np.ndarray:
        """Frames, uint8 (f, h, w, 3), of one sample."""
        self.load(self.pipeline.decoder_part)
        with self.progress.stage("decode", times):
            return self.pipeline.visual.behind_source(self.pipeline.decode(latents))

    def measured(self, facts: Mapping[str, Any], times: StageTimes, sizes: Mapping[str, int]) -> dict[str, Any]:
        """A sample's `facts` with what was measured, and the `sizes` of its files in bytes."""
        measured = Measurements.of(self.pipeline, self.load_times, times)
        return {**facts, **asdict(measured), "file_bytes": {**facts.get("file_bytes", {}), **sizes}}


def out_of_memory_advice(args: SampleArgs) -> str:
    """What to change when a GPU is too small."""
    smaller = {"all": "--placement stages (one part on the GPU at a time) or lean", "stages": "--placement lean"}
    advice = [smaller[args.placement]] if args.placement in smaller else []
    advice += ["--max-batch 1"] if min(args.batch_size, args.max_batch) > 1 else []
    tiles = not args.vae_tiling and args.decoder == "full"
    advice += ["--vae-tiling, if decoding failed (approximate)"] if tiles else []
    fewer = max(1, args.sampling_num_frames - 4)
    if args.window_frames is not None and args.window_frames > 4:
        advice += [f"shorter windows (--window-frames {args.window_frames - 4})"]
    advice += [f"fewer latent frames (--num-frames {fewer})"] if args.sampling_num_frames > 1 else []
    advice += ["a smaller --image-size"]
    rank, ranks = own_rank()
    gpu = f"the GPU of rank {rank}" if ranks > 1 else "the GPU"
    return f"{gpu} ran out of memory with --placement {args.placement}. Try " + "; ".join(advice) + "."

"""Goes through the prompts of a run: encode once, then per prompt sample, decode and write."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgm.config import ConfigError, RunConfig
from sgm.data.images import Picture
from sgm.data.video_out import write_contact_sheet, write_video
from sgm.errors import SgmError
from sgm.files import SaveError, advising, unfinished_names, write_json
from sgm.inference.noise import SampleId
from sgm.inference.options import SampleArgs
from sgm.inference.pipeline import EncodedPrompt, Part, Pipeline
from sgm.inference.progress import Bar, Progress, StageTimes
from sgm.inference.prompts import Prompt, ask, gather
from sgm.inference.refine import Endpoint, refine_prompt
from sgm.inference.requests import Measurements, Requests, Wanted
from sgm.inference.writer import SampleFiles, find_latents, read_latents, write_latents

ANOTHER_FOLDER = "Choose another --output-dir; --skip-done goes on with a run that was stopped."
SHOWN_CHARACTERS = 200  # of the end of a prompt that is not read
ENCODED_AHEAD = 128  # prompts that are held encoded (1.9 MB each of 2B in half precision)


@dataclass
class Runner:
    """One process's work: `config`, its `pipeline`, which knows its place among the processes, and where to report.

    Processes of a team go through the same prompts; the first of them writes.
    """

    config: RunConfig[SampleArgs]
    pipeline: Pipeline
    progress: Progress

    def __post_init__(self) -> None:
        self.args = self.config.args
        self.team = self.pipeline.team
        self.requests = Requests(self.config, self.pipeline)
        self.load_times = StageTimes()
        self.warned: set[str] = set()

    def run(self) -> None:
        """Do what the configuration asks."""
        saved = find_latents(Path(self.args.decode_latents)) if self.args.decode_latents else []
        place = os.path.commonpath([str(file.parent) for file in saved] or [self.args.output_dir])
        with advising(ANOTHER_FOLDER), unfinished_names(Path(place)) as self.unfinished:
            self._run(saved)

    def _run(self, saved: Sequence[Path]) -> None:
        if self.args.seed_mode == "upstream":
            torch.manual_seed(self.args.seed + self.team.data_rank)
        if saved:
            self._decode_saved(saved[self.team.data_rank :: self.team.layout.data])
        elif self.args.input_type == "cli" and not self.args.prompts:
            self._converse()
        else:
            sources = (self.args.prompts, self.args.input_file, self.config.files)
            place = self.team.data_rank, self.team.layout.data
            prompts, note = gather(*sources, self.pipeline.pictures, *place)
            if note:
                self.progress.line(note)
            self._run_list(self._fitting(prompts))

    def _fitting(self, prompts: Sequence[Prompt]) -> Sequence[Prompt]:
        """The prompts, whose pictures fit the model; sizes that it was not trained at are warned of, each once."""
        for line in self.pipeline.remarks(prompts):
            if line not in self.warned:
                self.progress.line(f"warning: {line}")
            self.warned.add(line)
        return prompts

    # --- prompts --------------------------------------------------------------------------------------------------

    def _converse(self) -> None:
        """Ask for prompts; one that fails does not end the conversation."""
        if self.team.layout.world > 1:
            raise ConfigError("input_type cli asks a person and runs in one process; use txt for several processes.")
        self._load_what_samples_need()
        for prompt in ask():
            try:
                asked = self._fitting(self.pipeline.pictures.attach([prompt]))[0]
                wanted = self._refined([self.requests.wanted(asked)])[0]
                self._run_prompt(wanted, self._encode([wanted.prompt])[0])
            except torch.OutOfMemoryError:
                print(f"error: {out_of_memory_advice(self.args)}", file=sys.stderr)
            except ValueError as error:
                if not isinstance(error, SgmError):
                    traceback.print_exc()  # a bug, to be seen whole
                print(f"error: {error}", file=sys.stderr)

    def _run_list(self, prompts: Sequence[Prompt]) -> None:
        every = self.team.from_first(lambda: [self.requests.wanted(prompt) for prompt in prompts])
        for wanted in every:
            for differences in wanted.changed:
                said = "; ".join(differences)
                self.progress.line(f"prompt {wanted.prompt.index}: made anew, it was made otherwise: {said}")
        todo = [wanted for wanted in every if wanted.missing]
        if len(todo) < len(every):
            self.progress.line(f"{len(every) - len(todo)} of {len(every)} prompts are done already")
        if not todo:
            return
        if self.args.seed_mode == "upstream":  # what comes before a sample draws from the same stream
            todo = every[: every.index(todo[-1]) + 1]
        todo = self.team.from_first(lambda: self._refined(todo))
        self._load_what_samples_need()  # a bad file shows before an hour of sampling
        with self.progress.bar(len(todo), "prompts", "prompt") as bar:
            for start in range(0, len(todo), ENCODED_AHEAD):
                self._run_some(todo[start : start + ENCODED_AHEAD], bar)

    def _run_some(self, todo: Sequence[Wanted], bar: Bar) -> None:
        """Encode some prompts, then make their samples."""
        encoded = self._encode([wanted.prompt for wanted in todo])
        if self.args.placement != "all":
            self.pipeline.drop_text_encoder()
        for wanted, conditioning in zip(todo, encoded):
            self._run_prompt(wanted, conditioning)
            bar.update(1)

    def _refined(self, todo: Sequence[Wanted]) -> list[Wanted]:
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

    def _encode(self, prompts: Sequence[Prompt]) -> list[EncodedPrompt]:
        self._load("conditioner")
        with self.progress.stage("encode", self.load_times, f"{len(prompts)} prompts"):
            encoded = self.pipeline.encode([p.wording for p in prompts], self.args.negative_prompt)
        for prompt, conditioning in zip(prompts, encoded):
            self._warn_of_cut(f"prompt {prompt.index}", conditioning.cut)
        return encoded

    def _warn_of_cut(self, what: str, cut: str) -> None:
        if cut and self.team.is_first:
            long = len(cut) > SHOWN_CHARACTERS
            shown = f"{cut[:SHOWN_CHARACTERS]}... ({len(cut)} characters)" if long else cut
            self.progress.warn(f"{what} is longer than the text encoder reads; left out: {shown!r}")

    # --- one prompt -----------------------------------------------------------------------------------------------

    def _run_prompt(self, wanted: Wanted, conditioning: EncodedPrompt) -> None:
        """Make what is missing, in the batches that the whole prompt has: alone a sample has other last bits."""
        samples = list(range(self.args.batch_size))
        size = self.pipeline.max_batch
        if wanted.prompt.picture is not None:
            moments = self._encode_picture(wanted.prompt.picture)
            conditioning = replace(conditioning, image=moments, drawn=self.pipeline.draw_picture(moments))
        while samples:
            batch, times = samples[:size], StageTimes()
            missing = [k for k in batch if k in wanted.missing]
            if missing or self.args.seed_mode == "upstream":
                latents = self._sample_if_it_fits(wanted.prompt, conditioning, batch, times)
                if latents is None:
                    size = len(batch) // 2
                    self.progress.line(f"not enough memory for {len(batch)} samples at once; trying {size}")
                    continue
                for sample in missing:
                    self._finish(wanted.prompt, sample, latents[batch.index(sample)], times)
            samples = samples[len(batch) :]

    def _encode_picture(self, picture: Picture) -> Tensor:
        """Its moments."""
        self._load("first_stage")
        with self.progress.stage("encode image", self.load_times, picture.path.name):
            return self.pipeline.encode_picture(picture)

    def _sample_if_it_fits(
        self, prompt: Prompt, conditioning: EncodedPrompt, batch: Sequence[int], times: StageTimes
    ) -> Tensor | None:
        """Latents of a batch, or None where memory is short and a smaller batch may fit."""
        ids = [SampleId(self.args.seed, prompt.index, k) for k in batch]
        try:
            with self.progress.stage("sample", times, f"{self.pipeline.num_steps} steps, batch {len(batch)}"):
                return self.pipeline.sample(conditioning, ids, self.progress.steps)
        except torch.OutOfMemoryError:
            if len(batch) == 1 or self.team.size > 1:  # the others wait in this very batch
                raise
        return None

    def _finish(self, prompt: Prompt, sample: int, latents: Tensor, times: StageTimes) -> None:
        """Decode and write one sample; its record comes last and marks it as done."""
        if not self.team.is_first:
            if not self.args.only_save_latents:
                self._decode_along(latents)
            return
        files = self.requests.files(prompt, sample)
        record = self.requests.record(prompt, sample, latents)
        with files.replaced_together(self.unfinished) as new:
            if self.args.only_save_latents:
                write_latents(new.latents, latents, record)
            else:
                self._write_frames_or_latents(new, files.latents, latents, times, record)
            self._write_record(new, record, times)
        self.progress.line(f"  {files.latents if self.args.only_save_latents else files.video}")

    def _decode_along(self, latents: Tensor) -> None:
        """This process's part of what the first one of its team writes."""
        if self.pipeline.shares_decoding:
            self._load("first_stage")
            self.pipeline.decode(latents)

    def _write_frames_or_latents(
        self, new: SampleFiles, place: Path, latents: Tensor, times: StageTimes, record: Mapping[str, Any]
    ) -> None:
        """Where there is no video, keep at `place` what sampling has made, if it can be kept."""
        try:
            self._write_frames(new, latents, times)
        except (SgmError, torch.OutOfMemoryError):
            new.discard()  # room for the latents
            with suppress(SaveError):
                write_latents(place, latents, record)
                self.progress.warn(f"there is no video, but its latents: {place} (--decode-latents reads them)")
            raise

    def _write_frames(self, files: SampleFiles, latents: Tensor, times: StageTimes) -> None:
        self._load("first_stage")
        with self.progress.stage("decode", times):
            frames = self.pipeline.decode(latents)
        with self.progress.stage("write", times):
            write_video(files.video, frames, self.args.sampling_fps)
            write_contact_sheet(files.sheet, frames)

    def _write_record(self, files: SampleFiles, facts: Mapping[str, Any], times: StageTimes) -> None:
        measured = Measurements.of(self.pipeline, self.load_times, times)
        sizes = facts.get("file_bytes", {}) | files.sizes()
        write_json(files.record, {**facts, **asdict(measured), "file_bytes": sizes})

    def _decode_saved(self, saved: Sequence[Path]) -> None:
        for file in saved:
            latents, facts = read_latents(file)
            if not self.team.is_first:
                self._decode_along(latents)
                continue
            times, files = StageTimes(), SampleFiles(file.parent)
            by = {"decoder": self.args.decoder, "small_decoder_weights": self.pipeline.small_decoder_weights}
            facts |= {**by, "decoded_from": file.name, "file_bytes": {file.name: file.stat().st_size}}
            with files.replaced_together(self.unfinished) as new:
                self._write_frames(new, latents, times)
                self._write_record(new, facts, times)
            self.progress.line(f"  {files.video}")

    # --- loading and measuring ------------------------------------------------------------------------------------

    def _load_what_samples_need(self) -> None:
        self._load("network")
        if not self.args.only_save_latents or self.pipeline.encodes:
            self._load("first_stage")
        if self.pipeline.source is not None:
            with self.progress.stage("encode video", self.load_times, self.pipeline.source.path.name):
                self.pipeline.encode_source()
        if self.args.negative_prompt:
            self._warn_of_cut("the negative prompt", self.pipeline.cut_off(self.args.negative_prompt))

    def _load(self, part: Part) -> None:
        if not self.pipeline.is_loaded(part):
            with self.progress.stage(f"load {part.split('_')[0]}", self.load_times):
                self.pipeline.load(part)
            while self.pipeline.facts.notes:
                self.progress.line(f"note: {self.pipeline.facts.notes.pop(0)}")


def out_of_memory_advice(args: SampleArgs) -> str:
    """What to change when a GPU is too small."""
    smaller = {"all": "--placement stages (one part on the GPU at a time) or lean", "stages": "--placement lean"}
    advice = [smaller[args.placement]] if args.placement in smaller else []
    advice += ["--max-batch 1"] if min(args.batch_size, args.max_batch) > 1 else []
    tiles = not args.vae_tiling and args.decoder == "full"
    advice += ["--vae-tiling, if decoding failed (approximate)"] if tiles else []
    fewer = max(1, args.sampling_num_frames - 4)
    advice += [f"fewer latent frames (--num-frames {fewer})"] if args.sampling_num_frames > 1 else []
    advice += ["a smaller --image-size"]
    return f"the GPU ran out of memory with --placement {args.placement}. Try " + "; ".join(advice) + "."

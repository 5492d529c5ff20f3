"""Goes through the prompts of a run: encode once, then per prompt sample, decode and write."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgm.config import ConfigError
from sgm.data.video_out import write_contact_sheet, write_video
from sgm.errors import SgmError
from sgm.files import SaveError, advising, saving, unfinished_names, write_json
from sgm.inference.generation import Generation, Sampled, out_of_memory_advice
from sgm.inference.progress import Bar, StageTimes
from sgm.inference.prompts import Prompt, ask, gather
from sgm.inference.requests import Wanted
from sgm.inference.stages import EncodedPrompt
from sgm.inference.writer import SampleFiles, find_latents, read_latents, write_latents

ANOTHER_FOLDER = "Choose another --output-dir; --skip-done goes on with a run that was stopped."
ENCODED_AHEAD = 128  # prompts that are held encoded (1.9 MB each of 2B in half precision)


class Runner:
    """One process's work on a configuration, stage by stage of its `generation`, and the files that come of it.

    Processes of a team go through the same prompts; the first of them writes.
    """

    def __init__(self, generation: Generation) -> None:
        self.generation, self.requests = generation, generation.requests
        self.config, self.args = generation.config, generation.args
        self.pipeline, self.progress = generation.pipeline, generation.progress
        self.team = self.pipeline.team

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
            prompts, note = gather(*sources, self.pipeline.visual.pictures, *place)
            if note:
                self.progress.line(note)
            self._run_list(self.generation.fitting(prompts))

    # --- prompts --------------------------------------------------------------------------------------------------

    def _converse(self) -> None:
        """Ask for prompts; one that fails does not end the conversation."""
        if self.team.layout.world > 1:
            raise ConfigError("input_type cli asks a person and runs in one process; use txt for several processes.")
        self.generation.load_what_samples_need()
        for prompt in ask():
            try:
                asked = self.generation.fitting(self.pipeline.visual.pictures.attach([prompt]))[0]
                wanted = self.generation.refined([self.requests.wanted(asked)])[0]
                self._run_prompt(wanted, self.generation.encode([wanted.prompt])[0])
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
        todo = self.team.from_first(lambda: self.generation.refined(todo))
        self.generation.load_what_samples_need()
        with self.progress.bar(len(todo), "prompts", "prompt") as bar:
            for start in range(0, len(todo), ENCODED_AHEAD):
                self._run_some(todo[start : start + ENCODED_AHEAD], bar)

    def _run_some(self, todo: Sequence[Wanted], bar: Bar) -> None:
        """Encode some prompts, then make their samples."""
        encoded = self.generation.encode([wanted.prompt for wanted in todo])
        if self.args.placement != "all":
            self.pipeline.drop_text_encoder()
        for wanted, conditioning in zip(todo, encoded):
            self._run_prompt(wanted, conditioning)
            bar.update(1)

    def _run_prompt(self, wanted: Wanted, conditioning: EncodedPrompt) -> None:
        for sampled in self.generation.samples(wanted, conditioning):
            files = self.requests.files(sampled.prompt, sampled.number)
            with self.team.together():  # before any of them waits for another one's chunks
                if self.team.is_first:
                    files.make_folder()
            with self.team.together():
                self._finish(sampled, files)

    # --- files ----------------------------------------------------------------------------------------------------

    def _finish(self, sampled: Sampled, files: SampleFiles) -> None:
        """Decode and write one sample; its record comes last and marks it as done."""
        latents, times = sampled.latents, sampled.times
        if not self.team.is_first:
            if not self.args.only_save_latents:
                self._decode_along(latents)
            return
        record = self.requests.record(sampled.prompt, sampled.number, latents)
        kept = nullcontext() if self.args.only_save_latents else self._kept(files.latents, latents, record)
        with kept, files.replaced_together(self.unfinished) as new:
            if self.args.only_save_latents:
                write_latents(new.latents, latents, record)
            else:
                self._write_frames(new, latents, times)
            write_json(new.record, self.generation.measured(record, times, new.sizes()))
        self.progress.line(f"  {files.latents if self.args.only_save_latents else files.video}")

    def _decode_along(self, latents: Tensor) -> None:
        """This process's part of what the first one of its team writes."""
        if self.pipeline.shares_decoding:
            self.generation.load("first_stage")
            self.pipeline.decode(latents)

    @contextmanager
    def _kept(self, place: Path, latents: Tensor, record: Mapping[str, Any]) -> Iterator[None]:
        """What sampling has made lies at `place`, if it can, until the block has made a video of it.

        So it is there whatever ends the block: a kill, too, and another process of the team that leaves.
        """
        written = False
        with suppress(SaveError):
            write_latents(place, latents, record)
            written = True
        try:
            yield
        except Exception:
            if written:
                alone = ", without the clip that is extended" if self.args.extend is not None else ""
                self.progress.warn(f"there is no video, but its latents: {place} (--decode-latents reads them{alone})")
            raise
        with saving(place):
            place.unlink(missing_ok=True)

    def _write_frames(self, files: SampleFiles, latents: Tensor, times: StageTimes) -> None:
        frames = self.generation.decode(latents, times)
        with self.progress.stage("write", times):
            write_video(files.video, frames, self.args.sampling_fps)
            write_contact_sheet(files.sheet, frames)

    def _decode_saved(self, saved: Sequence[Path]) -> None:
        for file in saved:
            with self.team.together():
                latents, facts = read_latents(file)
                self.generation.load(self.pipeline.decoder_part)
            with self.team.together():
                self._decode_file(file, latents, facts)

    def _decode_file(self, file: Path, latents: Tensor, facts: dict[str, Any]) -> None:
        if not self.team.is_first:
            self._decode_along(latents)
            return
        times, files = StageTimes(), SampleFiles(file.parent)
        by = {"decoder": self.args.decoder, "small_decoder_weights": self.pipeline.small_decoder_weights}
        facts |= {**by, "decoded_from": file.name, "file_bytes": {file.name: file.stat().st_size}}
        if facts.get("extend") is not None:  # the clip is not in front of what is decoded here
            facts |= {"extend": None, "first_new_frame": None}
        with files.replaced_together(self.unfinished) as new:
            self._write_frames(new, latents, times)
            write_json(new.record, self.generation.measured(facts, times, new.sizes()))
        self.progress.line(f"  {files.video}")

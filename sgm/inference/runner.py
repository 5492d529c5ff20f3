"""Goes through the prompts of a run: encode once, then per prompt sample, decode and write."""

from __future__ import annotations

import json
import os
import platform
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor

import sgm
from sgm.config import ConfigError, RunConfig
from sgm.data.video_out import write_contact_sheet, write_video
from sgm.errors import SgmError
from sgm.files import write_json
from sgm.inference.fit import SamplingError
from sgm.inference.noise import SampleId
from sgm.inference.options import SampleArgs
from sgm.inference.pipeline import EncodedPrompt, TextToVideo
from sgm.inference.progress import Progress, StageTimes
from sgm.inference.prompts import Prompt, ask, gather, share
from sgm.inference.refine import Endpoint, refine_prompt
from sgm.inference.writer import (
    SampleFiles,
    check_writable,
    find_latents,
    latents_digest,
    read_latents,
    read_record,
    write_latents,
    writing_into,
)


@dataclass
class Runner:
    """One process's work: `config`, its `pipeline`, where to report, and its place among the processes."""

    config: RunConfig[SampleArgs]
    pipeline: TextToVideo
    progress: Progress
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        self.args = self.config.args
        self.out = Path(self.args.output_dir)
        self.load_times = StageTimes()

    # --- what to run ----------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Do what the configuration asks; returns the number of samples written."""
        check_writable(self.out)
        if self.args.seed_mode == "upstream":
            torch.manual_seed(self.args.seed + self.rank)
        if self.args.decode_latents:
            return self._decode_saved(Path(self.args.decode_latents))
        if self.args.input_type == "cli" and not self.args.prompts:
            return self._converse()
        return self._run_list(share(self._prompts(), self.rank, self.world_size))

    def _prompts(self) -> list[Prompt]:
        prompts, note = gather(self.args.prompts, self.args.input_file, self.config.files)
        if note:
            self.progress.line(note)
        return prompts

    def _converse(self) -> int:
        """Ask for prompts; one that fails does not end the conversation."""
        if self.world_size > 1:
            raise ConfigError("input_type cli asks a person and runs in one process; use txt for several processes.")
        self._load_what_samples_need()
        written = 0
        for prompt in ask():
            try:
                prompt = self._refined([prompt])[0]
                written += self._run_prompt(prompt, self._encode([prompt])[0])
            except torch.OutOfMemoryError:
                print(f"error: {out_of_memory_advice(self.args)}", file=sys.stderr)
            except ValueError as error:
                if not isinstance(error, SgmError):
                    traceback.print_exc()  # a bug, to be seen whole
                print(f"error: {error}", file=sys.stderr)
        return written

    def _run_list(self, prompts: Sequence[Prompt]) -> int:
        self._tell_what_is_made_anew(prompts)
        todo = [p for p in prompts if self._missing(p)]
        if len(todo) < len(prompts):
            self.progress.line(f"{len(prompts) - len(todo)} of {len(prompts)} prompts are done already")
        if not todo:
            return 0
        todo = self._refined(todo)
        self._load_what_samples_need()  # a bad file shows before an hour of sampling
        encoded = self._encode(todo)
        if self.args.placement != "all":
            self.pipeline.drop_text_encoder()
        written = 0
        with self.progress.bar(len(todo), "prompts", "prompt") as bar:
            for prompt, conditioning in zip(todo, encoded):
                written += self._run_prompt(prompt, conditioning)
                bar.update(1)
        return written

    def _refined(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts with their captions, if they are to be refined; a caption of an earlier run is kept.

        Raises:
            RefineError: naming the first prompt that cannot be refined.
        """
        if not self.args.refine:
            return list(prompts)
        endpoint = Endpoint.from_environment(self.args.refine_model)
        refined = []
        for prompt in prompts:
            caption = self._earlier_caption(prompt)
            if not caption:
                with self._stage("refine", self.load_times, f"prompt {prompt.index}"):
                    caption = refine_prompt(prompt, endpoint)
            self.progress.line(f"prompt {prompt.index}: {caption}")
            refined.append(replace(prompt, refined=caption))
        return refined

    def _earlier_caption(self, prompt: Prompt) -> str:
        """The caption that a sample of this prompt was made with, so that its other samples get the same."""
        for k in range(self.args.batch_size if self.args.skip_done else 0):
            facts = read_record(self.files(prompt, k).record)
            if facts.get("prompt") == prompt.text and facts.get("refined_prompt"):
                return str(facts["refined_prompt"])
        return ""

    # --- one prompt -----------------------------------------------------------------------------------------------

    def files(self, prompt: Prompt, sample: int) -> SampleFiles:
        return SampleFiles(self.out / prompt.folder / str(sample))

    def _missing(self, prompt: Prompt) -> list[int]:
        """Samples of a prompt that have to be made."""
        skip = self.args.skip_done
        return [k for k in range(self.args.batch_size) if not (skip and self._differences(prompt, k) == [])]

    def _differences(self, prompt: Prompt, sample: int) -> list[str] | None:
        """In what the request that made an earlier sample differs from this run's; None where there is no sample."""
        files = self.files(prompt, sample)
        if not files.done(self.args.only_save_latents):
            return None
        wanted = json.loads(json.dumps(self._request(prompt)))  # as it comes back from the file
        record = read_record(files.record)
        pairs = {name: (record[name], value) for name, value in wanted.items() if record.get(name, value) != value}
        texts = {name: [shorten(str(value), 60, placeholder=" ...") for value in pair] for name, pair in pairs.items()}
        return [f"{n} {old}, now {new}" if old != new else f"another {n}" for n, (old, new) in texts.items()]

    def _tell_what_is_made_anew(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            for k in range(self.args.batch_size if self.args.skip_done else 0):
                differences = self._differences(prompt, k)
                if differences:
                    why = "; ".join(differences)
                    self.progress.line(f"prompt {prompt.index}: made anew, it was made otherwise: {why}")

    def _encode(self, prompts: Sequence[Prompt]) -> list[EncodedPrompt]:
        self._load("conditioner")
        with self._stage("encode", self.load_times, f"{len(prompts)} prompts"):
            encoded = self.pipeline.encode([p.wording for p in prompts], self.args.negative_prompt)
        for prompt, conditioning in zip(prompts, encoded):
            if conditioning.cut:
                self._warn_of_cut(f"prompt {prompt.index}", conditioning.cut)
        if prompts and self.args.negative_prompt:
            cut = self.pipeline.cut_off(self.args.negative_prompt)
            if cut:
                self._warn_of_cut("the negative prompt", cut)
        return encoded

    def _warn_of_cut(self, what: str, cut: str) -> None:
        self.progress.warn(f"{what} is longer than the text encoder reads; left out: {_shorten(cut)!r}")

    def _run_prompt(self, prompt: Prompt, conditioning: EncodedPrompt) -> int:
        missing = self._missing(prompt)
        written = 0
        size = self.pipeline.max_batch
        while written < len(missing):
            batch = missing[written : written + size]
            times = StageTimes()
            latents = self._sample_if_it_fits(prompt, conditioning, batch, times)
            if latents is None:
                size = len(batch) // 2
                self.progress.line(f"not enough memory for {len(batch)} samples at once; trying {size}")
                continue
            for k, sample in enumerate(batch):
                self._finish(prompt, sample, latents[k], times)
            written += len(batch)
        return written

    def _sample_if_it_fits(
        self, prompt: Prompt, conditioning: EncodedPrompt, batch: Sequence[int], times: StageTimes
    ) -> Tensor | None:
        """Latents of a batch, or None where memory is short and a smaller batch may fit."""
        try:
            return self._sample(prompt, conditioning, batch, times)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
        return None

    def _sample(self, prompt: Prompt, conditioning: EncodedPrompt, batch: Sequence[int], times: StageTimes) -> Tensor:
        ids = [SampleId(self.args.seed, prompt.index, k) for k in batch]
        what = f"{self.pipeline.num_steps} steps, batch {len(batch)}"
        with self._stage("sample", times, what):
            return self.pipeline.sample(conditioning, ids, self.progress.steps)

    def _finish(self, prompt: Prompt, sample: int, latents: Tensor, times: StageTimes) -> None:
        """Decode and write one sample; its record comes last and marks it as done."""
        files = self.files(prompt, sample)
        record = self._record(prompt, sample, latents)
        if self.args.only_save_latents:
            write_latents(files.latents, latents, record)
        else:
            self._write_frames_or_latents(files, latents, times, record)
        with writing_into(files.folder):
            write_json(files.record, record | self._measured(times))
        self.progress.line(f"  {files.latents if self.args.only_save_latents else files.video}")

    def _write_frames_or_latents(
        self, files: SampleFiles, latents: Tensor, times: StageTimes, record: dict[str, Any]
    ) -> None:
        """Where decoding fails, keep what sampling has made."""
        try:
            self._write_frames(files, latents, times)
        except (SamplingError, torch.OutOfMemoryError):
            write_latents(files.latents, latents, record)
            self.progress.warn(f"decoding failed; the latents are in {files.latents} (--decode-latents reads them)")
            raise

    def _write_frames(self, files: SampleFiles, latents: Tensor, times: StageTimes) -> None:
        self._load("first_stage")
        with self._stage("decode", times):
            frames = self.pipeline.decode(latents)
        with self._stage("write", times), writing_into(files.folder):
            write_video(files.video, frames, self.args.sampling_fps)
            write_contact_sheet(files.sheet, frames)

    def _decode_saved(self, path: Path) -> int:
        found = find_latents(path)
        for file in found[self.rank :: self.world_size]:
            latents, facts = read_latents(file)
            times = StageTimes()
            files = SampleFiles(file.parent)
            self._write_frames(files, latents, times)
            with writing_into(files.folder):
                write_json(files.record, facts | {"decoded_from": file.name} | self._measured(times))
            self.progress.line(f"  {files.video}")
        return len(found)

    # --- loading, measuring, recording ----------------------------------------------------------------------------

    def _load_what_samples_need(self) -> None:
        self._load("network")
        if not self.args.only_save_latents:
            self._load("first_stage")

    def _load(self, part: str) -> None:
        if not self.pipeline.is_loaded(part):
            with self._stage(f"load {part.split('_')[0]}", self.load_times):
                self.pipeline.load(part)
            while self.pipeline.facts.notes:
                self.progress.line(f"note: {self.pipeline.facts.notes.pop(0)}")

    def _stage(self, name: str, times: StageTimes, what: str = ""):
        return self.progress.stage(name, times, what)

    def _request(self, prompt: Prompt) -> dict[str, Any]:
        """What a user asks of a sample; two samples of one request are the same but for their number."""
        sampler = self.pipeline.engine.sampler
        height, width = self.pipeline.image_size
        return {
            "prompt": prompt.text,
            "refine": self.args.refine,
            "negative_prompt": self.args.negative_prompt,
            "seed": self.args.seed,
            "seed_mode": self.args.seed_mode,
            "sampler": type(sampler).__name__,
            "num_steps": self.pipeline.num_steps,
            "guidance": {"guider": type(sampler.guider).__name__, "scale": self._guidance_scale()},
            "latent_frames": self.args.sampling_num_frames,
            "size": [height, width],
            "fps": self.args.sampling_fps,
            "dtype": self.args.dtype,
            "approximate": self.config.accelerate.approximate(),
            "load": self.args.load and os.path.abspath(os.path.expanduser(self.args.load)),
            "lora": [os.path.abspath(os.path.expanduser(text)) for text in self.args.lora],
        }

    def _record(self, prompt: Prompt, sample: int, latents: Tensor) -> dict[str, Any]:
        network = self.pipeline.facts.network
        return self._request(prompt) | {
            "refined_prompt": prompt.refined or None,
            "prompt_index": prompt.index,
            "sample_index": sample,
            "products": "bf16" if self.pipeline.engine.kernels.cpu_bf16 else self.args.dtype,
            "network_passes": asdict(self.pipeline.calls) if self.pipeline.calls else None,
            "latents_sha256": latents_digest(latents),
            "weights": {
                "transformer": network.fingerprint if network else None,
                "transformer_file": network.source if network else None,
                "adapters": network.adapters if network else [],
                "text_encoder": self.pipeline.facts.text_encoder,
            },
            "config_files": [str(f) for f in self.config.files],
            "config_hash": self.config.hash(("model", "args")),
        }

    def _guidance_scale(self) -> Any:
        return getattr(self.pipeline.engine.sampler.guider, "scale", None)

    def _measured(self, times: StageTimes) -> dict[str, Any]:
        device = self.pipeline.device
        return {
            "first_stage_weights": self.pipeline.facts.first_stage,
            "seconds": {k: round(v, 3) for k, v in {**self.load_times.seconds, **times.seconds}.items()},
            "peak_memory_bytes": {**self.load_times.peak_bytes, **times.peak_bytes},
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
            "placement": self.args.placement,
            "versions": versions(),
        }


def versions() -> dict[str, str]:
    """Versions that can change numbers."""
    from importlib.metadata import version

    packages = ("torch", "transformers", "SwissArmyTransformer", "safetensors")
    return {"cogvideox-sat": sgm.__version__, "python": platform.python_version(), **{p: version(p) for p in packages}}


def _shorten(text: str, limit: int = 200) -> str:
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text)} characters)"


def out_of_memory_advice(args: SampleArgs) -> str:
    """What to change when a GPU is too small."""
    smaller = {"all": "--placement stages (one part on the GPU at a time) or lean", "stages": "--placement lean"}
    advice = [smaller[args.placement]] if args.placement in smaller else []
    advice += ["--max-batch 1"] if min(args.batch_size, args.max_batch) > 1 else []
    advice += ["--vae-tiling, if decoding failed (approximate)"] if not args.vae_tiling else []
    advice += ["fewer latent frames (--num-frames 9)", "a smaller --image-size"]
    return f"the GPU ran out of memory with --placement {args.placement}. Try " + "; ".join(advice) + "."

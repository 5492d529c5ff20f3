"""Evaluation during training: loss on fixed clips, noise and timesteps; sampled videos in the original's layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor
from torch.utils.data import Dataset

from sgm.config import ConfigError
from sgm.data.buckets import batches_by_shape
from sgm.data.images import HeldPicture, ImageError
from sgm.data.loader import clip_count, collate, known_shapes
from sgm.data.video_out import to_uint8, write_video
from sgm.distributed import data_parallel_rank, data_parallel_world_size, own_rank, preserve_rng
from sgm.files import atomic_write, write_text
from sgm.inference.noise import SampleId
from sgm.inference.options import SampleArgs
from sgm.inference.prompts import Pictures, Prompt, PromptError
from sgm.inference.stages import EncodedPrompt, Stages
from sgm.models.diffusion import SATVideoDiffusionEngine
from sgm.modules.diffusionmodules.image_condition import repeat_first
from sgm.training.checkpoints.state import seed_all
from sgm.training.distill.engine import DistillationEngine
from sgm.training.distill.prompts import COND, TEXT, together
from sgm.training.faults import cure
from sgm.training.setup.engine import TrainingEngine
from sgm.training.step import BINS, batch_latents, bin_means, bin_sums, engine_inputs, first_frame
from sgm.training.watch.run_log import RunLog
from sgm.weights.save import is_finite


def eval_prompts(lines: Sequence[str], from_picture: bool) -> list[Prompt]:
    """`args.eval_prompts`: `TEXT`, or `TEXT@@FILE` for a model that starts `from_picture`.

    Pictures are kept in memory, since their files may go while training runs.

    Raises:
        ConfigError: names each line that does not fit the model.
    """
    try:
        prompts = Pictures(from_picture).attach([Prompt(k, line) for k, line in enumerate(lines)])
        return [replace(p, picture=p.picture and HeldPicture.holding(p.picture.image())) for p in prompts]
    except (PromptError, ImageError) as error:
        raise ConfigError(f"args.eval_prompts: {error}") from error


_SEED_STRIDE = 1_000_003  # between the seeds of evaluation batches


@dataclass
class Evaluation:
    """Evaluates a DeepSpeed engine on the same clips with the same random numbers each time.

    Caption dropout stays in force in the loss, as in the original; its draws are the same each time as well.

    Attributes:
        datasets: validation clips, taken in order and dealt out over data-parallel ranks.
        batch_size, batches: clips a batch, batches a rank.
        seed: of noise, timesteps and dropout.
        folder: run folder for what is logged; None logs nothing.
        latents_only: write sampled latents instead of decoded videos.
    """

    datasets: Sequence[Dataset]
    batch_size: int
    batches: int
    seed: int
    folder: Path | None
    latents_only: bool
    log_video: bool
    fps: int
    prompts: Sequence[Prompt] = ()

    def run(self, ds_engine: TrainingEngine, iteration: int, log: RunLog) -> tuple[float, list[float | None]]:
        """Mean loss over all ranks, and by part of the timesteps (None: none fell there). Collective."""
        engine = ds_engine.module
        ds_engine.eval()
        total = torch.zeros(1 + 2 * BINS, dtype=torch.float64, device=ds_engine.device)
        try:
            with torch.no_grad(), preserve_rng():
                for k, batch in enumerate(self._clips()):
                    seed_all(self.seed + _SEED_STRIDE * self._number(k))
                    loss, logs = ds_engine(*engine_inputs(engine, batch, ds_engine.device))
                    total[0] += loss.double()
                    total[1:] += bin_sums(logs, total.device).flatten()
                    if k == 0 and self.folder is not None:
                        files = Files(self.folder, iteration, self.fps, log)
                        self._log(engine, batch, ds_engine.device, files)
                        files.tell_of_left_out(ds_engine.fp16_enabled())
        finally:
            ds_engine.train()
        dist.all_reduce(total)
        mean, *bins = total.tolist()
        return mean / (self.batches * dist.get_world_size()), bin_means(bins[:BINS], bins[BINS:])

    def _clips(self) -> Iterator[dict[str, Any]]:
        plan = mixed_batches(self.datasets, self.batch_size)
        for k in range(self.batches):
            first = self._number(k) * self.batch_size
            chosen = plan[self._number(k) % len(plan)] if plan else range(first, first + self.batch_size)
            yield collate([self._clip(position) for position in chosen])

    def _number(self, k: int) -> int:
        """Number, over all ranks, of this rank's k-th batch."""
        return k * data_parallel_world_size() + data_parallel_rank()

    def _clip(self, position: int) -> dict[str, Any]:
        position %= sum(map(clip_count, self.datasets))
        for dataset in self.datasets:
            if position < clip_count(dataset):
                return dataset[position]
            position -= clip_count(dataset)
        raise IndexError(position)

    # --- what people look at --------------------------------------------------------------------------------------

    def _log(self, engine: SATVideoDiffusionEngine, batch: dict[str, Any], device: torch.device, files: Files) -> None:
        """Captions; input, reconstruction and sample of the first clip; a sample for each of `prompts`.

        Models that start from a picture get the clip's first frame, without the noise that it has in training.

        All ranks sample; the first one writes, and what cannot be written ends no training.
        """
        first = {name: values[:1] for name, values in batch.items()}
        files.text(batch["txt"])
        if not self.log_video:
            return
        latents = batch_latents(engine, first, device)
        stages = ValidationStages(engine, device, repeat_first(latents, engine.network.patch.t).shape[1:], files)
        if not self.latents_only:
            files.clip("inputs", 0, to_uint8(rearrange(first[engine.input_key], "b f c h w -> b c f h w"))[0].numpy())
            files.clip("reconstructions", 0, stages.decode(latents[0]))
        self._sample(stages, [self._of_clip(stages, first), *self._of_prompts(stages)], files)

    def _of_clip(self, stages: Stages, clip: Mapping[str, Any]) -> EncodedPrompt:
        """What a sample is made from that is like the only clip of a batch."""
        engine, conditions = stages.engine, stages.engine.condition_batch(clip)
        starts = engine.noised_image_input
        image = stages.moments(first_frame(engine, clip, stages.device), "first frame") if starts else None
        return EncodedPrompt(*conditions, image=image)

    def _of_prompts(self, stages: Stages) -> list[EncodedPrompt]:
        encoded = stages.encode([prompt.text for prompt in self.prompts])
        pictures = [None if p.picture is None else stages.visual.encode_picture(p.picture) for p in self.prompts]
        return [replace(prompt, image=picture) for prompt, picture in zip(encoded, pictures)]

    def _sample(self, stages: Stages, prompts: Sequence[EncodedPrompt], files: Files) -> None:
        for k, prompt in enumerate(prompts):
            torch.manual_seed(self.seed + k)
            latents = stages.sample(prompt, [SampleId(self.seed, k, 0)])
            if self.latents_only:
                files.latents(k, latents)
            else:
                files.clip("samples", k, stages.decode(stages.engine.drop_first(latents)[0]))


class ValidationStages(Stages):
    """Those of a model in training, as `seed_mode: upstream` samples.

    Args:
        shape: (t, c, h, w) of a sample. files: that the results are for.
    """

    def __init__(self, engine: SATVideoDiffusionEngine, device: torch.device, shape: Sequence[int], files: Files):
        super().__init__(engine, device)
        self.files = files
        frames, _, *size = shape
        pixels = engine.strides.pixel_size(*size)
        self.take(SampleArgs(sampling_num_frames=frames, sampling_image_size=[*pixels], seed_mode="upstream"))

    def check(self, x: Tensor, what: str) -> None:
        """Raises nothing: other ranks go through the same stages, and training goes on."""
        if not is_finite(x):
            self.files.not_finite.append(what)

    def decode(self, latents: Tensor) -> np.ndarray:
        """See `Stages`. In small pieces; of an even number of latent frames, which training takes, without the last.

        (The original decodes in one go here, which needs more memory than training, and gives other frames: group
        normalisation sees other spans then.)
        """
        stage = self.engine.autoencoder
        before = stage.memory
        stage.set_low_memory(True, cache_on_cpu=True)
        try:
            return super().decode(latents[: len(latents) - (len(latents) + 1) % 2])
        finally:
            stage.memory = before


@dataclass(frozen=True)
class Files:
    """What one evaluation leaves in the run's folder, in the original's layout; other ranks' calls do nothing.

    Attributes:
        not_finite: what of the next file's making is. left_out: files that were not written, and for what.
    """

    folder: Path
    iteration: int
    fps: int
    log: RunLog
    not_finite: list[str] = field(default_factory=list)
    left_out: dict[Path, str] = field(default_factory=dict)

    def _write(self, inner: Path, write: Callable[[Path], object]) -> None:
        """`write` a file of the folder; what cannot be written is told."""
        if own_rank()[0] != 0:
            return
        if self.not_finite:
            self.left_out[inner] = self.not_finite[0]
            self.not_finite.clear()
            return
        with self.log.or_warn(self.folder / inner.parts[0]):
            for parent in reversed(inner.parents[:-1]):  # not the run's folder: its disk may be gone
                (self.folder / parent).mkdir(exist_ok=True)
            write(self.folder / inner)

    def tell_of_left_out(self, fp16: bool) -> None:
        """In one line; `fp16`: the model is trained in that type."""
        if self.left_out:
            what = " and the ".join(dict.fromkeys(self.left_out.values()))
            self.log.line(
                f"warning: iteration {self.iteration}: the {what} of the evaluation contain NaN or infinity, so there "
                f"is no {', '.join(map(str, self.left_out))}; training goes on. Should that not pass, {cure(fp16)}."
            )

    def text(self, captions: Sequence[str]) -> None:
        content = "".join(f"{text}\n" for text in captions)
        self._write(Path("video_texts", f"{self.iteration:08d}"), lambda path: write_text(path, content))

    def latents(self, number: int, latents: Tensor) -> None:
        """Sampled latents (1, t, c, h, w)."""
        name = f"latent_{number:06d}.pt" if number else "latent.pt"
        place = Path("video", "latents", f"latents_gs-{self.iteration:06d}", name)
        self._write(place, lambda path: atomic_write(path, lambda file: torch.save(latents, file)))

    def clip(self, kind: str, number: int, frames: np.ndarray) -> None:
        """Frames, uint8 (f, h, w, 3), as an mp4."""

        def write(path: Path) -> None:
            write_video(path, frames, self.fps)
            self.log.video(f"{kind}/{number}", path, frames, self.fps, self.iteration)

        self._write(Path("video", f"{kind}_gs-{self.iteration:06d}", f"{number:06d}.mp4"), write)


def evaluation_batches(datasets: Sequence[Dataset], batch_size: int, wanted: int, strict: bool) -> int:
    """Batches a rank: `wanted`, or with `strict` as many as cover every clip once."""
    if not strict:
        return wanted
    plan = mixed_batches(datasets, batch_size)
    clips = sum(map(clip_count, datasets))
    return math.ceil((len(plan) if plan else clips / batch_size) / data_parallel_world_size())


def mixed_batches(datasets: Sequence[Dataset], batch_size: int) -> list[list[int]] | None:
    """Positions of the clips of each batch where clips of several shapes must be kept apart; None where they need not.

    Positions count through the data sets.
    """
    shapes = known_shapes(datasets)
    if batch_size == 1 or shapes is None:
        return None
    flat = [shape for of_one in shapes for shape in of_one]
    return batches_by_shape(flat, batch_size) if len(set(flat)) > 1 else None


@dataclass
class PromptEvaluation(Evaluation):
    """`datasets`: prompts. Sampled are the first `samples` of them, or as many as `prompts` has, if that is more."""

    samples: int = 2

    def _clips(self) -> Iterator[dict[str, Any]]:
        for k in range(self.batches):
            first = self._number(k) * self.batch_size
            yield together([self._clip(first + i) for i in range(self.batch_size)])

    def _log(self, engine: SATVideoDiffusionEngine, batch: dict[str, Any], device: torch.device, files: Files) -> None:
        if not self.log_video or not isinstance(engine, DistillationEngine):
            files.text(batch[TEXT])
            return
        count = min(max(self.samples, len(self.prompts)), sum(map(clip_count, self.datasets)))
        chosen = together([self._clip(k) for k in range(count)])
        files.text(chosen[TEXT])
        conditions = [{name: value[k : k + 1] for name, value in chosen[COND].items()} for k in range(count)]
        prompts = [EncodedPrompt(cond, engine.unconditional) for cond in conditions]
        self._sample(ValidationStages(engine, device, engine.shape, files), prompts, files)

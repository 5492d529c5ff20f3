"""Evaluation during training: loss on fixed clips, noise and timesteps; a sampled video in the original's layout."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor
from torch.utils.data import Dataset

from sgm.data.loader import collate
from sgm.distributed import data_parallel_rank, data_parallel_world_size, model_parallel_rank, preserve_rng
from sgm.training.step import batch_latents

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
        log_video: sample at all.
        fps: of written videos.
    """

    datasets: Sequence[Dataset]
    batch_size: int
    batches: int
    seed: int
    folder: Path | None
    latents_only: bool
    log_video: bool
    fps: int

    def run(self, ds_engine: Any, iteration: int) -> float:
        """Mean loss over all ranks. Collective."""
        engine = ds_engine.module
        ds_engine.eval()
        total = torch.zeros((), dtype=torch.float64, device=ds_engine.device)
        try:
            with torch.no_grad(), preserve_rng():
                for k, batch in enumerate(self._clips()):
                    torch.manual_seed(self.seed + _SEED_STRIDE * self._number(k))
                    loss, _ = ds_engine(batch_latents(engine, batch, ds_engine.device), batch)
                    total += loss.double()
                    if k == 0 and self.folder is not None:
                        self._log(engine, batch, iteration, ds_engine.device)
        finally:
            ds_engine.train()
        dist.all_reduce(total)
        return float(total) / (self.batches * dist.get_world_size())

    def _clips(self) -> Iterator[dict[str, Any]]:
        for k in range(self.batches):
            first = self._number(k) * self.batch_size
            yield collate([self._clip(first + j) for j in range(self.batch_size)])

    def _number(self, k: int) -> int:
        """Number, over all ranks, of this rank's k-th batch."""
        return k * data_parallel_world_size() + data_parallel_rank()

    def _clip(self, position: int) -> dict[str, Any]:
        position %= sum(len(d) for d in self.datasets)  # type: ignore[arg-type]
        for dataset in self.datasets:
            if position < len(dataset):  # type: ignore[arg-type]
                return dataset[position]
            position -= len(dataset)  # type: ignore[arg-type]
        raise IndexError(position)

    # --- what people look at --------------------------------------------------------------------------------------

    def _log(self, engine: Any, batch: dict[str, Any], iteration: int, device: torch.device) -> None:
        """Captions, and a sample for the first clip's caption. All ranks sample; the first one writes."""
        writes = data_parallel_rank() == 0 and model_parallel_rank() == 0
        if writes:
            texts = self.folder / "video_texts"
            texts.mkdir(parents=True, exist_ok=True)
            (texts / f"{iteration:08d}").write_text("".join(f"{text}\n" for text in batch["txt"]), encoding="utf-8")
        if not self.log_video:
            return
        latents = batch_latents(engine, batch, device)[:1]
        cond, uncond = engine.condition_batch({name: values[:1] for name, values in batch.items()})
        samples = engine.sample(cond, uncond, batch_size=1, shape=latents.shape[1:])
        if self.latents_only:
            if writes:
                save_latents(self.folder / "video" / "latents" / f"latents_gs-{iteration:06d}" / "latent.pt", samples)
            return
        videos = {
            "inputs": batch[engine.input_key][:1],
            "reconstructions": decode(engine, latents),
            "samples": decode(engine, samples),
        }
        if writes:
            for name, video in videos.items():
                path = self.folder / "video" / f"{name}_gs-{iteration:06d}" / "000000.mp4"
                write_clip(path, video[0], self.fps)


def decode(engine: Any, z: Tensor) -> Tensor:
    """Latents (b, t, c, h, w) to pixels (b, f, 3, h, w) in one go, as the original logs; an even t loses its last."""
    odd = z.shape[1] - (z.shape[1] + 1) % 2
    pixels = engine.decode_first_stage(rearrange(z[:, :odd], "b t c h w -> b c t h w"), chunked=False)
    return rearrange(pixels, "b c f h w -> b f c h w")


def save_latents(path: Path, latents: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(latents.cpu(), path)


def write_clip(path: Path, pixels: Tensor, fps: int) -> None:
    """Pixels (f, 3, h, w) in [-1, 1] as an mp4."""
    from sgm.inference.writer import write_video

    scaled = ((pixels.float().clamp(-1, 1) + 1) * 127.5).to(torch.uint8)
    write_video(path, rearrange(scaled, "f c h w -> f h w c").cpu().numpy(), fps)


def evaluation_batches(datasets: Sequence[Dataset], batch_size: int, wanted: int, strict: bool) -> int:
    """Batches a rank: `wanted`, or with `strict` as many as cover every clip once."""
    if not strict:
        return wanted
    clips = sum(len(d) for d in datasets)  # type: ignore[arg-type]
    return math.ceil(clips / (batch_size * data_parallel_world_size()))

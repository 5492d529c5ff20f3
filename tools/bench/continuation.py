"""How clips go on: `python tools/bench/continuation.py [CONFIG.yaml ...] [--count N]`. Prints JSON lines.

For models of the demo's clips (`configs/demo_infer.yaml`), with drawn ones of combinations that training never saw.

- extend: the first frames of a drawn clip get the rest as new ones. `psnr` of these to the drawn ones (dB), `seam`:
  mean difference of the two frames at the seam, `beside`: of the eight pairs before it and after it, `motion`: share
  of the whole clips whose motion is right (`tools/demo/score.py`). Kept frames are shown clean below the signal rate
  `clean_below`: `sgm.inference.length` has 0.3, at 0 they are noised all the time, at 2 never. Models that begin with
  a picture (`configs/demo_i2v_infer.yaml`) take the last of the first frames for it, and do this alone.
- long: 193 frames from text alone, of shapes whose motion has no end, by windows one after the other or averaged at
  every step (MultiDiffusion, arXiv 2302.08113). `motion` and `all` say how much is right in each quarter.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from torch import Tensor

from sgm.inference.length import CLEAN_BELOW
from sgm.inference.model import TextToVideo
from tools.bench.measure import emit
from tools.demo.attributes import ClipSpec, read_withheld
from tools.demo.captions import parse
from tools.demo.make_dataset import Options, make_clip
from tools.demo.measure import measure
from tools.demo.score import compare
from tools.demo.shapes import render_clip

WITHHELD = Path(__file__).resolve().parents[1] / "demo" / "withheld.json"
ENDLESS = ("bounce", "orbit", "rotate", "still")
FRAMES, WINDOW = 49, 13  # of the demo's clips, in pixel and latent frames
QUARTERS = 4
KEPT = {25: WINDOW, 9: 9}  # pixel frames that are kept: latent frames of the window, in which 24 new ones follow


class Averaged:
    """A denoiser whose estimates for overlapping windows are averaged, with weights that rise and fall linearly."""

    def __init__(self, frames: int, step: int):
        self.frames, self.step = frames, step

    def around(self, denoiser: Callable[..., Tensor], samples: int) -> Callable[..., Tensor]:
        def denoise(x: Tensor, signal: Tensor, conditions: Mapping[str, Any], **extras: Any) -> Tensor:
            total, weights = torch.zeros_like(x), x.new_zeros(x.shape[1])
            share = 1.0 - (torch.arange(self.frames, device=x.device) - self.frames // 2).abs() / self.frames
            for start in range(0, x.shape[1] - self.frames + 1, self.step):
                span = slice(start, start + self.frames)
                total[:, span] += share.view(1, -1, 1, 1, 1) * denoiser(x[:, span], signal, conditions, **extras)
                weights[span] += share
            return total / weights.view(1, -1, 1, 1, 1)

        return denoise


def drawn(count: int, motions: Sequence[str] = ()) -> Iterator[tuple[ClipSpec, str]]:
    """So many clips of one shape each and their captions; of `motions` alike many, where these are named."""
    options = Options(seed=77, two=0.0, withheld=read_withheld(WITHHELD), only_withheld=True)
    left = Counter({motion: -(-count // len(motions)) for motion in motions})
    for index in itertools.count():
        spec, caption = make_clip(index, options)
        motion = spec.objects[0].motion
        if motions and not left[motion]:
            continue
        left[motion] -= 1
        yield spec, caption
        count -= 1
        if not count:
            return


def right(frames: np.ndarray, caption: str) -> dict[str, bool]:
    """Of what the caption says, what a clip shows."""
    found = compare(*parse(caption), *measure(frames))
    return {name: all(found[name]) for name in ("motion", "all")}


def changes(frames: np.ndarray) -> np.ndarray:
    """Mean absolute difference of each frame to the one before it, (f - 1,)."""
    return np.abs(np.diff(frames.astype(np.float32), axis=0)).mean(axis=(1, 2, 3))


def extend(model: TextToVideo, count: int, kept: int, clean_below: float) -> None:
    """Clips that go on with 24 new frames from the last `kept` of 25."""
    window = {"num_frames": KEPT[kept], "window_overlap": 3} if kept in KEPT else {}
    rows = []
    for spec, caption in drawn(count):
        truth = render_clip(spec)
        with patch("sgm.inference.pipeline.CLEAN_BELOW", clean_below):
            made = model(caption, video=truth[:25], extend=24, **window).frames
        error = float(np.square(made[25:].astype(np.float32) - truth[25:]).mean())
        steps = changes(made)[16:33]
        beside = float(np.delete(steps, 8).mean())
        rows.append((10 * np.log10(255**2 / error), float(steps[8]), beside, right(made, caption)["motion"]))
    psnr, seam, beside, motion = (statistics.mean(map(float, column)) for column in zip(*rows, strict=True))
    emit(what="extend", kept=kept, clean_below=clean_below, psnr=psnr, seam=seam, beside=beside, motion=motion)


def long(model: TextToVideo, count: int, overlap: int | None) -> None:
    """Clips four times as long; `overlap` None: windows that are averaged."""
    frames = QUARTERS * (WINDOW - 1) + 1
    found: list[list[dict[str, bool]]] = [[] for _ in range(QUARTERS)]
    for _, caption in drawn(count, ENDLESS):
        if overlap is None:
            clip = _averaged(model, caption, frames)
        else:
            clip = model(caption, num_frames=frames, window_frames=WINDOW, window_overlap=overlap).frames
        for k, rows in enumerate(found):
            rows.append(right(clip[48 * k : 48 * k + FRAMES], caption))
    scores = {n: [round(statistics.mean(row[n] for row in rows), 3) for rows in found] for n in ("motion", "all")}
    emit(what="long", windows="averaged" if overlap is None else f"overlap {overlap}", **scores)


def _averaged(model: TextToVideo, caption: str, frames: int) -> np.ndarray:
    pipeline = model.pipeline
    model(caption, steps=2)  # what is needed is loaded
    (prompt,) = pipeline.encode([caption])
    conditions = [{n: v.to(pipeline.device) for n, v in part.items()} for part in (prompt.cond, prompt.uncond)]
    pipeline.engine.branches = Averaged(WINDOW, WINDOW // 2)
    try:
        shape = (frames, *pipeline.latent_shape[1:])
        with pipeline.placement.use(pipeline.engine.model):
            latents = pipeline.engine.sample(*conditions, shape=shape, num_steps=pipeline.engine.sampler.num_steps)
        return pipeline.decode(latents[0].cpu())
    finally:
        pipeline.engine.branches = None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="*", default=["configs/demo_infer.yaml"], help="sampling configuration")
    parser.add_argument("--count", type=int, default=32, help="clips of each kind (32)")
    parser.add_argument("--only", choices=("extend", "long"), help="one kind")
    options = parser.parse_args(arguments)
    model = TextToVideo.from_config(*options.config)
    if model.pipeline.engine.noised_image_input:
        extend(model, options.count, 1, CLEAN_BELOW)
        return 0
    if options.only != "long":
        for kept in KEPT:
            for clean_below in (0.0, CLEAN_BELOW, 2.0):
                extend(model, options.count, kept, clean_below)
    if options.only != "extend":
        for overlap in (3, 5, None):
            long(model, options.count, overlap)
    return 0


if __name__ == "__main__":
    sys.exit(main())

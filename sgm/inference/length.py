"""How long a run's videos are: sampled at once, in windows that follow one another, or behind the end of a clip.

A window begins with the last latent frames of the one before, or of the clip, which are put in at every step (Song et
al. 2021, arXiv 2011.13456, section 5). They are shown clean while the rest is hardly more than noise, so that the
network sees what moves and where, and from there on noised to the step's level, as in its training. Memory is that of a
window. `docs/sampling.md` has the figures that decided for this: noised all the time (as in RePaint, arXiv 2201.09865)
they lose the motion, and averaging windows at every step (MultiDiffusion, arXiv 2302.08113) melts what differs in them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sgm.inference.fit import SamplingError, window_frames
from sgm.inference.options import SampleArgs
from sgm.models.diffusion import SATVideoDiffusionEngine
from sgm.modules.diffusionmodules.image_condition import clip_frames, sampled_frames
from sgm.modules.diffusionmodules.sampling import Callback

CLEAN_BELOW = 0.3  # signal rate from which on kept frames are noised: the tenth of 20 steps


@dataclass(frozen=True)
class Window:
    """Latent frames `start` to `stop` - 1 of a sample, sampled at once; the first `known` of them are there before."""

    start: int
    stop: int
    known: int = 0

    @property
    def frames(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Length:
    """How a sample is put together.

    Attributes:
        total: latent frames of it, with the first one that models of 1.5 drop; `decoded` are left.
        windows: in which they are sampled.
        known: latent frames that are there before all windows.
        kept: the pixel frames of a clip's end which these are.
        new: pixel frames behind these that are asked for; the sample may have up to 7 more.
    """

    total: int
    decoded: int
    windows: tuple[Window, ...]
    known: int = 0
    kept: int = 0
    new: int = 0


def plan_windows(total: int, most: int, overlap: int, known: int = 0) -> tuple[Window, ...]:
    """Windows of at most `most` latent frames for `total`, the first `known` of which are there.

    Each begins with at least the last `overlap` frames before it, the last one with as many as it has room for.
    """
    windows, done = [], known
    while done < total:
        start = max(0, min(done - overlap, total - most))
        windows.append(Window(start, min(start + most, total), done - start))
        done = windows[-1].stop
    return tuple(windows)


def length_of(engine: SATVideoDiffusionEngine, args: SampleArgs, source_frames: int = 0) -> Length:
    """The length that `args` ask for, which fit the engine; `source_frames` are those of the clip to extend.

    Raises:
        SamplingError: more new frames than a picture's video has.
    """
    patch, frames = engine.network.patch.t, args.sampling_num_frames
    most, overlap = window_frames(engine, args)
    if args.extend is None:
        return Length(frames, clip_frames(frames, patch), plan_windows(frames, most, overlap))
    time, new = engine.strides.time, math.ceil(args.extend / engine.strides.time)
    if engine.noised_image_input:
        kept, new = 1, new + new % 2
        if (room := time * (clip_frames(most, patch) - 1)) < time * new:
            raise SamplingError(
                f"args.extend is {args.extend}, and this model makes up to {room} frames behind a picture: ask for "
                "those, and extend the video that comes of it."
            )
    else:
        kept, new = _kept_frames(engine.strides.latent_frames(source_frames), new, clip_frames(most, patch), overlap)
    decoded = kept + new
    total = sampled_frames(decoded, patch)
    known = 0 if engine.noised_image_input else total - new
    windows = plan_windows(total, most, overlap, known)
    return Length(total, decoded, windows, known, engine.strides.pixel_frames(kept), args.extend)


def _kept_frames(there: int, new: int, most: int, overlap: int) -> tuple[int, int]:
    """Of `there` latent frames of a clip those that are kept, and new ones, an odd number together: as many as the
    window has room for, or else an overlap."""
    kept = min(there, max(most - new, overlap))
    if (kept + new) % 2:
        return kept, new
    if kept < there:
        return kept + 1, new
    return (kept - 1, new) if kept > 1 else (kept, new + 1)


def in_windows(
    windows: Sequence[Window],
    known: Tensor | None,
    sample: Callable[[Window, Tensor | None, Callback], Tensor],
    callback: Callback,
) -> Tensor:
    """Latents (b, t, c, h, w): `sample(window, kept, callback)` makes each window from the latents that it begins with.

    `callback` hears of the steps of all windows as of one run's.
    """
    made = known
    for number, window in enumerate(windows):

        def numbered(step: int, steps: int, x: Tensor, estimate: Tensor, before: int = number) -> None:
            callback(before * steps + step, len(windows) * steps, x, estimate)

        kept = made[:, window.start :] if made is not None and window.known else None
        part = sample(window, kept, numbered)
        made = part if made is None else torch.cat([made.to(part), part[:, window.known :]], dim=1)
    assert made is not None  # there is a window
    return made

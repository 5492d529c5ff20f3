"""The picture or clip that videos are made from: found, fitted, encoded once, and drawn from for each sample.

Axes: b samples, t latent frames, f pixel frames, c channels, h w (latent) height and width.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sgm.data.images import HeldPicture, Picture, cropped, resized
from sgm.inference.fit import (
    SamplingError,
    fits_picture,
    follows_picture,
    other_kind,
    unusual_size,
    unusual_type,
    video_size,
)
from sgm.inference.length import length_of
from sgm.inference.noise import StackedNoise
from sgm.inference.options import SampleArgs
from sgm.inference.prompts import Pictures, Prompt
from sgm.inference.source_clip import HeldClip, SourceClip
from sgm.models.diffusion import SATVideoDiffusionEngine
from sgm.modules.diffusionmodules.image_condition import clip_frames, repeat_first, sampled_frames


@dataclass(frozen=True)
class InMemory:
    """What a caller holds in memory, in place of the files that `args.image` and `args.video` name."""

    picture: HeldPicture | None = None
    clip: HeldClip | None = None


NOTHING = InMemory()


class VisualInput:
    """What a run of `engine` under `args` is given beside prompts.

    Args:
        moments: pixels (1, 3, f, h, w) in [-1, 1], and what they are, to moments of the posterior (1, 2c, t, h/8, w/8)
            on the CPU.
        held: in place of the files that `args` names.

    Attributes:
        pictures: whether each prompt has a picture that its videos begin with.
        source: the clip to start from, or to go on with.
        length: of the videos.

    Raises:
        SourceError: no video.
        SamplingError: one that is too short, or more new frames than the model makes at once.
    """

    def __init__(
        self,
        engine: SATVideoDiffusionEngine,
        args: SampleArgs,
        device: torch.device,
        moments: Callable[[Tensor, str], Tensor],
        held: InMemory = NOTHING,
    ):
        self.engine, self.args, self.device = engine, args, device
        self._moments = moments
        self.extends = args.extend is not None
        of_prompts = engine.noised_image_input and not self.extends
        self.pictures = Pictures(of_prompts, held.picture or args.image, other_kind(engine), self.extends)
        self.source = held.clip or (SourceClip.of(Path(os.path.expanduser(args.video))) if args.video else None)
        self.length = length_of(engine, args, self.source.frames if self.source else 0)
        self._source_moments: Tensor | None = None
        if self.source is not None and not self.extends:
            self._check_long_enough(self.source)

    def _check_long_enough(self, source: SourceClip) -> None:
        strides, patch = self.engine.strides, self.engine.network.patch.t
        needed = strides.pixel_frames(self.length.decoded)
        if source.frames < needed:
            most = strides.latent_frames(source.frames)
            fitting = sampled_frames(most - (most + 1) % 2, patch)
            made = strides.pixel_frames(clip_frames(fitting, patch))
            raise SamplingError(
                f"{source.path} has {source.frames} frames, and videos of {needed} are asked for; --num-frames "
                f"{fitting} makes {made}, {(made - 1) / self.args.sampling_fps:g} seconds."
            )

    # --- what is there --------------------------------------------------------------------------------------------

    @property
    def reads_picture(self) -> bool:
        """Whether the network reads one, of each prompt or the clip's last frame."""
        return self.pictures.wanted or (self.extends and self.engine.noised_image_input)

    def size(self, picture: Picture | None = None) -> tuple[int, int]:
        """(height, width) in pixels of a video, or of one that begins with a picture."""
        return video_size(self.engine, self.args, picture or (self.source if self.reads_picture else None))

    def remarks(self, prompts: Sequence[Prompt]) -> list[str]:
        """What is unusual: a type that the model does not bear, sizes that it was not trained at.

        Raises:
            SamplingError: a picture asks for a size that the model has no positions for.
        """
        pictures = [prompt.picture for prompt in prompts] if self.pictures.wanted else [None]
        for picture in pictures:
            own = self.source if picture is None and self.reads_picture else picture
            fits_picture(self.engine, own, self.size(picture))
        sizes = dict.fromkeys(self.size(picture) for picture in pictures)
        found = [
            self._remark(),
            unusual_type(self.engine, self.args),
            *(unusual_size(self.engine, size) for size in sizes),
        ]
        return [text for text in found if text]

    def _remark(self) -> str | None:
        """What to say of a clip that is longer than the videos, or has another rate."""
        source, fps = self.source, self.args.sampling_fps
        if source is None:
            return None
        if not self.extends:
            needed = self.engine.strides.pixel_frames(self.length.decoded)
            said = f"{source.path} has {source.frames} frames, of which the first {needed} are taken"
            return None if source.frames == needed else said
        if source.fps is None or (wanted := max(1, round(source.fps))) == fps:
            return None
        return (
            f"{source.path} has {source.fps:.4g} frames a second, and the video gets {fps}: give --set "
            f"args.sampling_fps={wanted}"
        )

    # --- pictures -------------------------------------------------------------------------------------------------

    def _fit(self, image: Picture | SourceClip) -> Callable[..., Tensor]:
        """How it is brought to the video's size."""
        as_picture = isinstance(image, Picture) or self.reads_picture
        return cropped if as_picture and not follows_picture(self.engine) else resized

    def encode_picture(self, picture: Picture) -> Tensor:
        """Moments of a picture at the video's size, (1, 2c, 1, h, w).

        Raises:
            ImageError: its file cannot be read any more, or has changed.
            SamplingError: they are not finite.
        """
        pixels = self._fit(picture)(picture.image(), self.size(picture))
        return self._moments(pixels[None, :, None], "picture")

    def draw_picture(self, moments: Tensor) -> Tensor | None:
        """Under seed_mode `upstream` the latents (1, c, 1, h, w) that all samples of a prompt begin with: the original
        draws them once, before the samples. None where each sample draws its own."""
        return self._drawn(moments, None, 1) if self.args.seed_mode == "upstream" else None

    def image_latents(
        self, moments: Tensor | None, drawn: Tensor | None, noise: StackedNoise | None, count: int
    ) -> Tensor | None:
        """What the network reads of a picture, (count, t, c, h, w): of what was `drawn`, else of its `moments`."""
        if moments is None:
            return None
        z = self._drawn(moments, noise, count) if drawn is None else drawn
        return self.engine.image_latents(z.expand(count, -1, -1, -1, -1), self.length.total)

    # --- the clip -------------------------------------------------------------------------------------------------

    def encode_source(self) -> None:
        """Encode of the clip what is taken, once: its beginning, or its end where it is extended.

        Raises:
            SourceError: its file cannot be read any more.
            SamplingError: its latents are not finite.
        """
        if self.source is None or self._source_moments is not None:
            return
        numbers = range(self.engine.strides.pixel_frames(self.length.decoded))
        if self.extends:
            numbers = range(self.source.frames - self.length.kept, self.source.frames)
        pixels = self.source.pixels(numbers, self.size(), self._fit(self.source))
        self._source_moments = self._moments(pixels, "clip")

    @property
    def last_frame(self) -> Tensor | None:
        """Moments of the encoded clip's last frame, where videos begin with that."""
        return self._source_moments if self.reads_picture else None

    def source_latents(self, noise: StackedNoise | None, count: int) -> Tensor | None:
        """Those of the clip to start from, (count, t, c, h, w), scaled, in a number that patches divide."""
        if self._source_moments is None or self.extends:
            return None
        z = self._drawn(self._source_moments, noise, count).transpose(1, 2) * self.engine.scale_factor
        return repeat_first(z, self.engine.network.patch.t)

    def kept_latents(self, count: int) -> Tensor | None:
        """Those of the end of the clip to go on with, (count, t, c, h, w), scaled: the posterior's mean."""
        if self._source_moments is None or not self.length.known:
            return None
        mean = self.engine.first_stage.regularization.latents(self._source_moments.to(self.device), torch.zeros_like)
        z = mean.transpose(1, 2).expand(count, -1, -1, -1, -1) * self.engine.scale_factor
        missing = self.length.known - z.shape[1]  # the one that 1.5 drops
        return torch.cat([z[:, :1].expand(-1, missing, -1, -1, -1), z], dim=1)

    def _drawn(self, moments: Tensor, noise: StackedNoise | None, count: int) -> Tensor:
        """Latents (count, c, t, h, w) of a picture or a clip: a draw for each sample, its first numbers."""
        draw = noise.like if noise else torch.randn_like
        expanded = moments.to(self.device).expand(count, -1, -1, -1, -1).contiguous()
        return self.engine.first_stage.regularization.latents(expanded, draw)

    def behind_source(self, frames: np.ndarray) -> np.ndarray:
        """A decoded sample behind the clip that it goes on with, uint8 (f, h, w, 3); others as they are.

        Raises:
            SourceError: its file cannot be read any more.
        """
        if self.source is None or not self.extends:
            return frames
        clip, kept = self.source.images(self.size(), self._fit(self.source)), self.length.kept
        return joined(clip, frames[: kept + self.length.new], kept)


def joined(clip: np.ndarray, frames: np.ndarray, common: int) -> np.ndarray:
    """`frames` behind a clip, uint8 (f, h, w, 3) both, whose last frames they begin with.

    Over these the clip fades into its reconstruction, so that sharpness and colour change nowhere suddenly.
    """
    share = np.linspace(0, 1, common + 2, dtype=np.float32)[1:-1, None, None, None]
    faded = clip[-common:] * (1 - share) + frames[:common] * share
    return np.concatenate([clip[:-common], (faded + 0.5).astype(np.uint8), frames[common:]])

"""The picture or clip that videos are made from: found, fitted, encoded once, and drawn from for each sample.

Axes: b samples, t latent frames, c channels, h w (latent) height and width.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sgm.data.images import HeldPicture, Picture, cropped, resized
from sgm.inference.fit import SamplingError, follows_picture, other_kind, video_size
from sgm.inference.noise import StackedNoise
from sgm.inference.options import SampleArgs
from sgm.inference.prompts import Pictures
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
        pictures: whether videos begin with pictures, and with which.
        source: the clip to start from.

    Raises:
        SourceError: no video.
        SamplingError: one that is too short.
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
        self.pictures = Pictures(engine.noised_image_input, held.picture or args.image, other_kind(engine))
        clip = held.clip or (SourceClip.of(Path(os.path.expanduser(args.video))) if args.video else None)
        self.source = clip and self._long_enough(clip)
        self._source_moments: Tensor | None = None

    def _long_enough(self, source: SourceClip) -> SourceClip:
        strides = self.engine.strides
        needed = strides.pixel_frames(self.clip_frames)
        if source.frames < needed:
            most = strides.latent_frames(source.frames)
            fitting = sampled_frames(most - (most + 1) % 2, self.engine.network.patch.t)
            raise SamplingError(
                f"{source.path} has {source.frames} frames, and videos of {needed} are asked for; --num-frames "
                f"{fitting} makes {strides.pixel_frames(clip_frames(fitting, self.engine.network.patch.t))}."
            )
        return source

    @property
    def clip_frames(self) -> int:
        """Latent frames that are decoded."""
        return clip_frames(self.args.sampling_num_frames, self.engine.network.patch.t)

    def remark(self) -> str | None:
        """What to say of a clip that is longer than the videos."""
        needed = self.engine.strides.pixel_frames(self.clip_frames)
        if self.source is None or self.source.frames == needed:
            return None
        return f"{self.source.path} has {self.source.frames} frames, of which the first {needed} are taken"

    @property
    def is_given(self) -> bool:
        """Whether something is encoded."""
        return self.pictures.wanted or self.source is not None

    def encode_picture(self, picture: Picture) -> Tensor:
        """Moments of a picture at the video's size, (1, 2c, 1, h, w).

        Raises:
            ImageError: its file cannot be read any more, or has changed.
            SamplingError: they are not finite.
        """
        fit, size = resized if follows_picture(self.engine) else cropped, video_size(self.engine, self.args, picture)
        return self._moments(fit(picture.image(), size)[None, :, None], "picture")

    def draw_picture(self, moments: Tensor) -> Tensor | None:
        """Under seed_mode `upstream` the latents (1, c, 1, h, w) that all samples of a prompt begin with: the original
        draws them once, before the samples. None where each sample draws its own."""
        return self._drawn(moments, None, 1) if self.args.seed_mode == "upstream" else None

    def encode_source(self) -> None:
        """Encode the clip to start from, once.

        Raises:
            SourceError: its file cannot be read any more.
            SamplingError: its latents are not finite.
        """
        if self.source is not None and self._source_moments is None:
            frames = self.engine.strides.pixel_frames(self.clip_frames)
            pixels = self.source.pixels(frames, video_size(self.engine, self.args))
            self._source_moments = self._moments(pixels, "clip")

    def _drawn(self, moments: Tensor, noise: StackedNoise | None, count: int) -> Tensor:
        """Latents (count, c, t, h, w) of a picture or a clip: a draw for each sample, its first numbers."""
        draw = noise.like if noise else torch.randn_like
        expanded = moments.to(self.device).expand(count, -1, -1, -1, -1).contiguous()
        return self.engine.first_stage.regularization.latents(expanded, draw)

    def image_latents(
        self, moments: Tensor | None, drawn: Tensor | None, noise: StackedNoise | None, count: int
    ) -> Tensor | None:
        """What the network reads of a picture, (count, t, c, h, w): of what was `drawn`, else of its `moments`."""
        if moments is None:
            return None
        z = self._drawn(moments, noise, count) if drawn is None else drawn
        return self.engine.image_latents(z.expand(count, -1, -1, -1, -1), self.args.sampling_num_frames)

    def source_latents(self, noise: StackedNoise | None, count: int) -> Tensor | None:
        """Those of the clip to start from, (count, t, c, h, w), scaled, in a number that patches divide."""
        self.encode_source()
        if self._source_moments is None:
            return None
        z = self._drawn(self._source_moments, noise, count).transpose(1, 2) * self.engine.scale_factor
        return repeat_first(z, self.engine.network.patch.t)

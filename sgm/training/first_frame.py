"""What an image-to-video model starts from in training: the clip's own first frame, with noise before the first stage.

The noise keeps the network from copying the picture, whose encoding is never quite the one that it sees when it samples
(noise on the condition: Ho et al. 2021, arXiv:2106.15282; on pixels: Blattmann et al. 2023, arXiv:2311.15127).

Axes: b batch, f pixel frames, t latent frames, c channels, h w height and width.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sgm.cache.dataset import FIRST_FRAME
from sgm.data.clips import to_unit_range
from sgm.distributed import same_for_clip
from sgm.models.diffusion import SATVideoDiffusionEngine
from sgm.modules.diffusionmodules.denoiser import append_dims

LOG_SIGMA = (-3.0, 0.5)  # mean and spread of the noise level's logarithm, in pixels from -1 to 1


def draw_log_sigma(count: int) -> Tensor:
    """(count,) float32 on the CPU, normal with `LOG_SIGMA`."""
    mean, spread = LOG_SIGMA
    return torch.normal(mean, spread, size=(count,), device="cpu")


@dataclass(frozen=True)
class ImageDraws:
    """Where a step's random numbers for its pictures come from: as in the original torch's own generators, but for the
    dropout Python's, so that what torch draws afterwards is the same with and without it.

    Attributes:
        log_sigma: from b to the logarithms (b,) of the noise's spread, one a sample.
        noise: from pictures (b, 3, 1, h, w) to normal values like them.
        share: a number from 0 to 1, which below the dropout takes the pictures of the whole batch away.
    """

    log_sigma: Callable[[int], Tensor] = draw_log_sigma
    noise: Callable[[Tensor], Tensor] = torch.randn_like
    share: Callable[[], float] = random.random

    def noised(self, image: Tensor) -> Tensor:
        """Pictures with noise, not clamped. As in the original, the level is found in float32 on the CPU."""
        sigma = self.log_sigma(len(image)).exp().to(image.device, image.dtype, non_blocking=True)
        return image + self.noise(image) * append_dims(sigma, image.ndim)

    def kept(self, images: Tensor, dropout: float) -> Tensor:
        """Latents of a batch's pictures: all of them, or with the probability `dropout` zeros."""
        return torch.zeros_like(images) if self.share() < dropout else images


OWN_DRAWS = ImageDraws()


def first_frame(engine: SATVideoDiffusionEngine, batch: Mapping[str, Any], device: torch.device) -> Tensor:
    """First frames (b, 3, 1, h, w) in [-1, 1], in the engine's type, of a batch of clips or of cached ones."""
    if FIRST_FRAME in batch:
        pixels = to_unit_range(batch[FIRST_FRAME].to(device, non_blocking=True))
    else:
        pixels = batch[engine.input_key][:, 0].to(device, non_blocking=True)
    return pixels.to(engine.dtype).unsqueeze(2)


def noised_first_latent(
    engine: SATVideoDiffusionEngine, batch: Mapping[str, Any], device: torch.device, draws: ImageDraws
) -> Tensor:
    """Latents (b, 1, c, h, w) of the first frames with noise, as the network reads them."""
    return engine.encode_image(draws.noised(first_frame(engine, batch, device)), frames=1)


def shared_images(images: Tensor, dropout: float, draws: ImageDraws) -> Tensor:
    """Latents after dropout, the same for all processes of a clip."""
    return same_for_clip(draws.kept(images, dropout))

"""The image that a video begins with, as latents beside the noise; and latents for patches of several frames.

Axes: b batch, t latent frames, c channels, h w latent height and width.
"""

from __future__ import annotations

import torch
from torch import Tensor

# What the 1.5 image-to-video model is told at every call, in training and sampling (the original's `ofs`).
OFS = 2.0


def image_latents(first: Tensor, frames: int, every_frame: bool = False) -> Tensor:
    """Latents (b, t, c, h, w) that the network reads beside the noise: the image in frame 0 and zeros behind it.

    Args:
        first: latents of the image, (b, 1, c, h, w).
        frames: t, with the frames that `repeat_first` adds.
        every_frame: the image in all frames instead (the original's `noised_image_all_concat`).
    Raises:
        ValueError: `first` has not one frame, or `frames` is below 1.
    """
    if first.ndim != 5 or first.shape[1] != 1 or frames < 1:
        raise ValueError(f"image_latents takes (b, 1, c, h, w) and frames >= 1, got {tuple(first.shape)} and {frames}.")
    if every_frame:
        return first.repeat(1, frames, 1, 1, 1)
    rest = first.new_zeros(first.shape[0], frames - 1, *first.shape[2:])
    return torch.cat([first, rest], dim=1)


def scales_image_latents(patch_frames: int) -> bool:
    """Whether image latents are multiplied by `scale_factor`, as video latents are.

    The published 1.0 model was trained so. The one with patches of two frames (1.5) was not: the original's sampling
    divides the factor out again. Its training forgets to, which makes images 0.7 times as strong as at sampling.
    """
    return patch_frames == 1


def sampled_frames(clip_frames: int, patch_frames: int) -> int:
    """Latent frames that the network handles for a clip of so many: the next multiple of its patch."""
    return clip_frames + -clip_frames % patch_frames


def clip_frames(sampled: int, patch_frames: int) -> int:
    """Latent frames that are decoded of so many sampled ones. Clips have an odd number: of an even one the first goes.

    Without patches of several frames there is nothing to drop, and an even number is no clip.
    """
    return sampled - 1 if patch_frames > 1 and sampled % 2 == 0 else sampled


def repeat_first(latents: Tensor, patch_frames: int) -> Tensor:
    """Latents (b, t, c, h, w) with the first one repeated in front, until t is a multiple of the patch."""
    missing = sampled_frames(latents.shape[1], patch_frames) - latents.shape[1]
    if missing == 0:
        return latents
    return torch.cat([latents[:, :1].expand(-1, missing, -1, -1, -1), latents], dim=1)


def drop_first(latents: Tensor, patch_frames: int) -> Tensor:
    """Of sampled latents (b, t, c, h, w) those that are decoded, see `clip_frames`."""
    return latents[:, latents.shape[1] - clip_frames(latents.shape[1], patch_frames) :]

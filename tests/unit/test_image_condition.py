"""What image-to-video networks read beside the noise, and latents for patches of several frames."""

from __future__ import annotations

import pytest
import torch

from sgm.modules.diffusionmodules.image_condition import (
    clip_frames,
    drop_first,
    image_latents,
    repeat_first,
    sampled_frames,
)


def test_an_image_stands_in_frame_0_or_in_all():
    first = torch.randn(2, 1, 3, 4, 5)
    latents = image_latents(first, 3)
    assert torch.equal(latents[:, :1], first) and not latents[:, 1:].any() and latents.shape == (2, 3, 3, 4, 5)
    assert torch.equal(image_latents(first, 3, every_frame=True), first.expand(2, 3, 3, 4, 5))
    assert torch.equal(image_latents(first, 1), first)
    with pytest.raises(ValueError, match=r"\(2, 3, 3, 4, 5\)"):
        image_latents(latents, 3)


@pytest.mark.parametrize(
    ("patch", "clip", "sampled"), [(1, 13, 13), (1, 1, 1), (2, 21, 22), (2, 41, 42), (2, 1, 2), (2, 5, 6)]
)
def test_odd_clips_in_patches_of_two_frames(patch, clip, sampled):
    latents = torch.randn(2, clip, 3, 4, 5)
    padded = repeat_first(latents, patch)
    assert padded.shape[1] == sampled == sampled_frames(clip, patch) and clip_frames(sampled, patch) == clip
    assert torch.equal(padded[:, -clip:], latents) and torch.equal(padded[:, 0], latents[:, 0])
    assert torch.equal(drop_first(padded, patch), latents)


def test_without_patches_in_time_nothing_is_dropped():
    assert clip_frames(4, 1) == 4 and clip_frames(21, 2) == 21

"""From latents and text embeddings to the joint token sequence, and the arithmetic of patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from sgm.modules.transformer.block import NetworkInputs, TokenGrid
from sgm.modules.transformer.sat_base import BaseMixin
from sgm.typed import Range, Size

Patch = Annotated[int, Range(1, 64)]
PATCHES = "mixins.patch_embed.proj.weight"  # the patch projection in a network's state


class PatchSize(NamedTuple):
    """Latent frames, rows and columns of one token, and how the patches are embedded.

    `per_frame` is the first release's form (one number in YAML): a strided 2-D convolution on each frame. Later
    releases give three numbers and embed patches by a linear layer.
    """

    t: int
    h: int
    w: int
    per_frame: bool

    @classmethod
    def parse(cls, value: int | Sequence[int]) -> PatchSize:
        """From YAML's `patch_size`: p, or [pt, ph, pw].

        Raises:
            ValueError: neither of the two, or not positive.
        """
        sizes = (1, value, value) if isinstance(value, int) else tuple(value)
        if len(sizes) != 3 or not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ValueError(f"patch_size {value!r} is not valid; give one positive number or three: [t, h, w].")
        return cls(*sizes, per_frame=isinstance(value, int))

    @property
    def volume(self) -> int:
        return self.t * self.h * self.w

    def grid(self, frames: int, height: int, width: int) -> TokenGrid:
        """Tokens of a latent of this size.

        Raises:
            ValueError: a side is no multiple of the patch.
        """
        sides = (("frames", frames, self.t), ("height", height, self.h), ("width", width, self.w))
        for name, size, patch in sides:
            if size < patch or size % patch:
                raise ValueError(
                    f"latent {name} {size} is not a positive multiple of the patch size {patch}; "
                    f"the nearest sizes are {max(size // patch, 1) * patch} and {(size // patch + 1) * patch}."
                )
        return TokenGrid(frames // self.t, height // self.h, width // self.w)


class ImagePatchEmbeddingMixin(BaseMixin):
    """Projects latent patches and text embeddings to the model's width and puts text in front.

    Args:
        in_channels: channels of the latents (with the image's, for image-to-video).
        patch_size: p or [pt, ph, pw], see `PatchSize`.
        text_hidden_size: width of the text embeddings; None leaves text out.
    """

    def __init__(
        self,
        in_channels: Size,
        hidden_size: Size,
        patch_size: Patch | Sequence[Patch],
        bias: bool = True,
        text_hidden_size: Size | None = None,
    ):
        super().__init__()
        self.patch = PatchSize.parse(patch_size)
        self.in_channels = in_channels
        self.text_hidden_size = text_hidden_size
        self.proj: nn.Conv2d | nn.Linear
        if self.patch.per_frame:
            size = (self.patch.h, self.patch.w)
            self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=size, stride=size, bias=bias)
        else:
            self.proj = nn.Linear(in_channels * self.patch.volume, hidden_size, bias=bias)
        self.text_proj = None if text_hidden_size is None else nn.Linear(text_hidden_size, hidden_size)

    def reinit(self, parent_model: nn.Module | None = None) -> None:
        """Patch projection as a Xavier-initialised linear layer (Dosovitskiy et al. 2021)."""
        nn.init.xavier_uniform_(self.proj.weight.data.flatten(1))
        if self.proj.bias is not None:
            nn.init.zeros_(self.proj.bias)

    def word_embedding_forward(self, input_ids: Any, *, inputs: NetworkInputs, **_: Any) -> Tensor:
        """SAT hook: (b, l + t*h*w, d), text first, video in (t, h, w) order."""
        video = self.embed_video(inputs.video)
        if self.text_proj is None:
            return video
        return torch.cat((self.text_proj(inputs.context), video), dim=1)

    def embed_video(self, video: Tensor) -> Tensor:
        """Latents (b, t, c, h, w) to tokens (b, t'*h'*w', d)."""
        if self.patch.per_frame:
            tokens = self.proj(video.flatten(0, 1))
            return rearrange(tokens, "(b t) d h w -> b (t h w) d", b=video.shape[0])
        patches = rearrange(
            video, "b (t o) c (h p) (w q) -> b (t h w) (c o p q)", o=self.patch.t, p=self.patch.h, q=self.patch.w
        )
        return self.proj(patches)


def with_image_channels(weight: Tensor) -> Tensor:
    """A text-to-video model's patch projection with twice the channels in, of which the added ones count for nothing.

    So a picture's latents behind the noise change nothing at first; training finds out what they are for.

    Args:
        weight: (d, c, h, w) of a convolution or (d, c*o*h*w), channels slowest, of a linear layer.
    """
    return torch.cat((weight, torch.zeros_like(weight)), dim=1)


def unpatchify(tokens: Tensor, grid: TokenGrid, patch: PatchSize) -> Tensor:
    """Tokens (b, t*h*w, c*pt*ph*pw), channels slowest, to latents (b, t*pt, c, h*ph, w*pw)."""
    return rearrange(
        tokens,
        "b (t h w) (c o p q) -> b (t o) c (h p) (w q)",
        t=grid.t,
        h=grid.h,
        w=grid.w,
        o=patch.t,
        p=patch.h,
        q=patch.w,
    )

"""A small causal decoder that stands in for the VAE's own: a fraction of the arithmetic, one latent frame at a time.

Frames are images to it: 2D convolutions, each block seeing the frame before as well, in the manner of TAEHV and of
decoders distilled from their VAE. No norms, so nothing spans a clip, and a clip may be decoded in pieces of any length
with the same result.

Axes: b batch, c channels, t latent frames, f pixel frames, h w height and width; n = (t b) the images of a level.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sgm.modules.autoencoding.causal_conv import CausalCache
from sgm.modules.autoencoding.strides import STRIDES, Strides
from sgm.modules.children import ModuleList


@dataclass(frozen=True)
class SmallDecoderSizes:
    """Of a small decoder.

    Each level after the first has twice the frames, until these are all; each after the second twice the height and
    width. What is then left of the frame's size is made by the last convolution.

    Attributes:
        widths, blocks: channels of each level, and its residual blocks.
    Raises:
        ValueError: levels that do not make up the strides.
    """

    widths: tuple[int, ...] = (256, 256, 128, 64)
    blocks: tuple[int, ...] = (2, 2, 2, 1)
    z_channels: int = 16
    strides: Strides = STRIDES

    def __post_init__(self) -> None:
        least, most = 1 + self._doublings(self.strides.time), 2 + self._doublings(self.strides.space)
        if len(self.widths) != len(self.blocks) or not least <= len(self.widths) <= most:
            raise ValueError(
                f"a small decoder has {least} to {most} levels, a width and a number of blocks for each; got widths "
                f"{list(self.widths)} and blocks {list(self.blocks)}."
            )
        if min(*self.widths, self.z_channels) < 1 or min(self.blocks) < 0:
            raise ValueError(f"widths must be positive, blocks not negative; got {self.widths} and {self.blocks}.")

    @staticmethod
    def _doublings(factor: int) -> int:
        return int(math.log2(factor))

    def growth(self, level: int) -> tuple[int, int]:
        """(factor in time, factor in height and width) with which a level begins."""
        return 2 if 1 <= level <= self._doublings(self.strides.time) else 1, 2 if level >= 2 else 1

    @property
    def patch(self) -> int:
        """Pixels along each side of what the last convolution makes of one cell."""
        return self.strides.space >> max(0, len(self.widths) - 2)


class SmallDecoder(nn.Module):
    """Latents to pixels: (b, z_channels, t, h', w') -> (b, 3, f, 8h', 8w'), f = 4t - 3, any t.

    The first latent frame gives one pixel frame, every other one four, and no pixel frame depends on a later latent.
    """

    def __init__(self, sizes: SmallDecoderSizes) -> None:
        super().__init__()
        self.sizes, widths = sizes, sizes.widths
        self.conv_in = _conv(sizes.z_channels, widths[0])
        self.levels: ModuleList[_Level] = ModuleList(
            _Level(widths[max(0, k - 1)], width, count, *sizes.growth(k))
            for k, (width, count) in enumerate(zip(widths, sizes.blocks))
        )
        self.conv_out = _conv(widths[-1], 3 * sizes.patch**2)
        with torch.no_grad():
            self.conv_out.weight *= 0.1  # begins near gray
        self.set_channels_last()

    def set_channels_last(self) -> None:
        """Store filters channels-last, as the activations are."""
        for parameter in self.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' type, which latents must have."""
        return self.conv_in.weight.dtype

    def forward(self, z: Tensor, cache: CausalCache | None = None, starts: bool = True) -> Tensor:
        """Pixels, near [-1, 1], of a run of latent frames.

        Args:
            cache: what the run before left, and where this one leaves the like; None: the clip is whole.
        Raises:
            ValueError: latents of another shape.
        """
        if z.ndim != 5 or z.shape[1] != self.sizes.z_channels or 0 in z.shape:
            raise ValueError(f"decode takes latents (b, {self.sizes.z_channels}, t, h/8, w/8), got {tuple(z.shape)}.")
        b, patch = z.shape[0], self.sizes.patch
        x = rearrange(z, "b c t h w -> (t b) h w c").movedim(-1, 1)
        x = F.relu(self.conv_in(x), inplace=True)
        for level in self.levels:
            x = level(x, b, cache, starts)
        x = self.conv_out(x)
        return rearrange(x, "(t b) (p q c) h w -> b c t (h p) (w q)", b=b, p=patch, q=patch)

    def decode_chunks(self, z: Tensor) -> Iterator[Tensor]:
        """Pixels of a clip piece by piece, 1 frame and then 4 at a time, in memory that does not grow with it."""
        cache = CausalCache()
        for k in range(z.shape[2]):
            with torch.no_grad():  # not across the yield, where it would be the caller's
                piece = self(z[:, :, k : k + 1], cache, starts=k == 0)
            yield piece

    def decode(self, z: Tensor) -> Tensor:
        """`decode_chunks` in one tensor."""
        pieces = self.decode_chunks(z)
        first = next(pieces)
        result = first.new_empty((*first.shape[:2], self.sizes.strides.pixel_frames(z.shape[2]), *first.shape[3:]))
        result[:, :, :1] = first
        for k, piece in enumerate(pieces):
            start = self.sizes.strides.pixel_frames(k + 1)
            result[:, :, start : start + piece.shape[2]] = piece
        return result


class _Level(nn.Module):
    """A change of resolution, if any, then residual blocks."""

    def __init__(self, before: int, width: int, blocks: int, time: int, space: int) -> None:
        super().__init__()
        grows = time * space > 1 or before != width
        self.grow = _Growth(before, width, time, space) if grows else None
        self.blocks: ModuleList[_MemoryBlock] = ModuleList(_MemoryBlock(width) for _ in range(blocks))

    def forward(self, x: Tensor, b: int, cache: CausalCache | None, starts: bool) -> Tensor:
        if self.grow is not None:
            x = self.grow(x, b, starts)
        for block in self.blocks:
            x = block(x, b, cache)
        return x


class _MemoryBlock(nn.Module):
    """relu(x + conv(relu(conv([x, the frame before])))); before frame 0 is frame 0 itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv_1 = _conv(2 * width, width)
        self.conv_2 = _conv(width, width)
        with torch.no_grad():
            self.conv_2.weight *= 0.1  # begins near the identity

    def forward(self, x: Tensor, b: int, cache: CausalCache | None) -> Tensor:
        kept = None if cache is None else cache.take(self)
        before = torch.cat([x[:b] if kept is None else kept, x[:-b]])
        h = F.relu(self.conv_1(torch.cat([x, before], dim=1)), inplace=True)
        if cache is not None:
            cache.keep(self, x[-b:])
        return F.relu(x + self.conv_2(h), inplace=True)


class _Growth(nn.Module):
    """More frames and pixels by a 1x1 convolution whose channels become them; at a clip's start the last frame alone
    of what the first one gives."""

    def __init__(self, before: int, width: int, time: int, space: int) -> None:
        super().__init__()
        self.time, self.space = time, space
        self.conv = _conv(before, time * space**2 * width, kernel=1)

    def forward(self, x: Tensor, b: int, starts: bool) -> Tensor:
        x = rearrange(
            self.conv(x), "(t b) (k p q c) h w -> (t k b) (h p) (w q) c", b=b, k=self.time, p=self.space, q=self.space
        ).movedim(-1, 1)
        return x[(self.time - 1) * b :] if starts else x


def _conv(before: int, width: int, kernel: int = 3) -> nn.Conv2d:
    conv = nn.Conv2d(before, width, kernel, padding=kernel // 2)
    if not conv.weight.is_meta:
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        with torch.no_grad():
            conv.get_parameter("bias").zero_()
    return conv

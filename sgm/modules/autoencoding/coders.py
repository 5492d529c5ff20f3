"""Encoder and decoder of the 3D causal VAE (CogVideoX, Yang et al. 2024, section 2.1).

With the release's four levels: height and width shrink by 8, time by 4 with the first frame on its own, so that
f = 4k + 1 pixel frames and t = k + 1 latent frames belong together.

Axes: b batch, c channels, f pixel frames, t latent frames, h w height and width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

from torch import Tensor, nn

from sgm.modules.autoencoding.blocks import Downsample3D, ResnetBlock3D, Upsample3D, make_norm, norm_of
from sgm.modules.autoencoding.causal_conv import WHOLE_CLIP, CausalConv3d, ClipPass
from sgm.modules.autoencoding.strides import STRIDES, Strides
from sgm.modules.children import ModuleList
from sgm.modules.ops.vae import Activation
from sgm.typed import Range, Share, Size

Channels = Annotated[int, Range(1, 65536)]
Multipliers = Sequence[Annotated[int, Range(1, 1024)]]


class ContextParallelEncoder3D(nn.Module):
    """Pixels to posterior moments: (b, 3, f, h, w) in [-1, 1] -> (b, 2 * z_channels, t, h/8, w/8).

    Group normalisation spans the clip, so encoding a clip in pieces gives other numbers than encoding it whole. Any f
    is accepted here; an even f at any level pools all frames in pairs, which is another function than for odd f.

    Args:
        ch, ch_mult: width of level i is ch * ch_mult[i]; each level but the last halves height and width.
        z_channels, double_z: the result has 2 * z_channels channels (mean and log variance), or z_channels.
        temporal_compress_times: the first log2 of it levels halve time.
        attn_resolutions: must be empty (these autoencoders have no attention).
        out_ch, resolution, gather_norm: of the YAML's form, without effect on the encoder; gather_norm chooses how
            normalisation spans several GPUs.
    Raises:
        ValueError: an option that no such autoencoder has, named with what to write.
    """

    def __init__(
        self,
        *,
        ch: Channels,
        out_ch: Channels,
        ch_mult: Multipliers = (1, 2, 4, 8),
        num_res_blocks: Annotated[int, Range(0, 1024)],
        attn_resolutions: Sequence[int] = (),
        dropout: Share = 0.0,
        in_channels: Channels,
        resolution: Size,
        z_channels: Channels,
        double_z: bool = True,
        gather_norm: bool = False,
        temporal_compress_times: Size = STRIDES.time,
    ) -> None:
        super().__init__()
        time_levels = _time_levels(temporal_compress_times, ch_mult, attn_resolutions)
        widths = [ch * factor for factor in ch_mult]
        self.in_channels, self.out_channels = in_channels, 2 * z_channels if double_z else z_channels
        self.strides = Strides.from_coder(ch_mult, temporal_compress_times)
        self.conv_in = CausalConv3d(in_channels, ch)
        self.down: ModuleList[_Level] = ModuleList()
        for level, width in enumerate(widths):
            before = widths[level - 1] if level else ch
            blocks = _res_blocks(before, width, num_res_blocks, None, dropout)
            is_end = level == len(widths) - 1
            self.down.append(_Level(blocks, downsample=None if is_end else Downsample3D(width, level < time_levels)))
        self.mid = _Middle(widths[-1], None, dropout)
        self.norm_out = make_norm(widths[-1], None)
        self.conv_out = CausalConv3d(widths[-1], self.out_channels)

    def forward(self, x: Tensor, run: ClipPass = WHOLE_CLIP) -> Tensor:
        h = self.conv_in(x, run)
        # part by part, so that nothing here holds a level's input until its end
        levels = [part for level in self.down for part in level.parts()]
        for part in (*levels, self.mid.block_1, self.mid.block_2):
            h = part(h, run) if isinstance(part, Downsample3D) else part(h, None, run)
        return self.conv_out(h, run, norm=norm_of(self.norm_out, h, None, run))


class ContextParallelDecoder3D(nn.Module):
    """Latents to pixels: (b, z_channels, t, h', w') -> (b, out_ch, f, 8h', 8w').

    In one pass, f = 4t - 3 for odd t (1, 9, 17, ...) and 4t for even t; a chunk that follows another one through the
    cache has an even t of 2 and gives 8 frames. `up[i]` is level i, run from the last to the first.

    Args as in the encoder; in_channels, double_z, resolution and gather_norm are of the YAML's form, without effect.
    Raises:
        ValueError: an option that no such autoencoder has, named with what to write.
    """

    def __init__(
        self,
        *,
        ch: Channels,
        out_ch: Channels,
        ch_mult: Multipliers = (1, 2, 4, 8),
        num_res_blocks: Annotated[int, Range(0, 1024)],
        attn_resolutions: Sequence[int] = (),
        dropout: Share = 0.0,
        in_channels: Channels,
        resolution: Size,
        z_channels: Channels,
        double_z: bool = True,
        gather_norm: bool = False,
        temporal_compress_times: Size = STRIDES.time,
    ) -> None:
        super().__init__()
        time_levels = _time_levels(temporal_compress_times, ch_mult, attn_resolutions)
        widths = [ch * factor for factor in ch_mult]
        self.z_channels = z_channels
        self.strides = Strides.from_coder(ch_mult, temporal_compress_times)
        self.conv_in = CausalConv3d(z_channels, widths[-1])
        self.mid = _Middle(widths[-1], z_channels, dropout)
        levels = []
        for level, width in enumerate(widths):
            before = widths[min(level + 1, len(widths) - 1)]
            blocks = _res_blocks(before, width, num_res_blocks + 1, z_channels, dropout)
            grows_time = level >= len(widths) - time_levels
            levels.append(_Level(blocks, upsample=Upsample3D(width, grows_time) if level else None))
        self.up: ModuleList[_Level] = ModuleList(levels)
        self.norm_out = make_norm(widths[0], z_channels)
        self.conv_out = CausalConv3d(widths[0], out_ch)

    def forward(self, z: Tensor, run: ClipPass = WHOLE_CLIP) -> Tensor:
        h: Activation = self.conv_in(z, run)
        # part by part, so that nothing here holds a level's input until its end
        levels = [part for level in reversed(self.up) for part in level.parts()]
        for part in (self.mid.block_1, self.mid.block_2, *levels):
            h = part.lazily(h, run) if isinstance(part, Upsample3D) else part(h, z, run)
        return self.conv_out(h, run, norm=norm_of(self.norm_out, h, z, run))


class _Level(nn.Module):
    """Residual blocks of one width, then a change of resolution, if any (at most one of the two)."""

    def __init__(
        self,
        blocks: Sequence[ResnetBlock3D],
        downsample: Downsample3D | None = None,
        upsample: Upsample3D | None = None,
    ) -> None:
        super().__init__()
        self.block: ModuleList[ResnetBlock3D] = ModuleList(blocks)
        if downsample is not None:
            self.downsample = downsample
        if upsample is not None:
            self.upsample = upsample

    def parts(self) -> list[nn.Module]:
        """The blocks, then the change of resolution, if any."""
        return [*self.block, *(part for name, part in self.named_children() if name != "block")]


class _Middle(nn.Module):
    """Two residual blocks at the lowest resolution."""

    def __init__(self, width: int, latent_channels: int | None, dropout: float) -> None:
        super().__init__()
        self.block_1 = ResnetBlock3D(width, width, latent_channels=latent_channels, dropout=dropout)
        self.block_2 = ResnetBlock3D(width, width, latent_channels=latent_channels, dropout=dropout)


def _res_blocks(
    before: int, width: int, count: int, latent_channels: int | None, dropout: float
) -> list[ResnetBlock3D]:
    inputs = [before] + [width] * (count - 1)
    return [ResnetBlock3D(n, width, latent_channels=latent_channels, dropout=dropout) for n in inputs]


def _time_levels(temporal_compress_times: int, ch_mult: Sequence[int], attn_resolutions: Sequence[int]) -> int:
    """Number of levels that change time, after checking the options that are common to both coders."""
    if len(attn_resolutions):
        raise ValueError(
            f"attn_resolutions is {list(attn_resolutions)}, but the 3D autoencoder has no attention. Set it to []."
        )
    levels = int(math.log2(temporal_compress_times)) if temporal_compress_times > 0 else -1
    if levels < 0 or 2**levels != temporal_compress_times or levels > len(ch_mult) - 1:
        raise ValueError(
            f"temporal_compress_times is {temporal_compress_times}; with {len(ch_mult)} levels (ch_mult) it must be "
            f"one of {[2**k for k in range(len(ch_mult))]}."
        )
    return levels

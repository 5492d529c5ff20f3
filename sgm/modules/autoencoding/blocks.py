"""Blocks of the 3D VAE: normalisations, residual block, change of resolution.

The decoder's normalisation is modulated by the latent (spatially adaptive, Zheng et al. 2022, "MoVQ"). Its 1x1x1
convolutions commute with the nearest-neighbour resize of the latent, so they run on the small latent grid.

Axes: b batch, c channels, t frames, h w height and width. `run` says how a pass over the clip goes (`ClipPass`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sgm.modules.autoencoding.causal_conv import (
    WHOLE_CLIP,
    CausalConv3d,
    ClipPass,
    all_frames,
    empty,
    frames_of,
    layout_of,
)
from sgm.modules.ops.vae import (
    SAME_FRAMES,
    Activation,
    AffineField,
    FrameMap,
    LazyFrames,
    Modulation,
    apply_field,
    double_frames,
    doubled_span,
    doubling_filters,
    fit_latent,
    frame_bytes,
    frame_spans,
    merge_moments,
    place_frames,
    pool_frames,
)

GROUPS = 32
EPS = 1e-6


class ClipNorm(nn.Module):
    """Group normalisation whose groups span all frames of the pass, so its numbers depend on the clip's length."""

    def __init__(self, channels: int, groups: int = GROUPS) -> None:
        super().__init__()
        check_groups(channels, groups)
        self.groups = groups
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def field(
        self,
        x: Activation,
        run: ClipPass = WHOLE_CLIP,
        modulation: Modulation | None = None,
        bias: Tensor | None = None,
    ) -> AffineField:
        """The normalisation of x (b, c, t, h, w), or of x + bias, optionally modulated, as scale and shift for x."""
        moments = self._moments(x, run, bias)
        return run.ops.latent_field(moments, self.weight, self.bias, EPS, modulation, bias)

    def _moments(self, x: Activation, run: ClipPass, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        moments = run.ops.group_moments
        if isinstance(x, Tensor):
            budget = x.numel() * 8 if torch.is_grad_enabled() else run.slice_bytes  # with gradients: in one go
            return moments(x, self.groups, budget, bias)
        spans = frame_spans(x.shape[2], frame_bytes(x), run.slice_bytes)
        return merge_moments(
            (stop - start, *moments(x.frames(start, stop), self.groups, run.slice_bytes, bias)) for start, stop in spans
        )

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, t, h, w) -> the same shape."""
        return apply_field(x, self.field(x), swish=False)


class SpatialNorm3D(nn.Module):
    """GroupNorm(x) * conv_y(zq) + conv_b(zq), the latent zq brought to the size of x by nearest neighbour."""

    def __init__(self, channels: int, latent_channels: int, groups: int = GROUPS) -> None:
        super().__init__()
        self.norm_layer = ClipNorm(channels, groups)
        self.conv_y = CausalConv3d(latent_channels, channels, kernel_size=1)
        self.conv_b = CausalConv3d(latent_channels, channels, kernel_size=1)

    def field(self, x: Activation, zq: Tensor, run: ClipPass = WHOLE_CLIP, bias: Tensor | None = None) -> AffineField:
        """The normalisation of x (b, c, t, h, w), or of x + bias, under the latent zq (b, z, t', h', w')."""
        latent, frame_map = fit_latent(zq, (x.shape[2], x.shape[3], x.shape[4]))
        modulation = Modulation(latent, frame_map, self.conv_y.conv, self.conv_b.conv)
        return self.norm_layer.field(x, run, modulation, bias)

    def forward(self, x: Tensor, zq: Tensor) -> Tensor:
        """(b, c, t, h, w) and (b, z, t', h', w') -> (b, c, t, h, w)."""
        return apply_field(x, self.field(x, zq), swish=False)


class ResnetBlock3D(nn.Module):
    """norm, swish, conv, norm, swish, dropout, conv, plus the input (through a 1x1x1 conv where widths differ).

    `latent_channels` given: the decoder's block, with norms modulated by the latent; None: the encoder's.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, latent_channels: int | None = None, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1 = make_norm(in_channels, latent_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels)
        self.norm2 = make_norm(out_channels, latent_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv3d(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Activation, zq: Tensor | None = None, run: ClipPass = WHOLE_CLIP) -> Tensor:
        """x (b, c_in, t, h, w), zq (b, z, t', h', w') in the decoder -> (b, c_out, t, h, w)."""
        bare = run.ops.folds_bias and not torch.is_grad_enabled()  # a bias then joins the norm, or the sum at the end
        h = self.conv1(x, run, norm=norm_of(self.norm1, x, zq, run), bare=bare)
        norm2 = norm_of(self.norm2, h, zq, run, self.conv1.conv.bias if bare else None)
        if self.training and self.dropout.p > 0:
            h = self.conv2(self.dropout(run.ops.apply_field(h, norm2, swish=True)), run, bare=bare)
        else:
            h = self.conv2(h, run, norm=norm2, overwrite=True, bare=bare)
        del norm2
        return self._add_shortcut(h, x, run, bare)

    def _add_shortcut(self, h: Tensor, x: Activation, run: ClipPass, bare: bool) -> Tensor:
        shortcut: nn.Conv3d | None = getattr(self, "nin_shortcut", None)
        if torch.is_grad_enabled():
            whole = all_frames(x)
            return h + (whole if shortcut is None else run.ops.convolve(shortcut, whole))
        bias = self.conv2.conv.bias if bare else None
        if shortcut is None and isinstance(x, Tensor):
            return run.ops.add_residual(h, x, bias)
        if shortcut is not None and shortcut.bias is not None and bias is not None:
            bias = bias.to(torch.promote_types(bias.dtype, torch.float32)) + shortcut.bias
        for start, stop in frame_spans(x.shape[2], frame_bytes(x), run.slice_bytes):
            part = frames_of(x, start, stop)
            part = part if shortcut is None else run.ops.convolve(shortcut, part, bare)
            run.ops.add_residual(h[:, :, start:stop], part, bias)
        return h


class Downsample3D(nn.Module):
    """Halve height and width (3x3 conv of stride 2, zeros right and below), first also time if `time` is set.

    (b, c, t, h, w) -> (b, c, t', h/2, w/2); in time t' = 1 + (t - 1) / 2 for odd t (frame 0 stays alone), t / 2 for
    even t.
    """

    def __init__(self, channels: int, time: bool) -> None:
        super().__init__()
        self.time = time
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, x: Tensor, run: ClipPass = WHOLE_CLIP) -> Tensor:
        if self.time:
            x = pool_frames(x)
        if torch.is_grad_enabled():
            return self._convolve(x, run, bare=False)
        b, _, t, h, w = x.shape
        result = empty((b, self.conv.out_channels, t, h // 2, w // 2), x, layout_of(x))
        bias = self.conv.bias if run.ops.folds_bias else None
        for start, stop in frame_spans(t, frame_bytes(x), run.slice_bytes):
            part = self._convolve(x[:, :, start:stop], run, bare=bias is not None)
            run.ops.place(part, result[:, :, start:stop], bias)
        return result

    def _convolve(self, x: Tensor, run: ClipPass, bare: bool) -> Tensor:
        return _by_frame(x, lambda frames: run.ops.convolve(self.conv, F.pad(frames, (0, 1, 0, 1)), bare))


class Upsample3D(nn.Module):
    """Double height and width by nearest neighbour, then 3x3 conv a frame; also time if `time` is set.

    (b, c, t, h, w) -> (b, c, t', 2h, 2w); in time t' = 1 + 2 (t - 1) for odd t (frame 0 stays single), 2t for even t.
    Doubled frames are equal, so the convolution runs once for both. In float32, and with fused operations, doubling and
    convolution are one convolution by 2x2 filters (`doubling_filters`), of 4/9 of the arithmetic.
    """

    def __init__(self, channels: int, time: bool) -> None:
        super().__init__()
        self.time = time
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, x: Tensor, run: ClipPass = WHOLE_CLIP) -> Tensor:
        b, _, t, h, w = x.shape
        if torch.is_grad_enabled():
            y = _by_frame(x, lambda frames: self.conv(F.interpolate(frames, scale_factor=2.0)))
            return double_frames(y) if self.time and t > 1 else y
        folds = run.ops.folds_bias or x.dtype == torch.float32
        double = self._double_folded if folds else self._double
        frames = 2 * t - t % 2 if self.time else t
        result = empty((b, self.conv.out_channels, frames, 2 * h, 2 * w), x, layout_of(x))
        for start, stop in frame_spans(t, 4 * frame_bytes(x), run.slice_bytes):
            target, frame_map = doubled_span(t, start, stop) if self.time else (slice(start, stop), SAME_FRAMES)
            double(x[:, :, start:stop], result[:, :, target], frame_map, run)
        return result

    def lazily(self, x: Activation, run: ClipPass) -> Activation:
        """`forward(x, run)` as frames that are made when they are read, where `run` asks for it and frames allow it."""
        if self.time or not run.recompute or torch.is_grad_enabled():
            return self(all_frames(x), run)
        small = all_frames(x)
        b, _, t, h, w = small.shape
        shape = (b, self.conv.out_channels, t, 2 * h, 2 * w)
        return LazyFrames(shape, small, lambda start, stop: self(small[:, :, start:stop], run))

    def _double(self, x: Tensor, result: Tensor, frame_map: FrameMap, run: ClipPass) -> None:
        y = _by_frame(x, lambda frames: run.ops.convolve(self.conv, F.interpolate(frames, scale_factor=2.0)))
        place_frames(y, result, frame_map)

    def _double_folded(self, x: Tensor, result: Tensor, frame_map: FrameMap, run: ClipPass) -> None:
        layout = torch.channels_last if layout_of(x) == torch.channels_last_3d else torch.contiguous_format
        filters = doubling_filters(self.conv.weight).contiguous(memory_format=layout)
        # cuDNN's result has the layout of x already, one without values (meta) has not
        parts = _by_frame(x, lambda frames: F.conv2d(frames, filters, padding=1).contiguous(memory_format=layout))
        run.ops.join_phases(parts, result, frame_map, self.conv.bias)


def _by_frame(x: Tensor, convolve: Callable[[Tensor], Tensor]) -> Tensor:
    """A 2D operation on every frame of x (b, c, t, h, w)."""
    y = convolve(rearrange(x, "b c t h w -> (b t) c h w"))
    return rearrange(y, "(b t) c h w -> b c t h w", b=x.shape[0])


def make_norm(channels: int, latent_channels: int | None) -> ClipNorm | SpatialNorm3D:
    """The encoder's norm (no latent), or the decoder's."""
    return ClipNorm(channels) if latent_channels is None else SpatialNorm3D(channels, latent_channels)


def norm_of(
    norm: ClipNorm | SpatialNorm3D, x: Activation, zq: Tensor | None, run: ClipPass, bias: Tensor | None = None
) -> AffineField:
    """The norm's field for x (or x + bias): under the latent in the decoder (zq given), plain in the encoder."""
    if isinstance(norm, SpatialNorm3D):
        if zq is None:
            raise ValueError("the decoder's norms are modulated by the latent: pass zq.")
        return norm.field(x, zq, run, bias)
    return norm.field(x, run, bias=bias)


def check_groups(channels: int, groups: int) -> None:
    """Raise ValueError unless `channels` can be normalised in `groups` groups."""
    if channels % groups:
        raise ValueError(
            f"a layer of the autoencoder has {channels} channels, which is no multiple of its {groups} normalisation "
            "groups. Choose `ch` and `ch_mult` so that every ch * ch_mult[i] is one."
        )

"""Arithmetic of the 3D VAE in plain PyTorch: what a faster kernel has to reproduce.

The large tensors of the VAE are its activations at full resolution (1.6 GB each for nine frames of 480x720 in half
precision), so a normalisation is written as a *field*: scale and shift per channel, or per channel and block of
pixels, in float32 on the small latent grid. Normalisation, modulation by the latent and swish are then one pass over
the activation, and any run of frames can be done alone.

Axes: b batch, c channels, t frames, h w pixels of the activation; h' w' pixels of the field, h % h' == w % w' == 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Conv = nn.Conv2d | nn.Conv3d  # of frames (n, c, h, w), or of a clip (b, c, t, h, w)


class FrameMap(NamedTuple):
    """Which frame of a shorter clip a frame of a longer one takes: frame k takes (k + offset) // repeat."""

    repeat: int = 1
    offset: int = 0

    def after(self, start: int) -> FrameMap:
        """The map of the longer clip without its first `start` frames."""
        return FrameMap(self.repeat, self.offset + start)

    def expand(self, z: Tensor, t: int) -> Tensor:
        """The longer clip's first t frames, from z (b, c, t', h', w')."""
        first, last = self.offset // self.repeat, (self.offset + t - 1) // self.repeat
        needed, skipped = z[:, :, first : last + 1], self.offset - first * self.repeat
        return needed if self.repeat == 1 else needed.repeat_interleave(self.repeat, 2)[:, :, skipped : skipped + t]


SAME_FRAMES = FrameMap()


class LazyFrames:
    """An activation (b, c, t, h, w) that is made a run of frames at a time, when it is read.

    Args:
        frames: (start, stop) -> frames start .. stop - 1, (b, c, stop - start, h, w), of the type and device of `like`.
    """

    def __init__(self, shape: tuple[int, ...], like: Tensor, frames: Callable[[int, int], Tensor]):
        self.shape, self.dtype, self.device, self.frames = torch.Size(shape), like.dtype, like.device, frames

    def numel(self) -> int:
        return self.shape.numel()

    def element_size(self) -> int:
        return self.dtype.itemsize


Activation = Tensor | LazyFrames


@dataclass(frozen=True)
class AffineField:
    """x * scale + shift, each (b, c, t', h', w') in float32 (or wider) and constant on blocks of h/h' x w/w'.

    A field of one frame serves all frames of x; with t' > 1, `frame_map` says which serves which.
    """

    scale: Tensor
    shift: Tensor
    frame_map: FrameMap = SAME_FRAMES

    def after(self, start: int) -> AffineField:
        """The field of x without its first `start` frames."""
        return replace(self, frame_map=self.frame_map.after(start))

    def expand(self, t: int) -> tuple[Tensor, Tensor]:
        """Scale and shift, each (b, c, t or 1, h', w'), of an x of t frames."""
        if self.scale.shape[2] == 1:
            return self.scale, self.shift
        return self.frame_map.expand(self.scale, t), self.frame_map.expand(self.shift, t)


def frame_spans(frames: int, frame_bytes: int, budget: int) -> list[tuple[int, int]]:
    """Cut `frames` into the fewest runs (start, stop), as even as can be, of at most `budget` bytes, or one frame."""
    pieces = -(-frames // max(1, budget // max(frame_bytes, 1)))
    return [(frames * k // pieces, frames * (k + 1) // pieces) for k in range(pieces)]


def frame_bytes(x: Activation, itemsize: int | None = None) -> int:
    """Bytes of one frame of an activation (b, c, t, h, w), over the batch, at `itemsize` bytes a value."""
    return x.numel() // x.shape[2] * (itemsize or x.element_size())


def group_moments(x: Tensor, groups: int, budget: int, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, (b, groups) in float32 or wider, over a group's channels, all frames and all pixels.

    With `bias` (c,) they are those of x + bias. Runs of frames within `budget` bytes are reduced alone and merged by
    Chan et al. 1979 (pairwise update), which keeps full precision where sums of squares would cancel.
    """
    if bias is not None:
        x = x + bias[:, None, None, None]
    if _is_lean(x):
        return LeanMoments.apply(x, groups)
    kind = torch.promote_types(x.dtype, torch.float32)

    def run_moments(start: int, stop: int) -> tuple[int, Tensor, Tensor]:
        return stop - start, *_moments_at_once(x[:, :, start:stop].to(kind), groups)

    spans = frame_spans(x.shape[2], frame_bytes(x, kind.itemsize), budget)
    return merge_moments(run_moments(*span) for span in spans)


def merge_moments(runs: Iterable[tuple[int | Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of all runs of frames together, from (frames, mean, variance) of each; >= 1 run.

    Every frame has as many values, so frames are the weights: a number, or tensors like the mean.
    """
    runs = iter(runs)
    seen, mean, variance = next(runs)
    square = variance * seen
    for count, run_mean, run_variance in runs:
        step = run_mean - mean
        square = square + run_variance * count + step.square() * (seen * count / (seen + count))
        mean = mean + step * (count / (seen + count))
        seen = seen + count
    return mean, square / seen


def _moments_at_once(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (b, groups) of all of x (b, c, t, h, w), without sums of squares that could cancel."""
    if x.device.type != "cpu" or torch.is_grad_enabled():
        variance, mean = torch.var_mean(x.unflatten(1, (groups, -1)), dim=(2, 3, 4, 5), correction=0)
        return mean, variance
    # On a CPU the reduction runs value by value, while group normalisation finds the same moments (by the pairwise
    # update too, on contiguous memory) six times as fast, its result included.
    _, mean, inverse = torch.native_group_norm(
        x.contiguous(), None, None, x.shape[0], x.shape[1], x[0, 0].numel(), groups, 0.0
    )
    return mean, inverse.square().reciprocal()


class Modulation(NamedTuple):
    """y and z of GN(x) * y + z as 1x1x1 convolutions of a latent grid (b, k, t', h', w'), see `fit_latent`."""

    latent: Tensor
    frame_map: FrameMap
    to_scale: nn.Conv3d
    to_shift: nn.Conv3d


def latent_field(
    moments: tuple[Tensor, Tensor],
    weight: Tensor,
    bias: Tensor,
    eps: float,
    modulation: Modulation | None = None,
    added: Tensor | None = None,
) -> AffineField:
    """Group normalisation (Wu & He 2018) as a field, with a modulation GN(x) * y + z.

    Args:
        moments: mean and variance (b, groups).
        weight, bias: (c,).
        added: (c,), makes it the field of x for GN(x + added); the moments are those of x + added.
    """
    mean, variance = moments
    per_channel = weight.shape[0] // mean.shape[1]
    scale = (variance + eps).rsqrt().repeat_interleave(per_channel, dim=1) * weight.to(mean.dtype)
    mean = mean.repeat_interleave(per_channel, dim=1)
    mean = mean if added is None else mean - added
    shift = bias.to(mean.dtype) - mean * scale
    scale, shift = scale[:, :, None, None, None], shift[:, :, None, None, None]
    if modulation is None:
        return AffineField(scale, shift)
    y, z = (conv(modulation.latent).to(mean.dtype) for conv in (modulation.to_scale, modulation.to_shift))
    return AffineField(scale * y, torch.addcmul(z, shift, y), modulation.frame_map)


def fit_latent(z: Tensor, size: tuple[int, int, int]) -> tuple[Tensor, FrameMap]:
    """Latent grid (b, c, t', h', w') for an activation of `size` (t, h, w), by nearest neighbour.

    With an odd number of frames above one, latent frame 0 belongs to frame 0 alone and the others to the rest. Axes
    that divide the activation's stay small, since `apply_field` repeats them on the fly; others are resized.

    Raises:
        ValueError: an odd t above one with a single latent frame.
    """
    t, h, w = size
    count, rows, cols = z.shape[2:]
    if h % rows or w % cols:
        z = F.interpolate(z, (count, h, w))
    alone = 1 if t > 1 and t % 2 else 0
    if count == 1 and alone:
        raise ValueError(f"{t} frames need at least 2 latent frames, got 1: frame 0 has its own.")
    if count == 1:
        return z, SAME_FRAMES
    repeat, left = divmod(t - alone, count - alone)
    if repeat and not left:
        return z, FrameMap(repeat, alone * (repeat - 1))
    parts = [z[:, :, :alone], F.interpolate(z[:, :, alone:], (t - alone, *z.shape[3:]))]
    return torch.cat(parts, dim=2), SAME_FRAMES


def apply_field(x: Tensor, field: AffineField, *, swish: bool, out: Tensor | None = None) -> Tensor:
    """x * scale + shift, then swish y * sigmoid(y) if asked for; x (b, c, t, h, w) -> the same shape and dtype.

    `out` receives the result (no gradients then); it may be a view, and x itself.
    """
    if out is None and _is_lean(x):
        return LeanField.apply(x, *field.expand(x.shape[2]), swish)
    rows, cols = field.scale.shape[3:]
    scale, shift = (part[:, :, :, :, None, :, None] for part in field.expand(x.shape[2]))
    blocks = _blocks(x, rows, cols)
    if out is None:
        y = torch.addcmul(shift, blocks, scale).reshape(x.shape)
        return (F.silu(y) if swish else y).to(x.dtype)
    torch.addcmul(shift, blocks, scale, out=_blocks(out, rows, cols))
    return F.silu(out, inplace=True) if swish else out


def _blocks(x: Tensor, rows: int, cols: int) -> Tensor:
    """View (b, c, t, h, w) as (b, c, t, rows, h/rows, cols, w/cols)."""
    return x.unflatten(4, (cols, -1)).unflatten(3, (rows, -1))


def pool_frames(x: Tensor) -> Tensor:
    """Halve time: means of neighbouring frames, t -> ceil(t / 2). An odd number keeps frame 0 alone."""
    t = x.shape[2]
    if t == 1:
        return x
    kept, rest = x[:, :, : t % 2], x[:, :, t % 2 :]
    means = torch.lerp(rest[:, :, ::2], rest[:, :, 1::2], 0.5)
    return torch.cat([kept, means], dim=2) if t % 2 else means


def double_frames(x: Tensor) -> Tensor:
    """Each frame of x (b, c, t, h, w) twice, but the first one once where t is odd (1 -> 1, 3 -> 5, 2 -> 4)."""
    if x.shape[2] == 1:
        return x
    kept, rest = x[:, :, : x.shape[2] % 2], x[:, :, x.shape[2] % 2 :]
    # by broadcasting, whose gradient is a plain sum where that of an index scatters
    if x.is_contiguous(memory_format=torch.channels_last_3d):
        twice = repeat(rest, "b c t h w -> b (t 2) h w c").movedim(-1, 1)
    else:
        twice = repeat(rest, "b c t h w -> b c (t 2) h w")
    return torch.cat([kept, twice], dim=2) if kept.shape[2] else twice


def convolve(conv: Conv, x: Tensor, bare: bool = False, spare: Tensor | None = None) -> Tensor:
    """conv(x), `bare` without its bias: a convolution of frames, (n, c, h, w), or of a clip, (b, c, t, h, w).

    `spare` is memory of the result's shape (maybe a view) that may be taken for it; without gradients only.
    """
    return conv._conv_forward(x, conv.weight, None) if bare else conv(x)


def add_residual(h: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """h + x, plus bias (c,) if given, in the place of h; all (b, c, t, h, w). No gradients."""
    h += x
    return h if bias is None else h.add_(bias[:, None, None, None])


def place(x: Tensor, out: Tensor, bias: Tensor | None = None) -> None:
    """Write x, plus bias (c,) if given, into `out`, a view of its shape (b, c, t, h, w). No gradients."""
    if bias is None:
        out.copy_(x)
    else:
        torch.add(x, bias[:, None, None, None], out=out)


def doubled_span(t: int, start: int, stop: int) -> tuple[slice, FrameMap]:
    """`double_frames` of t frames, for sources start .. stop - 1: frames of the result, and their map to these."""
    odd = t % 2
    target = slice(2 * start - odd if start else 0, 2 * stop - odd)
    return target, FrameMap(2, odd if start == 0 else 0)


def join_phases(parts: Tensor, out: Tensor, frame_map: FrameMap, bias: Tensor) -> None:
    """Put the four results of `doubling_filters` together, plus bias (c,). No gradients.

    Args:
        parts: (b, 4 c, t', h + 1, w + 1), the filters' results for an image with one pixel of zeros around it.
        out: a view (b, c, t, 2 h, 2 w), written.
        frame_map: from frames of `out` to those of `parts`.
    """
    _, _, t, height, width = out.shape
    parts = parts.unflatten(1, (4, -1))
    for k, (row, col) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        y = parts[:, k, :, :, row : row + height // 2, col : col + width // 2]
        for source, target in _copies(frame_map, t):
            torch.add(y[:, :, source], bias[:, None, None, None], out=out[:, :, target, row::2, col::2])


def place_frames(x: Tensor, out: Tensor, frame_map: FrameMap) -> None:
    """Write x (b, c, t', h, w) into `out`, a view (b, c, t, h, w), frame by frame as the map says. No gradients."""
    for source, target in _copies(frame_map, out.shape[2]):
        out[:, :, target].copy_(x[:, :, source])


def _copies(frame_map: FrameMap, t: int) -> list[tuple[slice, slice]]:
    """A map of t frames as `repeat` copies at most: frames of the shorter clip, frames of the longer one."""
    repeat, offset = frame_map
    copies = []
    for k in range(min(repeat, t)):
        targets = range(k, t, repeat)
        first = (k + offset) // repeat
        copies.append((slice(first, first + len(targets)), slice(k, t, repeat)))
    return copies


def doubling_filters(weight: Tensor) -> Tensor:
    """3x3 filters (o, i, 3, 3) for an image doubled by nearest neighbour, as 2x2 ones for the image: (4 o, i, 2, 2).

    Neighbouring taps that fall on the same pixel are added up. The four sets of o filters are for the even and odd rows
    and columns of the result, (0, 0), (0, 1), (1, 0), (1, 1); sums are float32 (or wider), results in weight's type.
    """
    kind = torch.promote_types(weight.dtype, torch.float32)
    # which of the taps 0, 1, 2 fall on the pixel before and the pixel at hand, or the pixel at hand and the next
    sums = torch.tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], dtype=kind, device=weight.device)
    return torch.einsum("apk,bql,oikl->aboipq", sums, sums, weight.to(kind)).flatten(0, 2).to(weight.dtype)


# --- training in half precision ----------------------------------------------------------------------------------
#
# Autograd would keep float32 copies of every activation and pass over them some forty times. These two operations
# keep the half-precision activation alone, calculate in float32 within each kernel, and recompute in the backward
# pass. They have first derivatives only.


def _is_lean(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.dtype in (torch.bfloat16, torch.float16)


class LeanMoments(torch.autograd.Function):
    """`group_moments` by sums in float32 (or wider)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        kind = torch.promote_types(x.dtype, torch.float32)
        dims, parts = (2, 3, 4, 5), x.unflatten(1, (groups, -1))  # b g c/g t h w
        count = x[0].numel() // groups
        mean = parts.sum(dims, dtype=kind) / count
        square = torch.linalg.vector_norm(parts, dim=dims, dtype=kind).square() / count
        ctx.save_for_backward(x, mean)
        return mean, (square - mean.square()).clamp_min(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_mean: Tensor, to_variance: Tensor) -> tuple[Tensor, None]:
        x, mean = ctx.saved_tensors
        groups = mean.shape[1]
        count = x[0].numel() // groups
        slope = 2 / count * to_variance
        offset = to_mean / count - slope * mean
        slope, offset = (part[:, :, None, None, None, None] for part in (slope, offset))
        result = torch.empty_like(x)
        torch.addcmul(offset, x.unflatten(1, (groups, -1)), slope, out=result.unflatten(1, (groups, -1)))
        return result, None


class LeanField(torch.autograd.Function):
    """`apply_field`, the field given as scale and shift that fit the frames of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, swish: bool) -> Tensor:
        ctx.save_for_backward(x, scale, shift)
        ctx.swish = swish
        return apply_field(x, AffineField(scale, shift), swish=swish, out=torch.empty_like(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, scale, shift = ctx.saved_tensors
        if ctx.swish:
            y = apply_field(x, AffineField(scale, shift), swish=False, out=torch.empty_like(x))
            grad = torch.ops.aten.silu_backward(grad, y)
        rows, cols = scale.shape[3:]
        to_x, blocks = torch.empty_like(x), _blocks(grad, rows, cols)
        torch.mul(blocks, scale[:, :, :, :, None, :, None], out=_blocks(to_x, rows, cols))
        # sums over what the field is constant on; in time only where it has one frame for all
        dims = (4, 6) if shift.shape[2] == x.shape[2] else (2, 4, 6)
        to_shift = blocks.sum(dims, dtype=shift.dtype).reshape(shift.shape)
        to_scale = (blocks * _blocks(x, rows, cols)).sum(dims, dtype=scale.dtype).reshape(scale.shape)
        return to_x, to_scale, to_shift, None


# --- choice --------------------------------------------------------------------------------------------------------


class VaeOps(NamedTuple):
    """One implementation of each operation that has several; `sgm.modules.ops.fused_vae` has those for GPUs.

    `folds_bias`: where no gradients are wanted, biases of convolutions are left to the pass that comes after them.
    """

    group_moments: Callable[..., tuple[Tensor, Tensor]] = group_moments
    latent_field: Callable[..., AffineField] = latent_field
    apply_field: Callable[..., Tensor] = apply_field
    convolve: Callable[..., Tensor] = convolve
    add_residual: Callable[..., Tensor] = add_residual
    place: Callable[..., None] = place
    join_phases: Callable[..., None] = join_phases
    folds_bias: bool = False


PLAIN = VaeOps()

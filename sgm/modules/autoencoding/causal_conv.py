"""Causal 3D convolution: frame k sees frames up to k, over one whole clip or over a clip in chunks.

Axes: b batch, c channels, t frames, h w height and width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sgm.modules.autoencoding.causal_cache import CausalCache
from sgm.modules.ops.vae import PLAIN, Activation, AffineField, VaeOps, frame_bytes, frame_spans

# A convolution whose input is larger is cut along time. 2 GiB is where the original cuts; the result is the same.
SLICE_BYTES = 2 << 30
# Decoding has chunks of nine frames, which at 480x720 go uncut in half precision but where they are widest.
DECODE_SLICE_BYTES = 768 << 20
# On a CPU runs of frames that fit the last cache are faster, and the allocator reuses their memory: larger blocks are
# mapped anew each time, page by page.
CPU_SLICE_BYTES = 16 << 20


@dataclass(frozen=True)
class ClipPass:
    """What one pass over a clip, or a chunk of it, hands from layer to layer.

    Attributes:
        cache: frames before this chunk; None: the clip is whole.
        last: no further chunk follows, so nothing is kept.
        slice_bytes: bound on the input and on the result of a convolution (its temporary copies are as large); longer
            ones are cut along time, with the same result.
        ops: implementation of the element-wise operations and reductions.
        recompute: make the largest activation again where it is read rather than keep it (no gradients; exact).
    """

    cache: CausalCache | None = None
    last: bool = True
    slice_bytes: int = SLICE_BYTES
    ops: VaeOps = PLAIN
    recompute: bool = False


WHOLE_CLIP = ClipPass()


def frames_of(x: Activation, start: int, stop: int) -> Tensor:
    """Frames start .. stop - 1 of an activation that is there, or of one that is made when it is read."""
    return x[:, :, start:stop] if isinstance(x, Tensor) else x.frames(start, stop)


def all_frames(x: Activation) -> Tensor:
    """An activation that is there, made if it was not."""
    return x if isinstance(x, Tensor) else x.frames(0, x.shape[2])


def _mkldnn_supports(dtype: torch.dtype) -> bool:
    """Whether oneDNN convolves this type on this CPU."""
    if not torch.backends.mkldnn.enabled:
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class ClipConv3d(nn.Conv3d):
    """Conv3d that runs in oneDNN on a CPU, whatever the size of the clip.

    PyTorch itself leaves a single clip to a matrix product per frame of unfolded patches where b * c * t * h is at most
    20480 (width does not count), which takes up to ten times as long.
    """

    padding: tuple[int, ...]

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if x.device.type != "cpu" or not _mkldnn_supports(x.dtype):
            return super()._conv_forward(x, weight, bias)
        return torch.mkldnn_convolution(x, weight, bias, self.padding, self.stride, self.dilation, self.groups)


class CausalConv3d(nn.Module):
    """Conv3d with k - 1 frames put in front of the clip, none behind, and zeros around each frame.

    The frames in front are those that the cache holds from the chunk before, or else frame 0 repeated (Yu et al. 2023,
    "Language Model Beats Diffusion", causal 3D CNN). (b, c_in, t, h, w) -> (b, c_out, t, h, w).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        side = kernel_size // 2
        self.front = kernel_size - 1
        kind = ClipConv3d if kernel_size > 1 else nn.Conv3d
        self.conv = kind(in_channels, out_channels, kernel_size, padding=(0, side, side))

    def forward(
        self,
        x: Activation,
        run: ClipPass = WHOLE_CLIP,
        norm: AffineField | None = None,
        *,
        overwrite: bool = False,
        bare: bool = False,
    ) -> Tensor:
        """Convolve x, or swish(norm(x)) where `norm` is given; `bare` leaves the bias to the caller.

        `overwrite` lets the result replace x (where shapes agree and no gradient is wanted).
        """
        place: Tensor | None = None
        keeps_shape = self.conv.in_channels == self.conv.out_channels
        if overwrite and isinstance(x, Tensor) and keeps_shape and not torch.is_grad_enabled():
            place = x
        spans = [(0, x.shape[2])]
        if not torch.is_grad_enabled():
            spans = frame_spans(x.shape[2], self._frame_bytes(x), run.slice_bytes)
        if len(spans) == 1:
            whole, front = frames_of(x, *spans[0]), self._cached_front(x, run)
            staged = stage_frames(whole, norm, front, self.front, self.conv.weight, run.ops)
            del whole, front
            result = run.ops.convolve(self.conv, staged, bare, place)
            tail = staged[:, :, staged.shape[2] - self.front :]
        else:
            result, tail = self._forward_cut(x, norm, spans, place, bare, run)
        if run.cache is not None and self.front and not run.last:
            # a copy, so that the staged frames can go (with gradients: a view)
            run.cache.keep(self, tail if torch.is_grad_enabled() else tail.clone())
        return result

    def _forward_cut(
        self,
        x: Activation,
        norm: AffineField | None,
        spans: list[tuple[int, int]],
        place: Tensor | None,
        bare: bool,
        run: ClipPass,
    ) -> tuple[Tensor, Tensor]:
        """Runs of frames one after the other in one buffer, each behind the end of the one before. No gradients.

        Gives the result, written to `place` where there is one, and the last frames that were convolved.
        """
        layout, (b, c, t, h, w) = layout_of(self.conv.weight), x.shape
        longest = max(stop - start for start, stop in spans)
        staged = empty((b, c, self.front + longest, h, w), x, layout)
        result = empty((b, self.conv.out_channels, t, h, w), x, layout) if place is None else place
        for start, stop in spans:
            window = staged[:, :, : self.front + stop - start]
            if start == 0:
                continues = self._fill_front(window, x, run)
            part_norm = None if norm is None else norm.after(start)
            write_frames(window[:, :, self.front :], frames_of(x, start, stop), part_norm, run.ops)
            if start == 0 and not continues:
                window[:, :, : self.front] = window[:, :, self.front : self.front + 1]
            target = result[:, :, start:stop]
            part = run.ops.convolve(self.conv, window, bare, target)
            if part is not target:
                target.copy_(part)
            for k in range(self.front if stop < t else 0):  # one by one: source and target may overlap
                staged[:, :, k] = window[:, :, stop - start + k]
        return result, window[:, :, stop - start :]

    def _fill_front(self, window: Tensor, x: Activation, run: ClipPass) -> bool:
        """Bring the frames before this chunk to their place; False if there are none."""
        front = self._cached_front(x, run)
        if front is not None:
            window[:, :, : self.front] = front
        return front is not None

    def _cached_front(self, x: Activation, run: ClipPass) -> Tensor | None:
        """The frames before this chunk, out of the cache."""
        return run.cache.take(self, x) if run.cache is not None and self.front else None

    def _frame_bytes(self, x: Activation) -> int:
        """Bytes of one frame of x or of the result, whichever is larger.

        The first convolution makes 128 channels of 3: at 49 x 480 x 720 its result in one go has more than 2^31
        values, which not every version of cuDNN can address.
        """
        widths = (self.conv.in_channels, self.conv.out_channels)
        return frame_bytes(x) * max(widths) // widths[0]


def stage_frames(
    x: Tensor, norm: AffineField | None, front: Tensor | None, count: int, weight: Tensor, ops: VaeOps = PLAIN
) -> Tensor:
    """[`count` frames of `front`, or of frame 0 repeated; then x or swish(norm(x))] along time, in one tensor.

    Without gradients the normalised frames are written straight to their place; `weight` gives the memory format.
    """
    if count == 0 and norm is None:
        return x
    if torch.is_grad_enabled():
        body = x if norm is None else ops.apply_field(x, norm, swish=True)
        # slices and not an expanded view, which would make `cat` forget the memory format
        before = [body[:, :, :1]] * count if front is None else [front]
        return torch.cat([*before, body], dim=2)
    b, c, t, h, w = x.shape
    staged = empty((b, c, count + t, h, w), x, layout_of(weight))
    body = staged[:, :, count:]
    write_frames(body, x, norm, ops)
    staged[:, :, :count] = body[:, :, :1] if front is None else front
    return staged


def write_frames(out: Tensor, x: Tensor, norm: AffineField | None, ops: VaeOps) -> None:
    """Write x, or swish(norm(x)), into `out`, a view of its shape. No gradients."""
    if norm is None:
        out.copy_(x)
    else:
        ops.apply_field(x, norm, swish=True, out=out)


def empty(shape: tuple[int, ...], like: Activation, layout: torch.memory_format) -> Tensor:
    """Memory of the type of `like`, on its device."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def layout_of(tensor: Tensor) -> torch.memory_format:
    """channels_last_3d if a 5-D tensor (weight or activation) is stored so, else contiguous."""
    is_last = tensor.is_contiguous(memory_format=torch.channels_last_3d) and not tensor.is_contiguous()
    return torch.channels_last_3d if is_last else torch.contiguous_format
